"""Size attributes that only people and other libraries read, such as ``hidden_size``, recognised by name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from pruning_core.graph.cut.widths import widths
from pruning_core.graph.plan import Plan
from pruning_core.graph.trace.labels import Axis

HEADS = frozenset("num_heads num_attention_heads n_heads n_head".split())
KEY_HEADS = frozenset(["num_key_value_heads"])
HEAD_SIZES = frozenset("head_dim attention_head_size key_value_proj_dim".split())
INNER = frozenset("all_head_size inner_dim".split())
WIDTHS = frozenset(
    (
        "hidden_size embed_dim d_model dim hidden_dim intermediate_size intermediate_dim ffn_dim num_features nx "
        "in_conv_dim out_conv_dim"
    ).split()
)
QUERY = frozenset("q q_proj q_lin query query_proj to_q wq qkv qkv_proj query_key_value c_attn in_proj".split())
KEY = frozenset("k k_proj k_lin key key_proj to_k wk".split())


class Size(NamedTuple):
    """The old and new size of one axis of a weight of a module or its child."""

    child: str
    read: bool
    old: int
    new: int
    removed: tuple[int, ...]


def usual(model: nn.Module, plan: Plan, changed: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """Attributes to set in modules other than PyTorch's own, where exactly one new value is possible."""
    near = _sizes(model, plan)
    for path, module in model.named_modules():
        known = changed.get(path, {})
        if widths(module) or not near[path]:
            continue
        for name, value in vars(module).items():
            if type(value) is int and name not in known:
                whole = not plan.narrow_heads and not known.keys() & HEAD_SIZES
                found = _values(name, value, near[path], whole)
                if len(found) == 1 and found != {value}:
                    yield path, name, found.pop()


def _sizes(model: nn.Module, plan: Plan) -> dict[str, list[Size]]:
    found: dict[str, list[Size]] = defaultdict(list)
    for name, tensor in model.named_parameters():
        owner = name.rpartition(".")[0]
        parent, _, child = owner.rpartition(".")
        for dim, new in enumerate(tensor.shape):
            axis = Axis(name, dim)
            size = Size("", axis in plan.consumers, plan.sizes.get(axis, new), new, plan.removed.get(axis, ()))
            found[owner].append(size)
            if owner:
                found[parent].append(size._replace(child=child))
    return found


def _values(name: str, value: int, near: list[Size], whole: bool) -> set[int]:
    """Of an attention module the query says most: what it reads is the width, what it gives are the heads."""
    query = [size for size in near if size.child in QUERY]
    heads = [size for size in near if size.child in (KEY if name in KEY_HEADS else QUERY)]
    given = [size for size in heads if not size.read and size.new != size.old]
    if name in HEADS | KEY_HEADS:
        return {value * size.new // size.old for size in given if whole and _whole_heads(size, value)}
    if name in INNER:
        return {size.new for size in given if size.old == value}
    if name in WIDTHS:
        return {size.new for size in query or near if size.old == value and (size.read or not query)}
    return set()


def _whole_heads(size: Size, heads: int) -> bool:
    """Of the query alone, or of query, key and value in one."""
    for parts in (1, 3):
        width = size.old // (parts * heads)
        if width and size.old == width * parts * heads and size.new * heads % size.old == 0:
            gone = Counter(index // width for index in size.removed)
            if all(count == width for count in gone.values()):
                return True
    return False
