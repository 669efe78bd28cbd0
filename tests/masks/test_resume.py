"""Interrupted anywhere == uninterrupted, bit for bit."""

import copy

import pytest
import torch

from pruning_core import Pruning, checkpoint
from tests.support.loops import loss_of, small_net

STEPS = 20
CONFIGS = {
    "snip_momentum 4x1": {"end_step": 14, "pruning_frequency": 3},
    "snip 1x1 local": {"pruning_type": "snip", "pattern": "1x1", "pruning_scope": "local", "end_step": 15},
    "magnitude channel": {"pruning_type": "magnitude", "pattern": "1xchannel", "end_step": 12, "target_sparsity": 0.5},
    "2:4 gradient": {"pruning_type": "gradient", "pattern": "2:4", "start_step": 4, "end_step": 16},
    "progressive": {
        "pruning_type": "snip_momentum_progressive",
        "pattern": "channelx1",
        "end_step": 16,
        "pruning_frequency": 8,
        "target_sparsity": 0.6,
    },
    "progressive linear": {
        "pruning_type": "snip_progressive",
        "progressive_type": "linear",
        "end_step": 17,
        "pruning_frequency": 8,
    },
    "one-shot snip": {"pruning_type": "snip", "pattern": "1x1", "start_step": 9, "end_step": 9},
    "lasso": {"end_step": 14, "reg_type": "group_lasso", "reg_coeff": 0.05},
    "decaying max": {"end_step": 14, "momentum_decay": 0.9, "criterion_reduce_type": "max", "pruning_frequency": 5},
}


class Run:
    """A training run that can be saved and continued in new objects. ``hooks``: explicit hooks or attach."""

    def __init__(self, options, hooks, per_epoch=None):
        torch.manual_seed(0)
        self.hooks, self.per_epoch = hooks, per_epoch
        self.model = small_net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.pruner = Pruning(options)
        self.step = 0

    def begin(self):
        if self.hooks:
            self.pruner.model, self.pruner.optimizer = self.model, self.optimizer
            self.pruner.on_train_begin()
        else:
            self.pruner.attach(self.model, self.optimizer)
        return self

    def save(self, path):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save({**state, "pruner": self.pruner.state_dict(), "step": self.step}, path)

    def load(self, path, before_begin):
        state = checkpoint.load(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if before_begin:
            self.pruner.load_state_dict(state["pruner"])
            return self.begin()
        self.begin()
        self.pruner.load_state_dict(state["pruner"])
        return self

    def train(self, until):
        while self.step < until:
            if self.hooks:
                step = None if self.per_epoch is None else self.step % self.per_epoch
                self.pruner.on_step_begin(step)
            self.optimizer.zero_grad()
            loss_of(self.model, self.step).backward()
            if self.hooks:
                self.pruner.on_before_optimizer_step()
            self.optimizer.step()
            if self.hooks:
                self.pruner.on_after_optimizer_step()
            self.step += 1
        return self

    def result(self):
        return copy.deepcopy((self.model.state_dict(), self.pruner.masks(), self.pruner.step))


def same(a, b):
    assert a[2] == b[2]
    for left, right in zip(a[:2], b[:2], strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "attach"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_interrupted_at_any_step_ends_as_the_uninterrupted_one(name, hooks, tmp_path):
    options = CONFIGS[name]
    expected = Run(options, hooks).begin().train(STEPS).result()
    assert any(not mask.all() for mask in expected[1].values())
    for interrupted in range(STEPS + 1):
        path = tmp_path / "checkpoint.pt"
        Run(options, hooks).begin().train(interrupted).save(path)
        resumed = Run(options, hooks).load(path, before_begin=interrupted % 2 == 0)
        same(resumed.train(STEPS).result(), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_and_attach_are_the_same_run(name):
    options = CONFIGS[name]
    a = Run(options, hooks=True).begin().train(STEPS).result()
    b = Run(options, hooks=False).begin().train(STEPS).result()
    same(a, b)


@pytest.mark.filterwarnings("ignore:on_step_begin. the step went from")
def test_a_count_that_restarts_every_epoch_is_the_same_run_and_resumes(tmp_path):
    options = CONFIGS["snip_momentum 4x1"]
    expected = Run(options, hooks=True).begin().train(STEPS).result()
    same(Run(options, hooks=True, per_epoch=7).begin().train(STEPS).result(), expected)
    for interrupted in (6, 7, 8, 14):
        path = tmp_path / "checkpoint.pt"
        Run(options, True, per_epoch=7).begin().train(interrupted).save(path)
        same(Run(options, True, per_epoch=7).load(path, False).train(STEPS).result(), expected)


def test_a_state_loads_with_weights_only_and_holds_packed_masks(tmp_path):
    run = Run(CONFIGS["snip_momentum 4x1"], hooks=False).begin().train(6)
    run.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    weights = state["pruner"]["groups"][0]["weights"]
    for name, mask in run.pruner.masks().items():
        assert weights[name]["keep"].numel() == -(-mask.numel() // 8)


def begun(options=None, model=None):
    run = Run(options or {"end_step": 5}, hooks=True)
    run.model = model or run.model
    return run.begin()


def test_states_that_do_not_fit_change_nothing():
    run = begun().train(3)
    state = run.pruner.state_dict()
    other = begun({"end_step": 9})
    with pytest.raises(ValueError, match=r"pruning_configs\[0\]\.end_step was 5, got 9; continue with the old value"):
        other.pruner.load_state_dict(state)
    assert other.pruner.step == 0
    with pytest.raises(ValueError, match="not the state of a pruner; pass"):
        begun().pruner.load_state_dict({"model": 1})
    with pytest.raises(ValueError, match="version 2 is read here, got 99"):
        begun().pruner.load_state_dict({**state, "version": 99})
    with pytest.raises(ValueError, match="the state is of 1 pruners, got 2"):
        begun([{"end_step": 5, "op_names": ["^0$"]}, {"end_step": 5}]).pruner.load_state_dict(state)
    wider = small_net()
    wider[5] = torch.nn.Linear(12 * 4 * 4, 20)
    with pytest.raises(ValueError, match=r"5\.weight had shape \[18, 192\], got \[20, 192\]"):
        begun(model=wider).pruner.load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state is of another model: 7\.weight is on one side only"):
        begun(model=small_net()[:-1]).pruner.load_state_dict(state)


def test_a_state_kept_for_later_is_checked_when_training_begins():
    run = begun().train(3)
    later = Run({"end_step": 9}, hooks=True)
    later.pruner.load_state_dict(run.pruner.state_dict())
    with pytest.raises(ValueError, match="another configuration"):
        later.begin()


def test_a_resumed_run_does_not_regrow_weights_between_load_and_first_step(tmp_path):
    run = Run({"end_step": 5}, hooks=False).begin().train(8)
    run.save(tmp_path / "c.pt")
    zeros = {name: ~mask for name, mask in run.pruner.masks().items()}
    resumed = Run({"end_step": 5}, hooks=False).load(tmp_path / "c.pt", before_begin=False)
    for step in range(9, 12):
        resumed.train(step)
        for name, zero in zeros.items():
            assert not resumed.model.get_parameter(name)[zero].any()
