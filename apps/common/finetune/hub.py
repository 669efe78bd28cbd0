"""The hub: asked once whether it answers. Where it does not, what is in its cache is used, at once and quietly."""

from __future__ import annotations

import functools
import logging
import sys

import datasets
import huggingface_hub
import transformers


@functools.cache
def answers() -> bool:
    """One request, no retries. Without this a missing network costs half a minute and pages of retries a file."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # whatever the network library calls it: there is no hub
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return False
    return True


def quiet(first: bool) -> None:
    """The libraries' own progress bars and reports: what matters of them is said in the app's own lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # a file that cannot be read is told by the app
    if not first or not sys.stderr.isatty():
        datasets.disable_progress_bars()
