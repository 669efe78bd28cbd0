"""What a user did wrong, as one line."""


class BadInput(Exception):  # noqa: N818 - the user's mistake, not the program's
    """``<option>: <what is wrong>, got <value>; <what to do>``: printed on rank 0, exit code 2."""
