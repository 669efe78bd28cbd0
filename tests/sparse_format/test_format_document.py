"""FORMAT.md is enough to write a reader: this one follows the document alone, and reads what is written."""

import json
import math
import re
import struct
import zlib
from itertools import combinations, product

import pytest
import torch

import pruning_core as pc
from tests.support import ROOT

DOCUMENT = (ROOT / "pruning_core/sparse_format/FORMAT.md").read_text()
LETTER = {"F64": "d", "F32": "f", "F16": "e"}
WIDTH = {"F64": 8, "F32": 4, "F16": 2}


def read(data):
    """name -> (shape, values in row-major order), by the document."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "pt"
    assert metadata["pruning_core_crc32"] == f"{zlib.crc32(metadata['pruning_core'].encode()):08x}"
    table = json.loads(metadata["pruning_core"])
    assert table["version"] == 1 and list(table["tensors"]) == list(header)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        note = table["tensors"][name]
        assert zlib.crc32(raw) == note["crc32"]
        if "packed" in note:
            found[name] = packed(raw, note["packed"])
        else:
            count = math.prod(entry["shape"])
            found[name] = (entry["shape"], list(struct.unpack(f"<{count}{LETTER[entry['dtype']]}", raw)))
    return found | {name: found[first] for name, first in table["aliases"].items()}


def packed(raw, note):
    magic, length, crc32 = struct.unpack("<4sII", raw[:12])
    head = json.loads(raw[12 : 12 + length])
    assert magic == b"PCsp" and zlib.crc32(raw[12 : 12 + length]) == crc32 and head == note
    at, streams = 12 + length, {}
    assert zlib.crc32(raw[at:]) == head["crc32"]
    for name, coding, size in head["streams"]:
        part = raw[at : at + size]
        streams[name] = zlib.decompress(part, wbits=-15) if coding == "huffman" else part
        at += size
    assert at == len(raw)
    shape, width = head["shape"], WIDTH[head["values"]]
    places = blocks(streams["mask"], shape, head["units"]) if "blocks" in head["units"] else choices(
        streams["mask"], shape, head["units"]
    )  # fmt: skip
    assert len(places) == head["stored"]
    if "values" in streams:
        integers = [
            int.from_bytes(streams["values"][i * width : (i + 1) * width], "little") for i in range(len(places))
        ]
    else:
        integers = []
        for i in range(len(places)):
            rest = streams["rest"][i * (width - 1) : (i + 1) * (width - 1)]
            turned = int.from_bytes(rest + streams["exponents"][i : i + 1], "little")
            integers.append((turned >> 1) | ((turned & 1) << (8 * width - 1)))
    values = [struct.unpack(f"<{LETTER[head['values']]}", each.to_bytes(width, "little"))[0] for each in integers]
    stored = dict(zip(places, values, strict=True))
    free = iter(range(math.prod(shape)))
    signs = streams.get("signs", bytes(math.prod(shape)))
    result = []
    for index in product(*map(range, shape)):
        result.append(stored[index] if index in stored else (-0.0 if bit(signs, next(free)) else 0.0))
    assert sum(value == 0 for value in result) == head["zeros"]
    return shape, result


def bit(data, i):
    return bool(data[i // 8] >> (i % 8) & 1)


def blocks(mask, shape, units):
    """The stored places, in row-major order."""
    extents = units["blocks"]
    grid = [-(-length // extent) for length, extent in zip(shape, extents, strict=True)]

    def number(index):
        at = 0
        for i, extent, length in zip(index, extents, grid, strict=True):
            at = at * length + i // extent
        return at

    return [index for index in product(*map(range, shape)) if bit(mask, number(index))]


def choices(mask, shape, units):
    (n, m), axis = units["choices"], units["axis"]
    base = math.comb(m, n)
    per_byte = int(math.log(256.5) / math.log(base))
    sets = list(combinations(range(m), n))
    places, others = [], [length for i, length in enumerate(shape) if i != axis]
    number = 0
    for rest in product(*map(range, others)):
        for group in range(shape[axis] // m):
            digit = mask[number // per_byte] // base ** (number % per_byte) % base
            places += [(*rest[:axis], group * m + j, *rest[axis:]) for j in sets[digit]]
            number += 1
    return sorted(places)


def as_written(state):
    return {name: (list(value.shape), value.flatten().tolist()) for name, value in state.items()}


def test_the_example(tmp_path):
    dump = re.search(r"```text\n(0000  .*?)\n```", DOCUMENT, re.DOTALL)[1]
    data = b"".join(bytes.fromhex(line[6:53]) for line in dump.splitlines())
    space = {"torch": torch, "pc": pc}
    code = re.search(r"<!-- file -->\n```python\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    exec(code.replace('"example.safetensors"', f"{str(tmp_path / 'a.safetensors')!r}"), space)
    assert (tmp_path / "a.safetensors").read_bytes() == data  # raw: no library chooses any code
    assert read(data) == as_written({"bias": space["bias"], "weight": space["weight"]})


def test_the_number_that_is_split():
    turned = int.from_bytes(bytes.fromhex("00 00 80 7f"), "little")
    assert struct.unpack("<f", ((turned >> 1) | ((turned & 1) << 31)).to_bytes(4, "little"))[0] == 1.5
    assert "exponent byte `7f`, rest `00 00 80`" in DOCUMENT


@pytest.mark.parametrize("codec", ["raw", "entropy"])
@pytest.mark.parametrize("pattern", ["auto", "1x1", "4x1", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_document_reads_what_is_written(tmp_path, codec, pattern, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator).to(dtype)
    if pattern == "2:4":
        keep = torch.rand(24, 8, 4, generator=generator).argsort(-1).argsort(-1).reshape(24, 32) < 2
    else:
        keep = (torch.rand(6, 32, generator=generator) < 0.3).repeat_interleave(4, 0)
    weight *= keep  # leaves negative zeros
    state = {"w": weight, "b": torch.randn(3, generator=generator), "tied": weight}
    pc.save_sparse(state, tmp_path / "a.safetensors", codec=codec, pattern=pattern)
    found = read((tmp_path / "a.safetensors").read_bytes())
    assert found == as_written(state)
    signs = [math.copysign(1, value) for value in found["w"][1]]
    assert signs == [math.copysign(1, value) for value in weight.flatten().tolist()]
