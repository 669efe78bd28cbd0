"""``save_sparse`` and ``load_sparse``: a state dict as one small ``.safetensors`` file, and back, bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from pruning_core.checkpoint import CheckpointError, readable
from pruning_core.patterns import Block, NinM, Pattern, parse_pattern
from pruning_core.sparse_format import container, packed
from pruning_core.sparse_format.packed import CODECS
from pruning_core.sparse_format.reader import PackedReader, opened
from pruning_core.sparse_format.streams import Piece
from pruning_core.sparse_format.units import Blocks, Combinations, Flags, Units

VALUES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
AUTO = "auto"
BAR_FROM = 2**30


# ---- saving ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """Checked options of packing; ``pattern`` is None for "auto"."""

    codec: str
    values: str
    pattern: Pattern | None

    @classmethod
    def of(cls, codec: str, values: str, pattern: str) -> Packing:
        """Checks the options of ``save_sparse``; ValueError for an unknown one."""
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
    """Writes a model or state dict as one ``.safetensors`` file: weights with many zeros packed, others unchanged.

    - ``codec``: "entropy" (Huffman codes), or "raw": larger, faster.
    - ``values``: "bf16" or "fp16" round the kept values of wider weights, whose dtype stays; "fp32" rounds nothing.
    - ``pattern``: the pattern of all packed weights, such as "4x1"; "auto" finds the best one for each.
    - ``metadata``: strings that ``read_metadata`` returns.

    A floating-point tensor of two or more axes is packed where that saves a tenth of its bytes. Tied weights are stored
    once. The file is written atomically. A sharded, quantized or sparse tensor is a CheckpointError.

    >>> save_sparse(model, "model.sparse.safetensors")
    >>> state = load_sparse("model.sparse.safetensors")
    """
    packing = Packing.of(codec, values, pattern)
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    write_state(state, Path(path), packing, metadata)


def write_state(
    state: Mapping[str, Any], path: Path, packing: Packing, metadata: Mapping[str, str] | None = None
) -> None:
    """``save_sparse`` with checked options."""
    tensors, aliases = _tensors(state)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"metadata: names and values must be strings, got {key!r:.40}: {value!r:.40}; use json.dumps"
            )
    about = {"aliases": aliases, "metadata": dict(sorted((metadata or {}).items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryFile(dir=path.parent) as scratch,
        progress("packing", sum(tensor.nbytes for tensor in tensors.values())) as bar,
    ):
        rows = []
        for name, tensor in sorted(tensors.items()):
            rows.append(_row(name, tensor, packing, scratch))
            bar.update(tensor.nbytes)
        container.write(path, about, rows, scratch)


def _tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under the first of its names, and name -> first name for the other names of tied tensors."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        _check(name, value)
    for name, value in sorted(state.items()):
        value = value.detach().resolve_conj().resolve_neg()
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = value
    return tensors, aliases


def _check(name: str, value: Any) -> None:
    if not isinstance(name, str) or name == "__metadata__" or _surrogates(name):
        raise CheckpointError(f"state dict: names must be strings other than '__metadata__', got {name!r:.80}")
    if isinstance(value, DTensor):
        raise CheckpointError(f"{name}: is sharded over ranks; give get_model_state_dict(..., full_state_dict=True)")
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        raise CheckpointError(f"{name}: only plain tensors are exported, got {type(value).__name__}; leave it out")
    if value.is_meta or value.layout is not torch.strided or value.dtype not in container.NAMES:
        kind = "a meta tensor" if value.is_meta else f"{value.layout}, {value.dtype}"
        raise CheckpointError(f"{name}: cannot be exported, got {kind}; give a dense tensor of a plain dtype")
    with container.named(name):
        container.read_shape(tuple(value.shape))


def _surrogates(name: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def _row(name: str, tensor: Tensor, packing: Packing, scratch: BinaryIO) -> container.Row:
    tensor = tensor.cpu().contiguous()
    kept = packed.kept_of(tensor)
    if kept is not None:
        values, units = _values(name, tensor, packing), _units(name, kept, packing.pattern)
        done = packed.pack(tensor, kept, packing.codec, values, units)
        if done is not None:
            return container.scratch_row(name, done[1], {"packed": done[0].to_plain()}, scratch)
    return container.dense_row(name, tensor.dtype, tensor.shape, as_bytes(tensor))


def as_bytes(tensor: Tensor) -> Piece:
    """The memory of a tensor as bytes."""
    return packed.as_bits(tensor).reshape(-1).view(np.uint8).data


def _values(name: str, tensor: Tensor, packing: Packing) -> str:
    """The dtype of the stored values: the one asked for where it is narrower than the weight's, else the weight's."""
    asked = VALUES[packing.values]
    if packing.values == "fp32" or packed.DTYPES[asked].itemsize >= tensor.element_size():
        return packed.NAMES[tensor.dtype]
    if (tensor.to(packed.DTYPES[asked]).isinf() & tensor.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ValueError(f"values: {name} does not fit into {packing.values}, got {largest:g}; use bf16 or fp32")
    return asked


def _units(name: str, kept: Flags, pattern: Pattern | None) -> Units | None:
    """The units of a given pattern; axis 0 is taken for output channels, axis 1 for input channels."""
    shape = kept.shape
    if isinstance(pattern, Block):
        if pattern.in_channels is None:  # a whole filter
            return Blocks((1, *shape[1:]))
        if pattern.out_channels is None:
            return Blocks((shape[0], 1, *shape[2:]))
        sizes = min(pattern.out_channels, shape[0]), min(pattern.in_channels, shape[1])
        return Blocks(sizes + (1,) * (len(shape) - 2))
    if isinstance(pattern, NinM):
        units = Combinations.of(pattern.kept, pattern.of, axis=1)
        if not units.holds(kept):
            raise ValueError(f"pattern: {name} is not {pattern} along its input channels; leave pattern out to find it")
        return units
    return None


@contextmanager
def progress(what: str, nbytes: int) -> Iterator[tqdm[Any]]:
    """A progress bar for 1 GiB and more, on a terminal."""
    with tqdm(desc=what, total=nbytes, unit="B", unit_scale=True, disable=nbytes < BAR_FROM or None) as bar:
        yield bar


def _bar_of(what: str, reader: PackedReader) -> AbstractContextManager[tqdm[Any]]:
    return progress(what, sum(map(reader.nbytes, reader)))


# ---- loading --------------------------------------------------------------------------------------------------------


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """The state dict that ``save_sparse`` wrote, bit for bit, on the CPU; tied weights share one tensor.

    Values rounded by ``values="bf16"`` come back rounded. CheckpointError for a file that is damaged or not packed.
    """
    with opened(path) as reader, _bar_of("unpacking", reader) as bar:
        state = {}
        for name in reader:
            state[name] = reader.read(name)
            bar.update(reader.nbytes(name))
        return state | {name: state[first] for name, first in reader.aliases.items()}


def load_sparse_into(model: nn.Module, path: str | Path) -> None:
    """Fills ``model`` in place, one tensor at a time, so that the state dict is never in memory as a whole.

    CheckpointError unless names, shapes and dtypes are those of the model; CRC-32 sums are checked before anything is
    changed.
    """
    own = model.state_dict()
    with opened(path) as reader:
        _compare(own, reader)
        for name in reader:
            reader.check(name)
        places: dict[str, list[str]] = {name: [name] for name in reader}
        for name, first in reader.aliases.items():
            places[first].append(name)
        with torch.no_grad(), _bar_of("unpacking", reader) as bar:
            for name, targets in places.items():
                value = reader.read(name)
                for target in targets:
                    own[target].copy_(value)
                del value  # before the next one is made
                bar.update(reader.nbytes(name))


def write_dense(path: str | Path, out: str | Path) -> None:
    """Unpacks to an ordinary safetensors file, which holds tied weights under each of their names."""
    with opened(path) as reader:
        names = {name: name for name in reader} | reader.aliases
        reader.check_size(sum(reader.nbytes(first) for first in reader.aliases.values()))
        kinds = {name: reader.kind(first) for name, first in names.items()}
        container.write_plain(Path(out), kinds, lambda name: as_bytes(reader.read(names[name])))


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an ordinary safetensors file; CheckpointError where it cannot be read."""
    try:
        with readable(path):
            return dict(safetensors.torch.load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The ``metadata`` that ``save_sparse`` was given."""
    with opened(path) as reader:
        return reader.metadata


def _compare(own: Mapping[str, Tensor], reader: PackedReader) -> None:
    saved = {name: reader.kind(name) for name in reader}
    saved |= {name: saved[first] for name, first in reader.aliases.items()}
    for name in (*own, *saved):
        if name not in saved or name not in own:
            where = "the file" if name not in saved else "the model"
            raise CheckpointError(f"{name}: is not in {where}; build the model that was saved")
        mine, (dtype, shape) = own[name], saved[name]
        if mine.is_meta or isinstance(mine, DTensor):
            kind = "on the meta device" if mine.is_meta else "sharded over ranks"
            raise CheckpointError(f"{name}: cannot be filled in place, got a tensor {kind}; use load_sparse")
        if tuple(mine.shape) != shape or mine.dtype is not dtype:
            have = f"{list(mine.shape)}, {mine.dtype} in the model"
            raise CheckpointError(
                f"{name}: is {list(shape)}, {dtype} in the file, got {have}; build the model that was saved"
            )
