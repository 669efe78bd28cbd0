"""``save_sparse`` and ``load_sparse``: a state dict as one small ``.safetensors`` file, and back, bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from pruning_core.checkpoint import CheckpointError
from pruning_core.export import container, packed
from pruning_core.export.packed import CODECS, Head
from pruning_core.export.streams import Bytes, Piece
from pruning_core.export.units import Blocks, Choices, Units
from pruning_core.patterns import Block, NinM, Pattern, parse_pattern

VALUES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
AUTO = "auto"
BAR_FROM = 2**30


# ---- saving ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How weights are packed: what was asked for, checked."""

    codec: str
    values: str
    pattern: Pattern | None

    @classmethod
    def of(cls, codec: str, values: str, pattern: str) -> Choice:
        for option, value, allowed in (("codec", codec, CODECS), ("values", values, tuple(VALUES))):
            if value not in allowed:
                raise ValueError(f"{option}: is unknown, got {value!r:.40}; use one of {', '.join(allowed)}")
        return cls(codec, values, None if pattern == AUTO else parse_pattern(pattern))


def save_sparse(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    codec: str = "entropy",
    values: str = "fp32",
    pattern: str = AUTO,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes weights that hold many zeros packed, and all other tensors as they are.

    ``codec="raw"`` skips the Huffman codes: larger, faster. ``values="bf16"`` or ``"fp16"`` round what is kept of wider
    weights; their dtype stays what it was. ``pattern`` is found for each weight unless it is given, as ``"4x1"``.
    ``metadata`` is kept in the file for ``read_metadata``.
    """
    choice = Choice.of(codec, values, pattern)
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    write_state(state, Path(path), choice, metadata)


def write_state(
    state: Mapping[str, Any], path: Path, choice: Choice, metadata: Mapping[str, str] | None = None
) -> None:
    tensors, aliases = _tensors(state)
    about = {"aliases": aliases, "metadata": dict(metadata or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryFile(dir=path.parent) as scratch,
        progress("packing", sum(tensor.nbytes for tensor in tensors.values())) as bar,
    ):
        rows = []
        for name, tensor in sorted(tensors.items()):
            rows.append(_row(name, tensor, choice, scratch))
            bar.update(tensor.nbytes)
        container.write(path, about, rows, scratch)


def _tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, each once, and the other names of those that have several (tied weights)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        _check(name, value)
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = value.detach()
    return tensors, dict(sorted(aliases.items()))


def _check(name: str, value: Any) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise CheckpointError(f"state dict: names must be strings other than '__metadata__', got {name!r:.80}")
    if isinstance(value, DTensor):
        raise CheckpointError(f"{name}: is sharded over ranks; give get_model_state_dict(..., full_state_dict=True)")
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name}: only tensors are exported, got {type(value).__name__}; leave it out")
    if value.is_meta or value.layout is not torch.strided or value.dtype not in container.NAMES:
        kind = "a meta tensor" if value.is_meta else f"{value.layout}, {value.dtype}"
        raise CheckpointError(f"{name}: cannot be exported, got {kind}; give a dense tensor of a plain dtype")


def _row(name: str, tensor: Tensor, choice: Choice, scratch: BinaryIO) -> container.Row:
    tensor = tensor.cpu().contiguous()
    if tensor.dtype in packed.NAMES and tensor.dim() > 1:
        done = packed.pack(tensor, choice.codec, _values(name, tensor, choice), _units(name, tensor, choice.pattern))
        if done is not None:
            return container.scratch_row(name, done[1], {"packed": done[0].to_plain()}, scratch)
    return container.dense_row(name, tensor.dtype, tensor.shape, as_bytes(tensor))


def as_bytes(tensor: Tensor) -> Piece:
    return packed.as_bits(tensor).reshape(-1).view(np.uint8).data


def _values(name: str, tensor: Tensor, choice: Choice) -> str:
    """Narrower than the weight, or the weight's own."""
    asked = VALUES[choice.values]
    if choice.values == "fp32" or packed.DTYPES[asked].itemsize >= tensor.element_size():
        return packed.NAMES[tensor.dtype]
    if (tensor.to(packed.DTYPES[asked]).isinf() & tensor.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ValueError(f"values: {name} does not fit into {choice.values}, got {largest:g}; use bf16 or fp32")
    return asked


def _units(name: str, tensor: Tensor, pattern: Pattern | None) -> Units | None:
    """Those of a pattern that was given: weights have their output channels first, then the input channels."""
    shape = tuple(tensor.shape)
    if isinstance(pattern, Block):
        if pattern.in_channels is None:  # a whole filter
            return Blocks((1, *shape[1:]))
        if pattern.out_channels is None:
            return Blocks((shape[0], 1, *shape[2:]))
        sizes = min(pattern.out_channels, shape[0]), min(pattern.in_channels, shape[1])
        return Blocks(tuple(max(size, 1) for size in sizes) + (1,) * (len(shape) - 2))
    if isinstance(pattern, NinM) and bool((tensor == 0).any()):
        units = Choices.of(pattern.kept, pattern.of, axis=1)
        if not units.holds((tensor != 0).numpy()):
            raise ValueError(f"pattern: {name} is not {pattern} along its input channels; leave pattern out to find it")
        return units
    return None


@contextmanager
def progress(what: str, nbytes: int) -> Iterator[tqdm[Any]]:
    """A bar where it takes more than a few seconds and somebody looks."""
    with tqdm(desc=what, total=nbytes, unit="B", unit_scale=True, disable=nbytes < BAR_FROM or None) as bar:
        yield bar


# ---- loading --------------------------------------------------------------------------------------------------------


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """The state dict that was saved, on the CPU. Tied weights are one tensor under several names."""
    with opened(path) as (file, header):
        declared = sum(_nbytes(entry) for entry in header.entries.values())
        packed.check_expansion(declared, sum(entry.end - entry.begin for entry in header.entries.values()))
        with progress("unpacking", declared) as bar:
            state = {}
            for name, entry in header.entries.items():
                state[name] = read_tensor(file, header, name)
                bar.update(_nbytes(entry))
        return state | {name: state[first] for name, first in header.about["aliases"].items()}


def load_sparse_into(model: nn.Module, path: str | Path) -> None:
    """Fills the model in place, one tensor at a time, after names, shapes and dtypes were compared."""
    own = model.state_dict()
    with opened(path) as (file, header):
        _compare(own, header)
        aliases: dict[str, list[str]] = {}
        for name, first in header.about["aliases"].items():
            aliases.setdefault(first, []).append(name)
        with torch.no_grad(), progress("unpacking", sum(map(_nbytes, header.entries.values()))) as bar:
            for name, entry in header.entries.items():
                value = read_tensor(file, header, name)
                for each in (name, *aliases.get(name, ())):
                    own[each].copy_(value)
                del value  # before the next one is made
                bar.update(_nbytes(entry))


def write_dense(path: str | Path, out: str | Path) -> None:
    """An ordinary safetensors file with all names, also those of tied weights."""
    with opened(path) as (file, header):
        names = {name: name for name in header.entries} | header.about["aliases"]
        kinds = {
            name: (dtype_of(header.entries[first]), shape_of(header.entries[first])) for name, first in names.items()
        }
        container.write_plain(Path(out), kinds, lambda name: as_bytes(read_tensor(file, header, names[name])))


def read_metadata(path: str | Path) -> dict[str, str]:
    """What ``save_sparse(..., metadata=...)`` was given."""
    with opened(path) as (_, header):
        return {str(key): str(value) for key, value in header.about["metadata"].items()}


def _compare(own: Mapping[str, Tensor], header: container.Header) -> None:
    saved = {name: (shape_of(entry), dtype_of(entry)) for name, entry in header.entries.items()}
    saved |= {name: saved[first] for name, first in header.about["aliases"].items()}
    for name in (*own, *saved):
        if name not in saved or name not in own:
            where = "the file" if name not in saved else "the model"
            raise CheckpointError(f"{name}: is not in {where}; build the model that was saved")
        shape, dtype = saved[name]
        if tuple(own[name].shape) != shape or own[name].dtype is not dtype:
            have = f"{list(own[name].shape)}, {own[name].dtype} in the model"
            raise CheckpointError(
                f"{name}: is {list(shape)}, {dtype} in the file, got {have}; build the model that was saved"
            )


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[BinaryIO, container.Header]]:
    """The file and its header; whatever is wrong from here on is said with the file's name."""
    try:
        with Path(path).open("rb") as file:
            header = container.read_header(file)
            check_table(header)
            yield file, header
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path of the checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder; give the file inside it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_table(header: container.Header) -> None:
    """Aliases name tensors, and packed weights have a head that can be."""
    if not isinstance(header.about.get("metadata"), dict):
        raise CheckpointError("its table has no metadata")
    aliases = header.about.get("aliases")
    if (
        not isinstance(aliases, dict)
        or not set(aliases.values()) <= header.entries.keys()
        or set(aliases) & header.entries.keys()
    ):
        raise CheckpointError("its table ties weights that are not there")
    for name in header.entries:
        with named(name):
            head_of(header.entries[name])


@contextmanager
def named(name: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def head_of(entry: container.Entry) -> Head | None:
    """What the table says of a packed weight; None of a dense one."""
    note = entry.note.get("packed")
    if note is None:
        return None
    if entry.dtype != "U8" or len(entry.shape) != 1:
        raise CheckpointError(
            f"is packed in {entry.dtype} of {len(entry.shape)} axes, where only a row of bytes can be"
        )
    return packed.read_head(note)


def shape_of(entry: container.Entry) -> tuple[int, ...]:
    head = head_of(entry)
    return head.shape if head else entry.shape


def dtype_of(entry: container.Entry) -> torch.dtype:
    head = head_of(entry)
    return packed.DTYPES[head.dtype] if head else container.DTYPES[entry.dtype]


def _nbytes(entry: container.Entry) -> int:
    head = head_of(entry)
    return head.nbytes if head else entry.end - entry.begin


def read_tensor(file: BinaryIO, header: container.Header, name: str) -> Tensor:
    entry = header.entries[name]
    with named(name):
        expected = head_of(entry)
        if expected is None:
            return _dense(container.read_bytes(file, header, name), entry)
        return packed.unpack(container.read_bytes(file, header, name), expected)


def _dense(data: Bytes, entry: container.Entry) -> Tensor:
    if not len(data):
        return torch.empty(entry.shape, dtype=container.DTYPES[entry.dtype])
    return torch.from_numpy(data).view(container.DTYPES[entry.dtype]).reshape(entry.shape)
