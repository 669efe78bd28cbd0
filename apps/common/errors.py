"""What a user did wrong, as one line."""


class BadInput(Exception):  # noqa: N818 - the user's mistake, not the program's
    """``<option>: <what is wrong>, got <value>; <what to do>``. The apps print it on rank 0 and leave with exit code 2."""
