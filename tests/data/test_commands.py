"""What the commands in data/ do with a mistake."""

from __future__ import annotations

import re

import pytest

from data import questions, sentences


@pytest.mark.parametrize("made", [questions, sentences])
def test_a_folder_that_cannot_be_written(made, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        made.main(["--output", str(tmp_path / "file/set")])
    assert stopped.value.code == 2
    assert re.fullmatch(r".*file/set: cannot be written, got .*; choose another folder\n", capsys.readouterr().err)
