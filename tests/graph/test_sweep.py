"""Every operator of PyTorch that is not pointwise, called by its schema on channels: a right cut or a named freeze."""

import itertools

import pytest
import torch
from torch import nn

from pruning_core import ChannelGraph
from pruning_core.graph.trace.rules.table import RULES

IMAGE = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
CHANNELS = 8
LEFT_OUT = {"set_", "set", "resize_", "resize", "resize_as_", "resize_as", "record_stream", "from_file"}
"""They give a tensor other memory. What is empty holds any numbers at all."""
BY_TRIAL = ["narrow"]
"""Picks by number: the trial freezes it."""
MUST_RUN = (
    "index_add_ scatter_add_ scatter_reduce_ index_reduce index_copy_ index_fill_ scatter_ sum mean amax prod std "
    "var norm logsumexp argmax median cumsum softmax sort topk kthvalue flip roll select narrow index_select gather "
    "take_along_dim masked_select unbind split chunk cat stack transpose_ diag_embed tril"
).split()


class Around(nn.Module):
    """Channels are made, meet the operation, and are read."""

    def __init__(self, operation):
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read, self.last = nn.Conv2d(3, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1), nn.Linear(CHANNELS, 4)
        self.operation = operation

    def forward(self, x):
        given, channels = self.operation(self.make(x)), self.make.weight.shape[0]
        for each in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.layout == torch.strided:
                if each.dim() == 4 and each.shape[1] == channels:
                    yield self.read(each)
                else:
                    yield self.last(each) if each.dim() and each.shape[-1] == channels else each

    def __call__(self, x):
        return list(super().__call__(x))


def values(argument):
    """What may stand for an argument, from its type and name in the schema."""
    kind, name = str(argument.type), argument.name
    if argument.has_default_value() and name not in ("dim", "dims", "kernel_size"):
        return [argument.default_value]
    if kind == "Tensor":
        return ["indices", "one index"] if "ind" in name else ["mask"] if name in ("mask", "condition") else ["same"]
    if "dim" in name and "List[int]" in kind:
        return [[1], [2]]
    if "dim" in name and "int" in kind:
        return [1, 2]
    plain = {
        "List[Tensor]": ["list"],
        "int": [2],
        "float": [0.5],
        "number": [2],
        "bool": [True],
        "str": ["sum", "mean"],
    }
    if kind in plain:
        return plain[kind]
    if name == "shifts":
        return [[1]]
    return [[2, 2]] if "List[int]" in kind else []


TENSORS = {
    "same": lambda h: h.detach().clone() * 0.5,
    "indices": lambda h: torch.zeros(h.shape, dtype=torch.int64),
    "one index": lambda h: torch.zeros(h.shape[2], dtype=torch.int64),
    "mask": lambda h: h > 0,
    "list": lambda h: [h, h * 2],
}


def called(operator, arguments, given):
    def operation(h):
        found = [TENSORS[each](h) if isinstance(each, str) and each in TENSORS else each for each in given]
        first = [h, h * 0.5] if str(arguments[0].type) == "List[Tensor]" else h.clone()
        pairs = list(zip(arguments[1:], found, strict=True))
        named = {argument.name: value for argument, value in pairs if argument.kwarg_only}
        return operator(first, *[value for argument, value in pairs if not argument.kwarg_only], **named)

    return operation


def operators():
    """(name, operator, arguments) of what takes a tensor first, and is neither pointwise nor private."""
    for schema in torch._C._jit_get_all_schemas():
        name, arguments = schema.name.removeprefix("aten::"), schema.arguments
        public = schema.name.startswith("aten::") and not name.startswith("_") and name not in LEFT_OUT
        public = public and "empty" not in name
        if not public or not arguments or str(arguments[0].type) not in ("Tensor", "List[Tensor]"):
            continue
        if any(argument.is_out for argument in arguments):
            continue
        operator = getattr(getattr(torch.ops.aten, name, None), schema.overload_name or "default", None)
        if operator is not None and torch.Tag.pointwise not in operator.tags:
            yield name, operator, arguments


def calls():
    """(name, model) of all calls that PyTorch itself can run."""
    for name, operator, arguments in operators():
        for given in itertools.islice(itertools.product(*map(values, arguments[1:])), 12):
            model = Around(called(operator, arguments, given))
            try:
                with torch.inference_mode():
                    model(IMAGE)
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                continue  # not an error of ours: this operator does not take such arguments
            yield name, model


@pytest.mark.filterwarnings("ignore")
def test_every_operator_is_cut_right_or_frozen_by_name():
    ran, wrong, removable = set(), [], set()
    for name, model in calls():
        ran.add(name)
        try:
            graph = ChannelGraph.trace(model, IMAGE)
        except Exception as error:
            if "outputs on them are NaN" not in str(error):
                wrong.append((name, f"{type(error).__name__}: {error}"))
            continue
        why = {reason for _, _, reason in graph.frozen()}
        bad = [each for each in why if "does not know these" in each or "other outputs" in each]
        wrong += [(name, each) for each in bad if not any(part in name for part in BY_TRIAL)]
        removable |= {name} if graph.groups else set()
    assert not wrong
    assert set(MUST_RUN) <= ran and len(ran) > 450
    assert len(removable) > 100 and {"index_add_", "scatter_reduce_", "flip", "softmax"} <= removable


def test_an_operator_of_tomorrow_is_frozen_by_name(monkeypatch):
    monkeypatch.delitem(RULES, "flip")
    model = Around(lambda h: h.flip(2))
    assert any("an operation without a rule, at flip" in why for _, _, why in ChannelGraph.trace(model, IMAGE).frozen())


@pytest.mark.parametrize("error", [KeyError, IndexError, AttributeError, TypeError, RuntimeError, AssertionError])
def test_a_rule_that_does_not_know_its_arguments_freezes_by_name(monkeypatch, error):
    """The same where it gives labels of another shape than the result's."""

    def broken(trace, call):
        raise error("unexpected")

    for rule in (broken, lambda trace, call: call.shadow("self")[:, :1]):
        monkeypatch.setitem(RULES, "flip", rule)
        graph = ChannelGraph.trace(Around(lambda h: h.flip(2)), IMAGE)
        assert not graph.groups
        assert any("whose rule does not know these arguments, at flip" in why for _, _, why in graph.frozen())


def test_pointwise_operations_have_a_rule_by_their_tag():
    assert "erfc" not in RULES
    assert ChannelGraph.trace(Around(torch.erfc), IMAGE).groups
