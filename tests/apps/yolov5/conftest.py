from pathlib import Path

import pytest

from data.shapes_detection import make


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """The data yaml of a set of seconds; tests read it only."""
    return make(tmp_path_factory.mktemp("shapes") / "set", train=12, val=6, size=64)
