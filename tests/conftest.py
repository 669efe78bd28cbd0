import atexit
import os
import shutil
import tempfile
import warnings

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True)  # --hypothesis-profile=default draws new examples
settings.load_profile("repeatable")

# Nothing of the hub is asked for and no cache of the user is read or filled: set before huggingface_hub is imported.
CACHE = tempfile.mkdtemp(prefix="pruning-core-hub-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ |= {"HF_HOME": CACHE, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def quiet():
    """For tests that leave a schedule unfinished on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stopped at step")
        yield
