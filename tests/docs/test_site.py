"""The site holds every page and every public name. ``make docs`` builds it, with warnings as errors."""

import re

import pruning_core as pc
from tests.support import ROOT

DOCS = ROOT / "docs"
API = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))


def test_every_public_name_is_in_the_reference():
    documented = set(re.findall(r"^\.\. auto\w+:: pruning_core\.(\w+)", API, re.MULTILINE))
    assert set(pc.__all__) - documented == {"__version__"}


def test_the_reference_names_nothing_else():
    for path in re.findall(r"^\.\. auto(?:function|class|data|exception):: pruning_core\.([\w.]+)", API, re.MULTILINE):
        found = pc
        for part in path.split("."):
            found = getattr(found, part)


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in DOCS.glob("**/*.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{line}.md").resolve() for line in lines}
    assert all(path.exists() for path in listed)
    expected = {*DOCS.glob("**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("apps/*/README.md"), ROOT / "tests/README.md"}
    assert {path for path in expected if "_build" not in path.parts} - listed == {DOCS / "index.md"}


def test_pages_link_within_the_site():
    """A link to a folder, or to a file outside of the checkout, leads nowhere on the site."""
    for page in DOCS.glob("**/*.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).resolve().is_file(), (page.name, target)
                assert (page.parent / target).resolve().is_relative_to(ROOT), (page.name, target)
