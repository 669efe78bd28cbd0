"""A new kind is one class and one registry line; a configuration may name it at once."""

from dataclasses import dataclass

import pytest
import torch

from pruning_core import Pruning, WeightPruningConfig
from pruning_core.criteria import CRITERIA, Criterion
from pruning_core.patterns import PATTERNS, Block
from pruning_core.registry import Registry
from pruning_core.schedules import SCHEDULES, Schedule
from tests.support.loops import small_net, train


@pytest.fixture
def new_kinds():
    @CRITERIA.add("squared")
    class Squared(Criterion):
        needs_gradient = False

        def score(self, weight, gradient):
            return weight.float().square()

    @SCHEDULES.add("late")
    class Late(Schedule):
        def sparsity(self, progress, target):
            return target * progress**8

    @PATTERNS.add("row pairs")
    @dataclass(frozen=True)
    class RowPairs(Block):
        """Two whole filters live and die together."""

        @classmethod
        def parse(cls, text):
            return cls(2, None) if text == "row pairs" else None

        def __str__(self):
            return "row pairs"

    yield
    CRITERIA.remove("squared")
    SCHEDULES.remove("late")
    PATTERNS.remove("row pairs")


@pytest.mark.parametrize("pruning_type", ["squared", "squared_progressive"])
def test_new_kinds_work_together(new_kinds, pruning_type):
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"pruning_type": pruning_type, "pattern": "row pairs", "sparsity_decay_type": "late"}
    options |= {"end_step": 10, "pruning_frequency": 5, "target_sparsity": 0.5, "pruning_scope": "local"}
    with Pruning(options).attach(model, optimizer) as pruner:
        train(model, optimizer, range(10))
    rows = (model[5].weight == 0).all(1)
    assert torch.equal(rows[::2], rows[1::2])
    assert rows.sum() == 8  # four pairs of nine
    assert pruner._groups[0].done


def test_an_unknown_kind_is_answered_with_the_right_one(new_kinds):
    with pytest.raises(ValueError, match="unknown pruning type, got 'sqared'; did you mean 'squared'"):
        WeightPruningConfig({"pruning_type": "sqared"})


def test_a_name_is_registered_once():
    table: Registry[object] = Registry("kind")
    table.add("a")(object)
    with pytest.raises(ValueError, match="a: this kind is registered already; choose another name"):
        table.add("a")(object)
    with pytest.raises(ValueError, match="unknown kind, got 'b'; known: a"):
        table["b"]
