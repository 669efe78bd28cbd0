"""What the pages for contributors name exists: files, and the functions and classes said to stand in them."""

import re

import pytest

from pruning_core.criteria import CRITERIA
from tests.support import ROOT

PAGES = [ROOT / "docs/inside.md", ROOT / "CONTRIBUTING.md"]
CODE = {path: path.read_text() for top in ("pruning_core", "apps") for path in (ROOT / top).rglob("*.py")}
DEFINED = {name for text in CODE.values() for name in re.findall(r"^\s*(?:def|class) (\w+)", text, re.MULTILINE)}
DEFINED |= {
    name for text in CODE.values() for name in re.findall(r"^(?:    )?(\w+)(?:: [^=\n]+)? = ", text, re.MULTILINE)
}
FILE = re.compile(r"^[\w/]+\.pyi?$")
NAME = re.compile(r"^(?:\w+\.)?([A-Za-z_]\w{3,})(?:\(.*\))?$")
KINDS = {*CRITERIA, "squared_progressive", "num_heads"}
"""Names that are values."""


def missing(text):
    """Files in backticks that are nowhere, and names that nothing defines."""
    found = []
    for word in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if FILE.match(word):
            if not any(path.as_posix().endswith(f"/{word}") for path in CODE) and not list(ROOT.rglob(word)):
                found.append(word)
        elif (
            (name := NAME.match(word)) and ("_" in name[1] or not name[1].islower()) and name[1] not in DEFINED | KINDS
        ):
            found.append(word)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_exists(page):
    assert missing(page.read_text()) == []


def test_the_search_can_fail():
    assert missing("`graph/cut/surgary.py` and `slimm_` in `graph/cut/surgery.py`, `slim_`, `Plan`") == [
        "graph/cut/surgary.py",
        "slimm_",
    ]
