"""``save_sparse`` and ``load_sparse``: bit for bit, small, deterministic, and never fooled by a damaged file."""

from __future__ import annotations

import json
import math
import random
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pruning_core import CheckpointError, checkpoint
from pruning_core.sparse_format import container, load_sparse, load_sparse_into, packed, read_metadata, save_sparse
from pruning_core.sparse_format import sparse_file as module
from pruning_core.sparse_format.bound import bound_bytes
from pruning_core.sparse_format.reader import opened
from pruning_core.sparse_format.units import Blocks, Combinations

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype is other[n].dtype and one[n].shape == other[n].shape and torch.equal(bits(one[n]), bits(other[n]))
        for n in one
    )


def pruned(shape: tuple[int, ...], block: tuple[int, ...], share: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights with zeros in whole blocks; positive zeros, as the masks of this package leave them."""
    alive = torch.rand([-(-length // extent) for length, extent in zip(shape, block, strict=True)]) >= share
    for axis, extent in enumerate(block):
        alive = alive.repeat_interleave(extent, axis).narrow(axis, 0, shape[axis])
    return torch.where(alive, torch.randn(shape) * 0.05, 0.0).to(dtype)


def two_of_four(shape: tuple[int, ...]) -> Tensor:
    groups = torch.randn(shape).unflatten(1, (-1, 4))
    return groups.scatter(2, groups.abs().topk(2, dim=2, largest=False).indices, 0.0).flatten(1, 2)


def head_of(path: Path, name: str) -> packed.Head | None:
    with opened(path) as reader:
        return reader.heads[name]


# ---- what comes back ------------------------------------------------------------------------------------------------

STATES = {
    "single": lambda: {"w": pruned((64, 96), (1, 1), 0.9)},
    "blocks": lambda: {"w": pruned((66, 50), (4, 1), 0.8)},
    "rows": lambda: {"w": pruned((64, 48), (1, 48), 0.5)},
    "columns": lambda: {"w": pruned((64, 48), (64, 1), 0.5)},
    "2:4": lambda: {"w": two_of_four((32, 64))},
    "convolution": lambda: {"w": pruned((24, 16, 3, 3), (4, 1, 1, 1), 0.7)},
    "filters": lambda: {"w": pruned((24, 16, 3, 3), (1, 16, 3, 3), 0.7)},
    "fp16": lambda: {"w": pruned((64, 64), (1, 1), 0.7, torch.float16)},
    "bf16": lambda: {"w": pruned((64, 64), (4, 1), 0.7, torch.bfloat16)},
    "fp64": lambda: {"w": pruned((64, 64), (1, 1), 0.7, torch.float64)},
    "all zero": lambda: {"w": torch.zeros(40, 40)},
    "none zero": lambda: {"w": torch.randn(40, 40)},
    "others": lambda: {
        "int": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "complex": torch.randn(3, dtype=torch.complex64),
        "fp8": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "u16": torch.tensor([65535], dtype=torch.uint16),
        "w": pruned((64, 64), (1, 1), 0.9),
        "": torch.randn(3),
        'a "name"\n\u00fc': torch.randn(3),
    },
    "nothing": dict,
}


@pytest.mark.parametrize("codec", ["raw", "entropy"])
@pytest.mark.parametrize("name", STATES)
def test_round_trip(tmp_path, name, codec):
    state = STATES[name]()
    save_sparse(state, tmp_path / "a.safetensors", codec=codec)
    assert same(load_sparse(tmp_path / "a.safetensors"), state)


SPECIAL = {
    torch.float32: [0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFA5A5A5, 0x7F7FFFFF],
    torch.float16: [0x8000, 0x0001, 0x83FF, 0x7C00, 0xFC00, 0x7E01, 0xFDA5, 0x7BFF],
    torch.bfloat16: [0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFFA5, 0x7F7F],
    torch.float64: [1 << 63, 1, 0x7FF8000000000123, 0xFFF0000000000000, 0x800FFFFFFFFFFFFF, 0x3FF0000000000000],
}


@settings(max_examples=150)
@given(data=st.data())
def test_any_bits_come_back(tmp_path_factory, data):
    """Negative zeros, denormals, infinities, payloads of NaN; any shape; zeros in blocks, in N:M or anywhere."""
    dtype = data.draw(st.sampled_from(list(SPECIAL)))
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    size = torch.empty((), dtype=dtype).element_size()
    values = generator.integers(0, 256, (math.prod(shape), size), dtype=np.uint8).view(f"<u{size}").reshape(shape)
    special = np.array(SPECIAL[dtype], dtype=values.dtype)
    values = np.where(
        generator.random(shape) < data.draw(st.sampled_from([0, 0.3])), generator.choice(special, shape), values
    )
    block = [data.draw(st.integers(1, length)) for length in shape]
    zero = generator.random([-(-n // b) for n, b in zip(shape, block, strict=True)]) < data.draw(st.floats(0, 1))
    for axis, extent in enumerate(block):
        zero = np.repeat(zero, extent, axis).take(range(shape[axis]), axis)
    values[zero] = 0
    weight = torch.from_numpy(values.view(f"<i{size}")).view(dtype)
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    save_sparse({"w": weight}, path, codec=data.draw(st.sampled_from(packed.CODECS)))
    assert same(load_sparse(path), {"w": weight})


@pytest.mark.parametrize("codec", ["raw", "entropy"])
def test_zeros_of_a_product_with_a_mask_keep_their_sign_for_a_bit(tmp_path, codec):
    """``weight * mask`` leaves negative zeros: they come back, and cost a bit and not a value."""
    weight = pruned((256, 256), (1, 1), 0.0)
    weight = weight * (torch.rand(256, 256) < 0.1)
    assert int((bits(weight) == -(2**31)).sum()) > 20_000
    save_sparse({"w": weight}, tmp_path / "a.safetensors", codec=codec)
    assert same(load_sparse(tmp_path / "a.safetensors"), {"w": weight})
    head = head_of(tmp_path / "a.safetensors", "w")
    assert head is not None and head.stored == int((weight != 0).sum())
    assert {name: length for name, _, length in head.streams}["signs"] <= (weight.numel() - head.stored) / 8 + 1


def test_ordinary_readers_see_a_safetensors_file(tmp_path):
    """Dense tensors as they are, aligned; packed weights as rows of bytes, which no layer takes for its weight."""
    state = {
        "w": pruned((64, 64), (1, 1), 0.9),
        "b": torch.randn(3),
        "h": torch.randn(3).half(),
        "flag": torch.ones(1) > 0,
    }
    save_sparse(state, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(state)
        assert all(torch.equal(file.get_tensor(name), state[name]) for name in ("b", "h", "flag"))
        assert file.get_tensor("w").dtype is torch.uint8 and file.get_tensor("w").dim() == 1
        assert torch.equal(packed.unpack(file.get_tensor("w").numpy()), state["w"])
        table = json.loads(file.metadata()["pruning_core"])
    assert table["version"] == 1
    assert table["tensors"]["w"]["packed"] | {"crc32": 0, "streams": []} == {
        "dtype": "F32",
        "shape": [64, 64],
        "units": {"blocks": [1, 1]},
        "values": "F32",
        "stored": int(state["w"].count_nonzero()),
        "zeros": int((state["w"] == 0).sum()),
        "streams": [],
        "crc32": 0,
    }


def test_the_same_state_gives_the_same_bytes(tmp_path):
    state = {"b": torch.randn(3), "w": pruned((64, 64), (4, 1), 0.9), "a": torch.randn(2).half()}
    for i, names in enumerate((list(state), sorted(state), list(reversed(state)))):
        again = {name: state[name].clone() for name in names}
        again = {"tied": again["w"], **again} if i else {**again, "tied": again["w"]}
        about = {"x": "1", "y": "2"} if i else {"y": "2", "x": "1"}
        save_sparse(again, tmp_path / f"{i}.safetensors", metadata=about)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(3)}) == 1


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50, bias=False))
    model[1].weight = model[0].weight
    save_sparse(model, tmp_path / "a.safetensors")
    state = load_sparse(tmp_path / "a.safetensors")
    assert same(state, model.state_dict()) and state["0.weight"] is state["1.weight"]
    assert (tmp_path / "a.safetensors").stat().st_size < 1.3 * model[0].weight.nbytes
    other = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50, bias=False))
    load_sparse_into(other, tmp_path / "a.safetensors")
    assert same(other.state_dict(), model.state_dict())


def test_views_are_not_tied(tmp_path):
    whole = pruned((64, 64), (1, 1), 0.9)
    state = {"whole": whole, "part": whole[:32], "turned": whole.T}
    save_sparse(state, tmp_path / "a.safetensors")
    assert same(load_sparse(tmp_path / "a.safetensors"), state)


def test_a_conjugate_is_another_tensor(tmp_path):
    z = torch.randn(3, dtype=torch.complex64)
    state = {"a": z, "b": z.conj(), "c": z.imag, "d": z.conj().imag}
    save_sparse(state, tmp_path / "a.safetensors")
    loaded = load_sparse(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("pattern", ["auto", "4x1"])
def test_denormals_where_torch_flushes_them(tmp_path, pattern):
    weight = torch.zeros(64, 64)
    weight[:8, :16] = 1e-40
    weight[0, 0] = 1.0
    assert torch.set_flush_denormal(True)
    try:
        save_sparse({"w": weight}, tmp_path / "a.safetensors", pattern=pattern)
        loaded = load_sparse(tmp_path / "a.safetensors")
    finally:
        torch.set_flush_denormal(False)
    assert same(loaded, {"w": weight}) and loaded["w"].count_nonzero() == 128


def test_damage_is_found_before_the_model_is_changed(tmp_path):
    model, other = (nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)) for _ in range(2))
    model[1].weight.data *= torch.rand(40, 40) < 0.2
    path = tmp_path / "a.safetensors"
    save_sparse(model, path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r": 1\.weight: its bytes were changed since they were written"):
        load_sparse_into(other, path)
    assert same(other.state_dict(), before)


def test_a_model_without_memory(tmp_path):
    save_sparse(nn.Linear(4, 4), tmp_path / "a.safetensors")
    expected = r": weight: cannot be filled in place, got a tensor on the meta device; use load_sparse$"
    with pytest.raises(CheckpointError, match=expected):
        load_sparse_into(nn.Linear(4, 4, device="meta"), tmp_path / "a.safetensors")


def test_into_a_model(tmp_path):
    model, other = (
        nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40)),
        nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40)),
    )
    model[0].weight.data *= torch.rand(40, 40) < 0.2
    save_sparse(model, tmp_path / "a.safetensors")
    places = [parameter.data_ptr() for parameter in other.parameters()]
    load_sparse_into(other, tmp_path / "a.safetensors")
    assert same(other.state_dict(), model.state_dict())
    assert places == [parameter.data_ptr() for parameter in other.parameters()]


def test_metadata(tmp_path):
    save_sparse({}, tmp_path / "a.safetensors", metadata={"names": '["cat"]'})
    assert read_metadata(tmp_path / "a.safetensors") == {"names": '["cat"]'}
    expected = r"^metadata: names and values must be strings, got 'epoch': 3; use json\.dumps$"
    with pytest.raises(ValueError, match=expected):
        save_sparse({}, tmp_path / "a.safetensors", metadata={"epoch": 3})


def test_options_are_for_what_is_packed(tmp_path):
    """A padding row of an embedding is no reason to refuse a pattern, nor a large dense weight one to refuse fp16."""
    state = {"w": two_of_four((32, 64)), "embedding": torch.randn(50, 32), "large": torch.full((8, 8), 1e6)}
    state["embedding"][0] = 0
    save_sparse(state, tmp_path / "a.safetensors", pattern="2:4", values="fp16")
    assert same(load_sparse(tmp_path / "a.safetensors"), {**state, "w": state["w"].half().float()})


# ---- units and codecs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (lambda: pruned((64, 96), (1, 1), 0.9), "1x1"),
        (lambda: pruned((64, 96), (4, 1), 0.9), "4x1"),
        (lambda: pruned((96, 64), (1, 4), 0.9), "1x4"),
        (lambda: pruned((96, 96), (6, 2), 0.9), "6x2"),
        (lambda: pruned((2000, 700), (8, 1), 0.9), "8x1"),
        (lambda: pruned((70, 600), (1, 600), 0.5), "1x600"),
        (lambda: pruned((70, 600), (70, 1), 0.5), "70x1"),
        (lambda: pruned((700, 600), (700, 1), 0.5), "700x1"),
        (lambda: pruned((64, 32, 3, 3), (4, 1, 1, 1), 0.9), "4x1x1x1"),
        (lambda: pruned((64, 32, 3, 3), (1, 32, 3, 3), 0.5), "1x32x3x3"),
        (lambda: pruned((64, 32, 3, 3), (64, 1, 3, 3), 0.5), "64x1x3x3"),
        (lambda: two_of_four((64, 64)), "2:4 along 1"),
        (lambda: two_of_four((64, 64)).T.clone(memory_format=torch.contiguous_format), "2:4 along 0"),
        (lambda: two_of_four((16, 16, 3, 3)), "2:4 along 1"),
        (lambda: torch.zeros(64, 64), "64x64"),
    ],
)
def test_the_units_are_found(tmp_path, weight, expected):
    save_sparse({"w": weight()}, tmp_path / "a.safetensors")
    head = head_of(tmp_path / "a.safetensors", "w")
    assert head is not None and str(head.units) == expected


@pytest.mark.parametrize(
    ("pattern", "shape", "expected"),
    [
        ("4x1", (64, 64), "4x1"),
        ("4x1", (64, 16, 3, 3), "4x1x1x1"),
        ("8x2", (4, 64), "4x2"),
        ("1xchannel", (64, 16, 3, 3), "1x16x3x3"),
        ("channelx1", (64, 16, 3, 3), "64x1x3x3"),
    ],
)
def test_a_pattern_that_is_given(tmp_path, pattern, shape, expected):
    weight = pruned(shape, shape, 0.0)
    weight[:, : shape[1] * 3 // 4] = 0
    save_sparse({"w": weight}, tmp_path / "a.safetensors", pattern=pattern)
    head = head_of(tmp_path / "a.safetensors", "w")
    assert head is not None and str(head.units) == expected
    assert same(load_sparse(tmp_path / "a.safetensors"), {"w": weight})


def slow_mask(units: Blocks | Combinations, kept: np.ndarray) -> np.ndarray:
    """Unit by unit, weight by weight."""
    stored = np.zeros_like(kept)
    if isinstance(units, Blocks):
        for index in np.ndindex(*[-(-n // e) for n, e in zip(kept.shape, units.extents, strict=True)]):
            box = tuple(slice(i * e, (i + 1) * e) for i, e in zip(index, units.extents, strict=True))
            stored[box] = kept[box].any()
        return stored
    for index in np.ndindex(*[n // units.m if i == units.axis else n for i, n in enumerate(kept.shape)]):
        group = tuple(slice(i * units.m, (i + 1) * units.m) if a == units.axis else i for a, i in enumerate(index))
        chosen = np.flatnonzero(kept[group])
        spare = [i for i in range(units.m) if i not in chosen]
        stored[group][[*chosen, *spare[: units.n - len(chosen)]]] = True
    return stored


@settings(max_examples=100)
@given(data=st.data())
def test_masks_against_a_slow_reference(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kept = generator.random(shape) < data.draw(st.floats(0, 1))
    extents = tuple(data.draw(st.integers(1, length)) for length in shape)
    units: Blocks | Combinations = Blocks(extents)
    if data.draw(st.booleans()):
        axis, m = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(2, 8))
        shape = tuple(m * length if i == axis else length for i, length in enumerate(shape))
        kept = generator.random(shape) < 0.3
        n = max(int(np.moveaxis(kept, axis, -1).reshape(-1, m).sum(-1).max()), 1)
        if n == m:
            return
        units = Combinations(n, m, axis)
        assert units.holds(kept) and (n == 1 or not Combinations(n - 1, m, axis).holds(kept))
    stored = units.stored(kept)
    assert (stored >= kept).all() and (isinstance(units, Blocks) or stored.sum() == kept.size // units.m * units.n)
    if isinstance(units, Blocks) or (np.moveaxis(kept, units.axis, -1).reshape(-1, units.m).sum(-1) == units.n).all():
        np.testing.assert_array_equal(stored, slow_mask(units, kept))
    data_bytes = units.encode(kept)
    assert len(data_bytes) == units.length(shape)
    np.testing.assert_array_equal(units.decode(data_bytes, shape), stored)


def test_golden_bytes():
    """What version 1 means: a file that was written once is read for ever."""
    weight = torch.zeros(8, 16)
    weight[0:4, 3], weight[4, 7] = torch.tensor([1.0, -2.0, 0.5, 0.0]), 3.0
    kept = packed.kept_of(weight)
    assert kept is not None
    done = packed.pack(weight, kept, "raw", "F32", Blocks((4, 1)))
    assert done is not None
    row = b"".join(bytes(piece) for piece in done[1])
    head = {
        "dtype": "F32",
        "shape": [8, 16],
        "units": {"blocks": [4, 1]},
        "values": "F32",
        "stored": 8,
        "zeros": 124,
        "streams": [["mask", "plain", 4], ["values", "plain", 32]],
    }
    mask = bytes([0b0000_1000, 0, 0b1000_0000, 0])
    body = mask + struct.pack("<8f", 1.0, -2.0, 0.5, 0.0, 3.0, 0, 0, 0)
    text = json.dumps({**head, "crc32": zlib.crc32(body)}, separators=(",", ":")).encode()
    assert row == b"PCsp" + struct.pack("<II", len(text), zlib.crc32(text)) + text + body
    # 2:4: the six choices in order, three to a byte; exponents are the top byte after a turn to the left.
    assert bytes(
        Combinations(2, 4, 1).encode(np.array([[1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0]], dtype=bool))
    ) == bytes([0 + 6 * 5 + 36 * 4, 1])
    from pruning_core.sparse_format.streams import split

    exponents, rest = split(np.array([0xBF800001], dtype=np.uint32))
    assert (exponents.tolist(), rest.tolist()) == ([0x7F], [0x03, 0x00, 0x00])


# ---- size, memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), "2:4"])
def test_at_most_three_percent_above_the_bound(tmp_path, block, share):
    weight = two_of_four((768, 768)) if block == "2:4" else pruned((768, 768), block, share)
    save_sparse({"w": weight}, tmp_path / "a.safetensors")
    head = head_of(tmp_path / "a.safetensors", "w")
    assert head is not None
    assert 1 <= (tmp_path / "a.safetensors").stat().st_size / bound_bytes(weight, head.units, "F32") < 1.03


def test_the_bound_by_hand():
    weight = torch.zeros(4, 4)
    weight[0], weight[1] = torch.tensor([1.0, 1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 2.0, 4.0])
    # Eight of sixteen single weights: a bit each. Exponents in the shares 1/2, 1/4, 1/4: 1.5 bits, and 24 of the rest.
    assert bound_bytes(weight, Blocks((1, 1)), "F32") * 8 == pytest.approx(16 + 8 * 25.5)
    # Two of four rows: a bit each.
    assert bound_bytes(weight, Blocks((1, 4)), "F32") * 8 == pytest.approx(4 + 8 * 25.5)
    assert bound_bytes(weight.bfloat16(), Blocks((1, 1)), "BF16") * 8 == pytest.approx(16 + 8 * 9.5)
    assert bound_bytes(weight.half(), Blocks((1, 1)), "F16") * 8 == pytest.approx(16 + 8 * 12.5)
    two = (two_of_four((4, 8)) != 0).float()  # eight groups of one of six choices; one exponent alone
    assert bound_bytes(two, Combinations(2, 4, 1), "F32") * 8 == pytest.approx(8 * math.log2(6) + 16 * 24)


@pytest.mark.parametrize("codec", ["raw", "entropy"])
def test_memory_beside_the_largest_tensor(tmp_path, codec):
    """NumPy's arrays, the weight that comes out among them; several tensors cost no more than one."""
    state = {str(i): pruned((1024, 1024), (1, 1), 0.5) for i in range(4)}
    model = nn.ParameterDict({name: nn.Parameter(torch.empty_like(value)) for name, value in state.items()})
    path = tmp_path / "a.safetensors"
    assert _peak(lambda: save_sparse(state, path, codec=codec)) < 2 * state["0"].nbytes
    assert _peak(lambda: load_sparse_into(model, path)) < 2 * state["0"].nbytes


def _peak(run):
    """Bytes, the lower of two runs: a thread that another test left behind is counted as well."""
    peaks = []
    for _ in range(2):
        tracemalloc.start()
        try:
            run()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)


def test_a_bar_for_big_models(tmp_path, monkeypatch, capsys):
    """Where somebody looks; small ones are done before it could be read."""
    state = {"w": pruned((64, 64), (1, 1), 0.9), "b": torch.randn(9)}
    save_sparse(state, tmp_path / "a.safetensors")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "BAR_FROM", 0)
    save_sparse(state, tmp_path / "a.safetensors")
    assert capsys.readouterr().err == ""  # a file or a pipe
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    save_sparse(state, tmp_path / "a.safetensors")
    load_sparse(tmp_path / "a.safetensors")
    err = capsys.readouterr().err
    assert "packing: 100%" in err and "unpacking: 100%" in err


# ---- narrower values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rounded_values(tmp_path, values, dtype):
    state = {"w": pruned((64, 64), (1, 1), 0.8), "dense": torch.randn(64, 64), "b": torch.randn(9)}
    state["w"][0, 0] = 1e-30
    state["h"] = pruned((64, 64), (1, 1), 0.8, torch.float16)
    save_sparse(state, tmp_path / "a.safetensors", values=values)
    assert same(load_sparse(tmp_path / "a.safetensors"), {**state, "w": state["w"].to(dtype).float()})
    save_sparse(state, tmp_path / "b.safetensors")
    assert same(load_sparse(tmp_path / "b.safetensors"), state)
    assert (tmp_path / "a.safetensors").stat().st_size < (tmp_path / "b.safetensors").stat().st_size


def test_values_that_do_not_fit(tmp_path):
    weight = pruned((64, 64), (1, 1), 0.8)
    weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"^values: w does not fit into fp16, got 100000; use bf16 or fp32$"):
        save_sparse({"w": weight}, tmp_path / "a.safetensors", values="fp16")
    weight[0, 0] = torch.inf
    save_sparse({"w": weight}, tmp_path / "a.safetensors", values="fp16")
    assert load_sparse(tmp_path / "a.safetensors")["w"][0, 0] == torch.inf


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "zip"}, r"^codec: is unknown, got 'zip'; use one of raw, entropy$"),
        ({"values": "int8"}, r"^values: is unknown, got 'int8'; use one of fp32, bf16, fp16$"),
        ({"pattern": "4y1"}, r"^unknown pattern, got '4y1'; "),
        ({"pattern": "2:4"}, r"^pattern: w is not 2:4 along its input channels; leave pattern out to find it$"),
        ({"pattern": "8:16"}, r"^pattern: groups of more than 8 have no code of their own, got 8:16; leave it out$"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save_sparse({"w": pruned((64, 64), (1, 1), 0.3)}, tmp_path / "a.safetensors", **options)
    assert not list(tmp_path.iterdir())


class Wrapped(Tensor):
    """What is in a subclass is its own affair."""


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": 3}, r"^a: only plain tensors are exported, got int; leave it out$"),
        ({"a": Wrapped(torch.ones(2))}, r"^a: only plain tensors are exported, got Wrapped; leave it out$"),
        ({"\ud800": torch.ones(2)}, r"^state dict: names must be strings other than '__metadata__', got '\\ud800'$"),
        ({"a": torch.ones([1] * 65)}, r"^a: has a shape that cannot be, got \[1, 1, "),
        ({3: torch.ones(2)}, r"^state dict: names must be strings other than '__metadata__', got 3$"),
        ({"__metadata__": torch.ones(2)}, r"names must be strings other than"),
        ({"a": torch.ones(2, device="meta")}, r"^a: cannot be exported, got a meta tensor; give a dense tensor"),
        ({"a": torch.eye(3).to_sparse()}, r"^a: cannot be exported, got torch.sparse_coo, torch.float32; give"),
        (
            {"a": torch.ones(2, dtype=torch.complex128)},
            r"^a: cannot be exported, got torch.strided, torch.complex128; ",
        ),
    ],
)
def test_states_that_are_refused(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        save_sparse(state, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_sparse({"w": torch.ones(3)}, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for place, name in ((container.shutil, "copyfileobj"), (checkpoint.os, "fsync")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(place, name, full)
            save_sparse({"w": pruned((64, 64), (1, 1), 0.9)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors: no such file; check the path of the checkpoint$"):
        load_sparse(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r": is a folder; give the file inside it$"):
        load_sparse(tmp_path)


def test_an_ordinary_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors", {"format": "pt"})
    expected = r"a\.safetensors: has no table of pruning_core; an ordinary safetensors file is read by safetensors$"
    with pytest.raises(CheckpointError, match=expected):
        load_sparse(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), r": 1\.weight: is not in the file; build the model"),
        (lambda: nn.Sequential(nn.Linear(8, 8, bias=False)), r": 0\.bias: is not in the model; build the model"),
        (
            lambda: nn.Sequential(nn.Linear(9, 8)),
            r": 0\.weight: is \[8, 8\], torch\.float32 in the file, got \[8, 9\], torch\.float32 in the model; build",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8)).half(), r"got \[8, 8\], torch\.float16 in the model; build"),
    ],
)
def test_a_model_that_does_not_match(tmp_path, model, message):
    save_sparse(nn.Sequential(nn.Linear(8, 8)), tmp_path / "a.safetensors")
    other = model()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_sparse_into(other, tmp_path / "a.safetensors")
    assert same(other.state_dict(), before)


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> tuple[Path, dict[str, Tensor]]:
    state = {
        "one": pruned((24, 32), (1, 1), 0.8),
        "block": pruned((32, 24), (4, 1), 0.7),
        "two": two_of_four((16, 32)),
        "signed": pruned((24, 24), (1, 1), 0.0) * (torch.rand(24, 24) < 0.3),
        "dense": torch.randn(20),
        "other": torch.randn(20),
        "count": torch.tensor(3),
    }
    state["tied"] = state["dense"]
    save_sparse(state, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", state


def outcome(path: Path, raw: bytes, state: dict[str, Tensor]) -> str:
    """Refused with one line, or every bit as it was."""
    path.write_bytes(raw)
    try:
        loaded = load_sparse(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return "refused"
    assert same(loaded, state)
    return "same"


def test_every_byte_of_the_file_counts(file):
    """A flipped bit anywhere is found: length, header, table, mask, exponents, mantissas, signs, dense weights."""
    path, state = file
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    generator = random.Random(0)
    places = [*range(start), *generator.sample(range(start, len(raw)), 1200)]
    outcomes = []
    for place in places:
        changed = bytearray(raw)
        changed[place] ^= 1 << generator.randrange(8)
        outcomes.append(outcome(path, bytes(changed), state))
    assert len(outcomes) > 2000 and set(outcomes[start:]) == {"refused"}
    # In the header what is left of a flip is a space between words of JSON.
    assert outcomes[:start].count("same") <= 4


def test_other_mutations(file):
    """Bytes replaced, cut out, doubled, swapped; the file cut short at every length."""
    path, state = file
    raw = path.read_bytes()
    generator = random.Random(1)
    for _ in range(1000):
        first, last = sorted(generator.sample(range(len(raw)), 2))
        last = min(last, first + generator.choice((1, 2, 8, 200)))
        part = raw[first:last]
        other = generator.choice((b"", generator.randbytes(len(part)), part + part, part[::-1], b"\0" * len(part)))
        outcome(path, raw[:first] + other + raw[last:], state)
    for length in range(0, len(raw), 37):
        assert outcome(path, raw[:length], state) == "refused"
    assert outcome(path, raw + b"\0", state) == "refused"


# Files whose digests are right and whose claims are not: written by somebody, not damaged by a disk.


def rewritten(path: Path, change, *, data=None) -> None:
    """The file with ``change(header, table)`` made to its header, and digests that fit."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    body = raw[8 + length :] if data is None else data
    metadata = header.pop("__metadata__")
    table = json.loads(metadata["pruning_core"])
    change(header, table)
    text = json.dumps(table)
    metadata = {**metadata, "pruning_core": text, "pruning_core_crc32": f"{zlib.crc32(text.encode()):08x}"}
    new = json.dumps({"__metadata__": metadata, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + body)


def swap(header: dict, table: dict) -> None:
    header["dense"]["data_offsets"], header["other"]["data_offsets"] = (
        header["other"]["data_offsets"],
        header["dense"]["data_offsets"],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: t.update(version=2), r"is of version 2, this pruning_core reads 1; update it"),
        (lambda h, t: t.pop("tensors"), r"its table names no tensors"),
        (lambda h, t: t["tensors"].pop("dense"), r"its table and its header name different tensors, got 'dense'"),
        (lambda h, t: h.pop("dense"), r"its table and its header name different tensors, got 'dense'"),
        (lambda h, t: t.update(aliases={"tied": "nobody"}), r"its table ties weights that are not there"),
        (lambda h, t: t.update(aliases={"dense": "other"}), r"its table ties weights that are not there"),
        (lambda h, t: t.pop("aliases"), r"its table ties weights that are not there"),
        (lambda h, t: t.pop("metadata"), r"its table has no metadata"),
        (swap, r"(dense|other): its bytes were changed since they were written \(CRC-32 differs\)"),
        (lambda h, t: h["dense"].update(dtype="I32"), r"dense: its entry in the header cannot be"),
        (
            lambda h, t: (h["dense"].update(shape=[2**60]), t["tensors"]["dense"].update(shape=[2**60])),
            r"dense: has a shape that cannot be",
        ),
        (lambda h, t: h["dense"].update(data_offsets=[0, 80]), r"(begins at byte|cannot be)"),
        (lambda h, t: t["tensors"]["one"]["packed"].update(shape=[2**20, 2**20]), r"one: (has|would|names)"),
        (lambda h, t: t["tensors"]["one"]["packed"].update(shape=[2**60, 2**60]), r"one: has a shape that cannot be"),
        (lambda h, t: t["tensors"]["one"]["packed"].update(shape=[-1, -768]), r"one: has a shape that cannot be"),
        (
            lambda h, t: t["tensors"]["one"]["packed"].update(stored=5),
            r"one: has 768 weights, which cannot be 5 stored",
        ),
        (lambda h, t: t["tensors"]["one"]["packed"].update(zeros=9**9), r"one: has 768 weights, which cannot be"),
        (lambda h, t: t["tensors"]["one"]["packed"].update(dtype="F8"), r"one: has a head of another kind"),
        (lambda h, t: t["tensors"]["one"]["packed"].update(values="F64"), r"one: (stores F64 values of a F32|has a)"),
        (lambda h, t: t["tensors"]["one"]["packed"].update(more=1), r"one: has a head of another kind"),
        (lambda h, t: t["tensors"]["one"]["packed"].update(units={"blocks": [1]}), r"one: names units that do not fit"),
        (lambda h, t: t["tensors"]["one"]["packed"].update(units={"blocks": [0, 1]}), r"one: names units that do not"),
        (lambda h, t: t["tensors"]["two"]["packed"].update(units={"choices": [2, 5], "axis": 1}), r"two: names units"),
        (lambda h, t: t["tensors"]["two"]["packed"].update(units={"choices": [2, 4], "axis": 7}), r"two: names units"),
        (
            lambda h, t: t["tensors"]["one"]["packed"].update(units={"blocks": [2, 1]}),
            r"one: (has a mask|has a head that)",
        ),
        (lambda h, t: t["tensors"]["one"]["packed"].update(streams=[]), r"one: has streams of another kind"),
        (
            lambda h, t: t["tensors"]["one"]["packed"].update(streams=[["mask", "zip", 1]]),
            r"one: has a stream of another",
        ),
        (
            lambda h, t: t["tensors"]["one"]["packed"].update(crc32=7),
            r"one: has a head that differs from what the table",
        ),
    ],
)
def test_claims_that_cannot_be(file, change, message):
    path, _ = file
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_sparse(path)


@pytest.mark.parametrize(
    "shape",
    [
        [0, 10**30],
        [0, 2**47, 2**47],
        [0, 2**62, 2**62],
        [1] * 65,
        [10**4299],
        [2**47] * 5000,
        [True],
        [1.0],
        ["1"],
        [None],
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_shapes_that_cannot_be(file, kind, shape):
    path, _ = file

    def change(header: dict, table: dict) -> None:
        if kind == "dense":
            header["dense"]["shape"] = table["tensors"]["dense"]["shape"] = shape
        else:
            table["tensors"]["one"]["packed"]["shape"] = shape

    rewritten(path, change)
    with pytest.raises(
        CheckpointError, match=r"(dense|one): (has a shape that cannot be|its entry|has a head|names units)"
    ):
        load_sparse(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda h, t: t.update(aliases={"a": ["dense"]}),
        lambda h, t: t.update(aliases={"__metadata__": "dense"}),
        lambda h, t: t.update(aliases=[]),
        lambda h, t: t.update(metadata={"a": 3}),
        lambda h, t: t["tensors"]["one"].update(packed=[]),
        lambda h, t: t["tensors"]["dense"].update(packed=t["tensors"]["one"]["packed"]),
        lambda h, t: h["dense"].update(data_offsets=[10**4000, 10**4000 + 80]),
        lambda h, t: h["dense"].update(data_offsets=[-80, 0]),
    ],
)
def test_other_claims_that_cannot_be(file, change):
    path, _ = file
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=r"^.*a\.safetensors: "):
        load_sparse(path)


def test_a_table_that_is_no_text(file):
    path, _ = file
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    text = "\ud800"
    check = f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"
    header["__metadata__"] |= {"pruning_core": text, "pruning_core_crc32": check}
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"its header is not JSON"):
        load_sparse(path)


def test_many_names_take_no_longer_than_they_are(tmp_path):
    """Twice the last of 200,000 names: looking for each among all would take an hour."""
    names = ",".join(f'"{i}":0' for i in range(200_000)) + ',"199999":0'
    header = ("{" + names + "}").encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"'199999' stands there twice"):
        load_sparse(path)


def test_tied_names_are_no_bomb_either(tmp_path):
    """As tensors they share their memory; as an ordinary file they would not."""
    state = {f"tied{i}": value for value in [torch.randn(2**18)] for i in range(70)}
    path = tmp_path / "a.safetensors"
    save_sparse(state, path)
    assert len(load_sparse(path)) == 70
    module.write_dense(path, tmp_path / "b.safetensors")
    aliases = {f"more{i}": "tied0" for i in range(70_000)}
    rewritten(path, lambda h, t: t.update(aliases=aliases))
    assert len(load_sparse(path)) == 70_001
    with pytest.raises(CheckpointError, match=r"would become 73,[\d,]+ bytes, got 1,048,576 that are stored"):
        module.write_dense(path, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_a_duplicate_name(file):
    path, _ = file
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + length].rstrip()
    new = header[:-1] + b',"count":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"its header is not JSON \('count' stands there twice\)"):
        load_sparse(path)


def test_a_header_that_would_be_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "LONGEST_HEADER", 100)
    with pytest.raises(
        CheckpointError, match=r"^needs a header of \d+ bytes, which safetensors cannot read; save it in parts$"
    ):
        save_sparse({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_no_memory(file, monkeypatch):
    def none(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(packed, "unpack", none)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: needs more memory than there is$"):
        load_sparse(file[0])


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 0])
def test_a_header_of_any_declared_length(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    with pytest.raises(CheckpointError, match=r"is not a whole safetensors file: 208 bytes, with a header of "):
        load_sparse(path)


def hostile(head: dict, body: bytes) -> np.ndarray:
    """A packed weight with digests that fit whatever the head says."""
    text = json.dumps({**head, "crc32": zlib.crc32(body)}).encode()
    return np.frombuffer(b"PCsp" + struct.pack("<II", len(text), zlib.crc32(text)) + text + body, dtype=np.uint8)


def huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(wbits=-15)
    return coder.compress(data) + coder.flush()


HEAD = {"dtype": "F32", "shape": [8, 8], "units": {"blocks": [1, 1]}, "values": "F32", "stored": 0, "zeros": 64}
MASK = ["mask", "plain", 8]


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        (
            {"stored": 1, "zeros": 63, "streams": [MASK, ["values", "plain", 4]]},
            b"\0" * 8 + b"\1" * 4,
            r"has 0 places for the 1",
        ),
        ({"streams": [MASK, ["values", "plain", 0]]}, b"\1" + b"\0" * 7, r"has 1 places for the 0 values it stores"),
        (
            {"stored": 1, "zeros": 64, "streams": [MASK, ["values", "plain", 4]]},
            b"\1" + b"\0" * 7 + b"\1" * 4,
            r"must hold 64 zeros, got 63",
        ),
        (
            {"streams": [["mask", "huffman", 3], ["values", "plain", 0]]},
            b"\xff\xff\xff",
            r"its mask stream is not a Huffman stream",
        ),
        (
            {"streams": [["mask", "huffman", 13], ["values", "plain", 0]]},
            huffman(b"\0" * 10_000_000)[:13],
            r"its mask stream holds more or less than 8 bytes",
        ),
        (
            {"shape": [8, 9], "zeros": 72, "streams": [["mask", "plain", 9], ["values", "plain", 0]], "stored": 0},
            b"\0" * 9,
            None,
        ),
        (
            {"shape": [3, 3], "zeros": 9, "streams": [["mask", "plain", 2], ["values", "plain", 0]]},
            b"\0\x80",
            r"its mask stream has a bit set behind its 9 bits|has a bit set behind its 9 bits",
        ),
        (
            {"shape": [4, 4], "zeros": 16, "stored": 8, "units": {"choices": [2, 4], "axis": 1}}
            | {"streams": [["mask", "plain", 2], ["values", "plain", 32]]},
            b"\xff\xff" + b"\0" * 32,
            r"has a byte that names no combination of 2:4",
        ),
        (
            {"shape": [2**20, 2**20], "zeros": 2**40, "units": {"blocks": [2**20, 2**20]}}
            | {"streams": [["mask", "plain", 1], ["values", "plain", 0]]},
            b"\0",
            r"would become 4,398,046,511,104 bytes, got 1 that are stored; no model is as empty",
        ),
    ],
)
def test_packed_weights_that_were_made_up(head, body, message):
    row = hostile(HEAD | head, body)
    if message is None:
        assert packed.unpack(row).count_nonzero() == 0
        return
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            packed.unpack(row)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"", r"is cut short, at 0 bytes"),
        (b"PCsp" + b"\0" * 5, r"is cut short, at 9 bytes"),
        (b"XXsp" + struct.pack("<II", 0, 0), r"does not begin with the head of a packed weight"),
        (b"PCsp" + struct.pack("<II", 2, zlib.crc32(b"{")) + b"{", r"does not begin with the head"),
        (b"PCsp" + struct.pack("<II", 1, zlib.crc32(b"{")) + b"{", r"has a head that is not JSON"),
        (b"PCsp" + struct.pack("<II", 2, zlib.crc32(b"[]")) + b"[]", r"has a head of another kind, got \[\]"),
        (b"PCsp" + struct.pack("<II", 9000, zlib.crc32(b"[" * 9000)) + b"[" * 9000, r"has a head that is not JSON"),
    ],
)
def test_rows_that_are_no_weight(row, message):
    with pytest.raises(CheckpointError, match=message):
        packed.unpack(np.frombuffer(row, dtype=np.uint8))


def test_many_empty_weights_are_one_bomb(tmp_path):
    """Each of them would be small enough alone."""
    head = HEAD | {"shape": [4096, 4096], "zeros": 2**24, "units": {"blocks": [4096, 4096]}}
    row = hostile(head | {"streams": [["mask", "plain", 1], ["values", "plain", 0]]}, b"\0")
    note, _ = packed.open_(row)
    rows = [
        container.Row(f"w{i}", "U8", (len(row),), len(row), zlib.crc32(row), {"packed": note.to_plain()}, row.data)
        for i in range(200)
    ]
    with (tmp_path / "scratch").open("w+b") as scratch:
        container.write(tmp_path / "a.safetensors", {"aliases": {}, "metadata": {}}, rows, scratch)
    with pytest.raises(CheckpointError, match=r"would become 13,421,772,800 bytes, got 43,\d\d\d that are stored"):
        load_sparse(tmp_path / "a.safetensors")


@pytest.fixture
def sharded():
    """A weight that is spread over ranks, of which there is one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_refused(tmp_path, sharded):
    dense = {"weight": torch.randn(8, 8)}
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match=r"^weight: is sharded over ranks; give get_model_state_dict"):
        save_sparse({"weight": sharded(dense["weight"])}, path)
    assert not path.exists()

    save_sparse(dense, path)
    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(sharded(torch.zeros(8, 8)))
    with pytest.raises(
        CheckpointError, match="weight: cannot be filled in place, got a tensor sharded over ranks; use"
    ):
        load_sparse_into(model, path)
    assert not model.weight.full_tensor().any()
