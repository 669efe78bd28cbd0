"""Checkpoints that survive a kill and load without running code.

``save`` writes tensors and plain data to a temporary file beside the target, flushes it to the disk and renames it:
at every moment the path holds the complete old file or the complete new one. ``load`` is
``torch.load(weights_only=True)``, with no class allowed but those of sharded tensors, numpy's numbers and parsed
arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import pickle
import random
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
LEFTOVER_SECONDS = 3600
METHOD = "pruning_core"
"""The ``quant_method`` that marks a packed or slim model in its transformers config."""
PLAIN = (bool, int, float, complex, str, bytes, type(None))

_SCALAR = np.float64(0).__reduce__()[0]  # numpy does not export the function that makes its scalars
_NUMBERS = [type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "FD?"]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *dict.fromkeys(_NUMBERS),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]
"""What training scripts put beside weights; making one of these runs no code of the file."""


class CheckpointError(ValueError):
    """A file that cannot be written or read as a checkpoint; the message says what and where."""


def pack_bits(flags: NDArray[np.bool_]) -> Bytes:
    """bool (any shape) -> uint8 (ceil(n / 8),): eight flags to a byte, the first in the lowest bit."""
    return np.packbits(flags.reshape(-1), bitorder="little")


def unpack_bits(data: Bytes, count: int) -> NDArray[np.bool_]:
    """``count`` flags; CheckpointError unless the bits that fill up the last byte are zero."""
    if count % 8 and data[-1] >> (count % 8):
        raise CheckpointError(f"has a bit set behind its {count:,} bits")
    return np.unpackbits(data, count=count, bitorder="little").view(np.bool_)


class _Write(Protocol):
    def __call__(self, file: BinaryIO) -> object: ...


def write_atomically(path: str | Path, write: _Write) -> None:
    """Runs ``write(file)`` on a temporary file in the same folder, then renames it over ``path``.

    A killed process may leave ``.<name>.*.tmp`` behind; a later write removes it once it is an hour old. Permissions
    follow the umask. A symbolic link at ``path`` is replaced by the file; the file that it points to does not change.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of killed runs; a recent one may have a live writer and stays."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Flushes the folder entry, so that the rename is durable; POSIX only."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(state: dict[str, Any], path: str | Path) -> None:
    """Writes a dict of tensors and plain data to ``path``, atomically; missing folders are made.

    Plain data are None, booleans, numbers, strings, bytes, and nested lists, tuples and dicts of them. Parameters are
    saved as tensors, NumPy scalars as numbers. Anything else is a CheckpointError that says where it is.

    >>> save({"model": model.state_dict(), "pruner": pruner.state_dict()}, "run.pt")
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint: must be a dict, got {type(state).__name__}; save state dicts, not objects")
    try:
        plain = _plain(state, "")
        write_atomically(path, lambda file: torch.save(plain, file))
    except RecursionError:
        raise CheckpointError("checkpoint: is nested too deep, or holds itself; save a flatter dict") from None


def _plain(value: Any, where: str) -> Any:
    """A copy of tensors and plain data only; CheckpointError naming the first value that is neither."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return value.detach()
    known = torch.serialization.get_safe_globals()
    if isinstance(value, Tensor) and type(value) in known and _of_sharded_tensors(type(value)):
        return value
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return _plain(value.item(), where)
    if type(value) in PLAIN:
        return value
    if isinstance(value, dict):
        return {_key(key, where): _plain(each, f"{where}[{key!r}]") for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(_plain(each, f"{where}[{i}]") for i, each in enumerate(value))
    raise CheckpointError(
        f"checkpoint{where}: only tensors and plain data are saved, got {type(value).__name__}; "
        "save its state_dict, a number, a string, a list or a dict"
    )


def _key(key: Any, where: str) -> Any:
    if type(key) in PLAIN:
        return key
    raise CheckpointError(f"checkpoint{where}: keys must be plain data, got {key!r}; use a string")


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turns an OSError inside the ``with`` block into a CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path of the checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder; give the file inside it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def load(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The dict that ``save`` wrote, tensors on ``map_location``.

    A file with pickled objects is a CheckpointError and is not executed; so is a damaged file.
    """
    path = Path(path)
    try:
        with readable(path), _only_harmless(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes lead torch.load to errors of many types
        raise CheckpointError(f"{path}: {_why_not(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a dict, got {type(state).__name__}; save state dicts")
    return state


_ALLOWING = threading.Lock()


@contextlib.contextmanager
def _only_harmless() -> Iterator[None]:
    """Allows sharded tensors and ``_HARMLESS``, and nothing that other packages allow, inside the ``with`` block.

    The list is one per process. ultralytics adds the classes of every file that it loads: after it, a pickled module
    would load here too, in the zip format only.
    """
    with _ALLOWING:
        allowed = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*_HARMLESS, *(each for each in allowed if _of_sharded_tensors(each))])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)


def _of_sharded_tensors(allowed: Any) -> bool:
    return isinstance(allowed, type) and allowed.__module__.startswith("torch.distributed.")


def _why_not(error: Exception) -> str:
    """The error of ``torch.load`` on one line, without its advice to turn ``weights_only`` off."""
    asked_for = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if asked_for:
        return f"holds an object, {asked_for[1]}, and was not loaded; save state dicts, not objects"
    reason = str(error) if isinstance(error, RuntimeError) else "unreadable bytes"
    reason = reason.strip().partition("\n")[0].partition(". ")[0]
    return f"not a readable checkpoint ({reason or type(error).__name__}); it may be damaged"


def rng_state() -> dict[str, Any]:
    """The states of the random generators of Python, NumPy, torch and CUDA, as tensors and plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_rng_state(state: dict[str, Any]) -> None:
    """Restores what ``rng_state`` returned; CheckpointError when the number of CUDA devices differs."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        if len(state["cuda"]) != torch.cuda.device_count():
            have = torch.cuda.device_count()
            raise CheckpointError(f"rng_state: holds {len(state['cuda'])} CUDA generators, got {have} devices")
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
