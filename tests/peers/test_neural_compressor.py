"""What Neural Compressor's own tests demand of its pruner (1.14, 2.0 and 2.6), written anew.

Each says which file of theirs it stands for. Theirs train a ResNet-18 on random images and assert little; these train a
small network with the same layer names and assert what was asked for. Not here, because they test what is refused with
a line: ``block_mask``, ``retrain_free``, ``sparse_gpt``, Wanda, and the pruners of 1.x that count epochs.
"""

import re
import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, pytorch_utils

from pruning_core.compat.neural_compressor import (
    Config,
    Pruning,
    WeightPruningConfig,
    get_sparsity_ratio,
    model_slim,
    parse_auto_slim_config,
    parse_to_prune,
    prepare_compression,
    prepare_pruning,
)

pytestmark = pytest.mark.filterwarnings("ignore:on_step_begin. the step went from:UserWarning")
FALSE_KEY = {"false_key": "this is to test unsupported keys"}


class ResNet(nn.Module):
    """``layer1`` to ``layer4`` and ``fc``, as in ResNet-18; channels that 5x1 and 5:8 do and do not divide."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.layer2 = nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1))
        self.layer3 = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1))
        self.layer4 = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU())
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        for layer in (self.conv1, self.layer1, self.layer2, self.layer3, self.layer4):
            x = torch.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def batches(count, shape=(3, 8, 8)):
    return [(torch.randn(2, *shape), torch.randint(0, 5, (2,))) for _ in range(count)]


def train(model, hooks, epochs=2, steps=10, data=None):
    """The loop of their tests: every hook, and a step count that begins anew in each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        model.train()
        hooks.on_epoch_begin(epoch)
        for local_step, (images, target) in enumerate(data or batches(steps)):
            hooks.on_step_begin(local_step)
            loss = nn.functional.cross_entropy(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            hooks.on_before_optimizer_step()
            optimizer.step()
            hooks.on_after_optimizer_step()
            hooks.on_step_end()
        hooks.on_epoch_end()
    hooks.on_train_end()
    hooks.on_before_eval()
    hooks.on_after_eval()


def zeros(*modules):
    weights = [m.weight for each in modules for m in each.modules() if hasattr(m, "weight")]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def compressed(local, model=None, **options):
    """2.6: ``prepare_compression(model, confs).callbacks``; ``on_train_begin`` is called twice, as in their tests."""
    model = model or ResNet()
    manager = prepare_compression(model=model, confs=WeightPruningConfig(local, **options))
    manager.callbacks.on_train_begin()
    manager.callbacks.on_train_begin()
    return model, manager


BASIC = [
    {"op_names": ["layer1.*"], "target_sparsity": 0.5, "pattern": "8x2", "pruning_type": "magnitude_progressive"},
    {"op_names": ["layer2.*"], "target_sparsity": 0.5, "pattern": "2:4"},
    {"op_names": ["layer3.*"], "target_sparsity": 0.7, "pattern": "5x1", "pruning_type": "snip_progressive"},
]


def assert_basic(model):
    assert zeros(model.layer1) == pytest.approx(0.5, abs=16 / 13824)
    assert zeros(model.layer2) == 0.5
    assert zeros(model.layer3) == pytest.approx(0.7, abs=5 / 6144)
    assert zeros(model.conv1, model.layer4, model.fc) == 0


def test_three_pruners_and_an_unknown_key():
    """pruning_2.x/test_pruning.py"""
    with pytest.warns(
        UserWarning, match=r"pruning_configs\[0\].false_key: unknown option, got 'this is .*; it is ignored"
    ):
        model, manager = compressed([BASIC[0] | FALSE_KEY, *BASIC[1:]], target_sparsity=0.8, start_step=1, end_step=10)
    train(model, manager.callbacks)
    assert_basic(model)


def test_a_key_that_looks_like_an_option_is_an_error():
    """Not a test of theirs: their ``target_sparsty`` trains with the default."""
    with pytest.raises(ValueError, match=r"target_sparsty: unknown option, got 0\.3; did you mean 'target_sparsity'"):
        WeightPruningConfig([{"target_sparsty": 0.3}])


@pytest.mark.parametrize("wrapped", [False, True], ids=["2.0", "1.x_v2"])
def test_update_config_before_and_after_training_begins(wrapped):
    """2.0 test_pruning.py; pruning_1.x_v2/test_pruning.py, where the configuration is inside of a Config"""
    config = WeightPruningConfig(BASIC, target_sparsity=0.8)
    if wrapped:
        config = Config(quantization=None, benchmark=None, pruning=config, distillation=None)
    prune = Pruning(config)
    prune.update_config(start_step=1, end_step=10)
    prune.model = model = ResNet()
    prune.on_train_begin()
    prune.update_config(pruning_frequency=4)
    assert all(pruner.config["pruning_frequency"] == 4 for pruner in prune.pruners)
    train(model, prune)
    assert_basic(model)
    prune.on_train_begin()
    (images, target), *_ = batches(1)
    prune.on_step_begin(0)
    nn.functional.cross_entropy(model(images), target).backward()
    prune.on_before_optimizer_step()
    prune.on_after_optimizer_step()
    with pytest.raises(RuntimeError, match="update_items_for_all_pruners: training has begun; call it before"):
        prune.update_config(pruning_frequency=2)


def test_elements_of_the_sparsity_ratio():
    """``get_sparsity_ratio`` of 1.x and 2.0: over the layers, over all parameters, in whole units."""
    prune = Pruning(WeightPruningConfig([BASIC[0] | {"pruning_type": "magnitude"}], start_step=1, end_step=1))
    prune.model = model = ResNet()
    prune.on_train_begin()
    train(model, prune, epochs=1, steps=2)
    layers = sum(m.weight.numel() for m in model.modules() if hasattr(m, "weight"))
    parameters = sum(p.numel() for p in model.parameters())
    gone = int((model.layer1[0].weight == 0).sum() + (model.layer1[2].weight == 0).sum())
    assert prune.get_sparsity_ratio() == pytest.approx((gone / layers, gone / parameters, gone / layers), rel=1e-6)
    assert get_sparsity_ratio(prune.pruners, model) == prune.get_sparsity_ratio()
    with torch.no_grad():
        model.layer1[0].weight[:8, 2] = 0  # zeros that no unit holds alone
        model.layer1[0].weight[0, 2] = 1
    elements, _, in_units = prune.get_sparsity_ratio()
    assert elements > in_units


def test_the_sparsity_ratio_of_a_layer_under_a_norm():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    prune = Pruning({"pattern": "1x1", "pruning_type": "magnitude", "target_sparsity": 0.5})
    prune.model = model
    prune.on_train_begin()
    prune.on_step_begin()
    assert prune.get_sparsity_ratio()[0] == 0.5


def test_a_configuration_that_fits_no_layer_changes_nothing():
    prune = Pruning(WeightPruningConfig(BASIC, start_step=1, end_step=10))
    assert prune.conf.pruning_configs[1]["pattern"] == "2:4"
    prune.model = model = ResNet()
    prune.on_train_begin()
    with pytest.raises(ValueError, match="op_names"):
        prune.update_config(op_names=["nothing"])
    train(model, prune)
    assert_basic(model)


def test_pruners_answer_for_their_options():
    """2.0 test_pruning_config.py; pruning_1.x_v2 and pruning_2.x/test_pruning_config.py"""
    local = [
        {
            "op_names": ["layer1.*", "layer2.*"],
            "excluded_op_names": ["downsample.*"],
            "target_sparsity": 0.6,
            "pattern": "channelx1",
            "pruning_type": "snip_progressive",
            "pruning_scope": "local",
            "start_step": 0,
            "end_step": 10,
        },
        {"op_names": ["layer3.*"], "pruning_type": "pattern_lock"},
    ]
    model, config = ResNet(), WeightPruningConfig(local, pruning_frequency=2, target_sparsity=0.8)
    manager = prepare_compression(model, config)
    with pytest.warns(UserWarning) as told:
        manager.callbacks.on_train_begin()
    assert [str(each.message).partition(": ")[2] for each in told] == [
        "'downsample.*' matches no layer",
        "pattern_lock found no zero weight; nothing is locked",
    ]
    first, second = manager.callbacks.callbacks_list[0].pruners
    assert first.config["pruning_frequency"] == 2 and first.config["target_sparsity"] == 0.6
    assert first.config["pattern"] == "channelx1" and second.config["pruning_type"] == "pattern_lock"
    assert second.config["target_sparsity"] == 0.8
    assert manager.conf.pruning.pruning_configs == [first.config, second.config]
    train(model, manager.callbacks, steps=12, epochs=1)
    assert zeros(model.layer1) == pytest.approx(0.6, abs=0.03) and zeros(model.layer3) == 0
    chosen = parse_to_prune({**first.config, "excluded_op_names": []}, model)
    assert list(chosen) == ["layer1.0", "layer1.2", "layer2.0", "layer2.2"] and chosen["layer2.2"] is model.layer2[2]


def test_criteria_with_limits_and_a_single_shot():
    """2.0 test_pruning_criteria.py; pruning_1.x_v2 and pruning_2.x/test_pruning_criteria.py"""
    local = [
        {
            "op_names": ["layer1.*"],
            "target_sparsity": 0.4,
            "pattern": "8x2",
            "pruning_type": "magnitude_progressive",
            "pruning_scope": "local",
            "sparsity_decay_type": "cube",
        },
        {"op_names": ["layer2.*"], "target_sparsity": 0.45, "pattern": "2:4", "pruning_type": "snip"}
        | {"start_step": 6, "end_step": 6},
        {
            "op_names": ["layer3.*"],
            "target_sparsity": 0.7,
            "pattern": "4x1",
            "pruning_type": "snip_momentum_progressive",
            "pruning_frequency": 4,
            "min_sparsity_ratio_per_op": 0.5,
            "max_sparsity_ratio_per_op": 0.8,
        },
    ]
    model, manager = compressed(local, target_sparsity=0.8, sparsity_decay_type="cube", start_step=1, end_step=10)
    train(model, manager.callbacks)
    assert zeros(model.layer1[0]) == zeros(model.layer1[2]) == pytest.approx(0.4, abs=0.01)
    assert zeros(model.layer2) == pytest.approx(0.45, abs=0.001)
    assert zeros(model.layer3) == pytest.approx(0.7, abs=0.001)
    assert all(0.5 <= zeros(layer) <= 0.8 for layer in (model.layer3[0], model.layer3[2]))


@pytest.mark.parametrize("first", [("5:8", 0.5, "magnitude"), ("6:8", 0.75, "magnitude_progressive")], ids=str)
def test_n_of_n_in_m_are_pruned(first):
    """2.0 test_pruning_patterns.py; pruning_2.x/test_pruning_patterns.py and test_pruning_progressive.py"""
    pattern, target, kind = first
    local = [
        {"op_names": ["layer1.*"], "target_sparsity": target, "pattern": pattern, "pruning_type": kind},
        {"op_names": ["layer2.*"], "pattern": "1xchannel", "pruning_scope": "global"},
        {
            "start_step": 2,
            "end_step": 20,
            "op_names": ["layer3.*"],
            "target_sparsity": 0.666666,
            "pattern": "4x2",
            "pruning_type": "snip_progressive",
            "pruning_frequency": 5,
        },
    ]
    common = {"sparsity_decay_type": "cos", "pruning_scope": "local", "min_sparsity_ratio_per_op": 0.1}
    with pytest.warns(UserWarning, match=f"N of N:M weights are pruned, got '{pattern}'"):
        model, manager = compressed(local, target_sparsity=0.8, start_step=1, end_step=10, **common)
    assert manager.callbacks.pruners[0].config["pattern"] == pattern
    train(model, manager.callbacks, epochs=3)
    assert zeros(model.layer1) == pytest.approx(target, abs=0.01)
    for layer in (model.layer1[0], model.layer1[2]):
        lost = (layer.weight == 0).movedim(1, -1).unflatten(-1, (-1, 8)).sum(-1)
        assert lost.max() == int(pattern[0]) and set(lost.flatten().tolist()) <= {0, int(pattern[0])}
    assert zeros(model.layer2) == pytest.approx(0.8, abs=0.02)
    assert all(bool((row == 0).all()) or bool((row != 0).all()) for row in model.layer2[0].weight)
    assert zeros(model.layer3) == pytest.approx(0.666666, abs=0.002)


def test_one_in_four_at_a_quarter():
    """1:4 prunes one of four there, and three of four under the names of this package."""
    from pruning_core import Pruning as Native

    options = {"pattern": "1:4", "target_sparsity": 0.25, "pruning_type": "magnitude"}
    with pytest.warns(UserWarning, match="here N are kept, write 3:4"):
        there = Pruning(options)
    for pruner, lost in ((there, 1), (Native(options), 3)):
        pruner.model = layer = nn.Linear(32, 16)
        pruner.on_train_begin()
        pruner.on_step_begin()
        by_group = (layer.weight == 0).unflatten(1, (-1, 4)).sum(-1)
        assert by_group.max() == lost
        assert zeros(layer) == pytest.approx(0.25, abs=0.01)


SCHEDULES = [
    {
        "start_step": 0,
        "end_step": 2,
        "pruning_type": "magnitude",
        "op_names": ["layer1.*"],
        "excluded_op_names": ["layer2.*"],
        "pruning_scope": "global",
        "target_sparsity": 0.5,
        "pattern": "4x1",
    },
    {
        "start_step": 1,
        "end_step": 10,
        "pruning_type": "snip_momentum",
        "pruning_frequency": 2,
        "op_names": ["layer2.*"],
        "pruning_scope": "local",
        "target_sparsity": 0.75,
        "pattern": "32x1",
        "sparsity_decay_type": "exp",
    },
]


def test_schedules_of_their_own():
    """2.0, pruning_1.x_v2 and pruning_2.x/test_pruning_schedulers.py"""
    model, manager = compressed(SCHEDULES, target_sparsity=0.9, start_step=0, end_step=10, sparsity_decay_type="exp")
    train(model, manager.callbacks)
    assert zeros(model.layer1) == pytest.approx(0.5, abs=0.001)
    assert zeros(model.layer2[0]) == zeros(model.layer2[2]) == pytest.approx(0.75, abs=0.02)


def test_pattern_lock_beside_progressive_pruning():
    """2.0, pruning_1.x_v2 and pruning_2.x/test_pruning_types.py; 1.14 test_pattern_lock.py"""
    progressive = {"pruning_scope": "local", "pruning_frequency": 1}
    local = [
        {"start_step": 0, "end_step": 0, "pruning_type": "pattern_lock", "op_names": ["layer4.*"], "pattern": "2:4"},
        {"start_step": 1, "end_step": 1, "target_sparsity": 0.5, "op_names": ["layer2.*"], "pattern": "4x1"}
        | {"pruning_type": "snip_momentum_progressive"}
        | progressive,
        {"start_step": 2, "end_step": 8, "target_sparsity": 0.8, "op_names": ["layer3.*"], "pattern": "16x1"}
        | {"pruning_type": "snip_progressive", "sparsity_decay_type": "cube"}
        | progressive,
    ]
    model = ResNet()
    with torch.no_grad():
        model.layer4[0].weight *= torch.rand(model.layer4[0].weight.shape) < 0.1
    locked = model.layer4[0].weight == 0
    model, manager = compressed(local, model, target_sparsity=0.9, start_step=0, end_step=10, pruning_frequency=3)
    manager.callbacks.update_config(pruning_frequency=1)
    train(model, manager.callbacks)
    assert torch.equal(model.layer4[0].weight == 0, locked)
    assert zeros(model.layer2) == pytest.approx(0.5, abs=0.001)
    assert zeros(model.layer3) == pytest.approx(0.8, abs=0.01)


def test_group_lasso_in_the_loop_without_naming_the_optimizer():
    """pruning_2.x/test_pruning_regs.py"""
    lasso = BASIC[2] | {"reg_type": "group_lasso", "reg_coeff": 0.1}
    with pytest.warns(UserWarning, match="false_key"):
        model, manager = compressed(
            [BASIC[0] | FALSE_KEY, BASIC[1], lasso], target_sparsity=0.8, start_step=1, end_step=10
        )
    train(model, manager.callbacks)
    assert_basic(model)


def test_group_lasso_that_does_nothing_is_read_with_a_warning():
    """2.0 test_pruning_regs.py, test_pruning_yaml.py and test_pruning_yaml_config.py: a strength of 0, or no type"""
    with pytest.warns(
        UserWarning, match=r"\[1\]\.reg_type: does nothing, got 'group_lasso'; it needs reg_coeff above 0"
    ):
        config = WeightPruningConfig(
            [
                {"op_names": ["layer1.*"], "reg_type": "group_lasso", "parameters": {"reg_coeff": 0.2}},
                {"op_names": ["fc"], "reg_type": "group_lasso", "parameters": {"reg_coeff": 0.0}},
            ]
        )
    assert [pruner.reg_coeff for pruner in config.pruners] == [0.2, 0.0]
    with pytest.warns(UserWarning, match=r"parameters\.reg_coeff: does nothing, got 0\.1; it needs reg_type"):
        WeightPruningConfig({"prune_type": "magnitude", "parameters": {"reg_coeff": 0.1}})


def test_convolutions_over_time():
    """pruning_2.x/test_conv_pruning.py: ``nn.Conv1d``, and Conv1D of transformers"""
    local = [
        {"op_names": ["conv1.*"], "target_sparsity": 0.6, "pattern": "channelx1", "pruning_type": "snip"}
        | {"pruning_scope": "local"},
        {"op_names": ["conv2.*"], "target_sparsity": 0.5, "pattern": "2:4", "pruning_scope": "global"},
    ]

    class Model(nn.Module):
        def __init__(self, layer, inputs):
            super().__init__()
            self.conv1, self.conv2, self.linear = layer(), layer(), nn.Linear(inputs, 5)

        def forward(self, x):
            return self.linear(self.conv2(torch.relu(self.conv1(x))).flatten(1))

    for layer, shape in ((lambda: nn.Conv1d(4, 4, 2), (4, 10)), (lambda: pytorch_utils.Conv1D(4, 4), (4, 4))):
        model = Model(layer, 32 if shape == (4, 10) else 16)
        model, manager = compressed(local, model, target_sparsity=0.8, start_step=1, end_step=10)
        train(model, manager.callbacks, data=batches(20, shape))
        assert zeros(model.conv1) == 0.5  # two of four input channels: the third would pass 0.6
        assert zeros(model.conv2) == 0.5


FILE = """
model:
  name: imagenet_prune
  framework: pytorch

pruning:
  approach:
    weight_compression_pytorch:
      initial_sparsity: 0.0
      target_sparsity: 0.9
      start_step: 0
      end_step: 10
      excluded_names: ["fc"]
      update_frequency_on_step: 1
      sparsity_decay_type: "exp"
      pruners:
        - !Pruner
            start_step: 0
            sparsity_decay_type: "cos"
            end_step: 10
            prune_type: "magnitude"
            names: ['layer1.*']
            extra_excluded_names: ['layer2.*']
            prune_domain: "global"
            pattern: "tile_pattern_4x1"
        - !Pruner
            start_step: 1
            end_step: 1
            target_sparsity: 0.5
            prune_type: "snip_momentum"
            update_frequency: 2
            names: ['layer2.*']
            prune_domain: local
            pattern: "tile_pattern_2:4"
        - !Pruner
            start_step: 2
            end_step: 8
            target_sparsity: 0.8
            prune_type: "snip"
            names: ['layer3.*']
            prune_domain: "local"
            pattern: "tile_pattern_16x1"
            sparsity_decay_type: "cube"
"""


def test_a_file_of_the_first_generation(tmp_path):
    """1.14 test_pytorch_pruning.py; 2.0 and pruning_1.x_v1/test_pruning_experimental.py"""
    (tmp_path / "snip.yaml").write_text(FILE)
    prune = Pruning(str(tmp_path / "snip.yaml"))
    prune.update_items_for_all_pruners(start_step=1)
    prune.model = model = ResNet()
    prune.prepare()
    prune.on_train_begin()
    train(model, prune)
    assert zeros(model.layer1) == pytest.approx(0.9, abs=0.001)
    assert zeros(model.layer2) == 0.5
    assert zeros(model.layer3) == pytest.approx(0.8, abs=0.01)


def test_locks_and_channels_of_a_file(tmp_path):
    """2.0 and pruning_1.x_v1/test_pruning_experimental.py, the channels"""
    text = FILE.replace('prune_type: "magnitude"', 'prune_type: "pattern_lock"').replace(
        "end_step: 10\n            p", "end_step: 0\n            p"
    )
    text = text.replace("tile_pattern_4x1", "channelx1").replace("tile_pattern_16x1", "1xchannel")
    (tmp_path / "channels.yaml").write_text(text)
    prune = Pruning(tmp_path / "channels.yaml")
    prune.model = model = ResNet()
    with pytest.warns(UserWarning, match="pattern_lock found no zero weight"):
        prune.on_train_begin()
    train(model, prune)
    assert zeros(model.layer1) == 0 and zeros(model.layer3[0]) == pytest.approx(0.8, abs=1 / 64)


def test_a_file_of_the_second_generation(tmp_path):
    """2.0 test_pruning_yaml.py and test_pruning_yaml_config.py"""
    text = """
    pruning:
      approach:
        weight_compression_v2:
          target_sparsity: 0.9
          start_step: 0
          end_step: 10
          excluded_op_names: ["fc"]
          max_sparsity_ratio_per_op: 0.95
          pruning_frequency: 2
          pruners:
            - !PrunerV2
                target_sparsity: 0.3
                start_step: 0
                sparsity_decay_type: "cos"
                end_step: 2
                pruning_type: "magnitude"
                op_names: ['layer1.*']
                pruning_scope: "global"
                pattern: "3:8"
            - !PrunerV2
                start_step: 1
                end_step: 1
                target_sparsity: 0.5
                pruning_type: "snip_momentum"
                op_names: ['layer2.*']
                pruning_scope: "local"
                pattern: "4x1"
                reg_type: "group_lasso"
                parameters: {reg_coeff: 0.1}
    """
    (tmp_path / "v2.yaml").write_text(text)
    with pytest.warns(UserWarning, match="got '3:8'"):
        prune = Pruning(str(tmp_path / "v2.yaml"))
    prune.update_config(start_step=1)
    prune.model = model = ResNet()
    prune.on_train_begin()
    first, second = (pruner.config for pruner in prune.pruners)
    assert first["start_step"] == 1 and first["end_step"] == 2 and first["sparsity_decay_type"] == "cos"
    assert first["pruning_type"] == "magnitude" and first["op_names"] == ["layer1.*"]
    assert first["pruning_scope"] == "global" and first["pattern"] == "3:8" and first["pruning_frequency"] == 2
    assert first["excluded_op_names"] == ["fc"] and first["max_sparsity_ratio_per_op"] == 3 / 8
    assert second["target_sparsity"] == 0.5 and second["pruning_scope"] == "local"
    assert second["pattern"] == "4x1" and second["reg_type"] == "group_lasso"
    train(model, prune, epochs=1, steps=3)
    assert zeros(model.layer1) == pytest.approx(0.3, abs=0.001) and zeros(model.layer2) == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize(
    "pruner, message",
    [
        (
            {"start_epoch": 0, "prune_type": "magnitude"},
            "start_epoch: has no meaning here, got 0; steps are counted, not",
        ),
        ({"prune_type": "basic_magnitude"}, "unknown pruning type, got 'basic_magnitude'; "),
        ({"prune_type": "group_lasso"}, "unknown pruning type, got 'group_lasso'; "),
        ({"pruning_type": "sparse_gpt"}, "unknown pruning type, got 'sparse_gpt'; "),
        ({"pruning_type": "retrain_free"}, "unknown pruning type, got 'retrain_free'; "),
        ({"pattern": "mha"}, "unknown pattern, got 'mha'; "),
    ],
    ids=str,
)
def test_what_is_not_here_is_refused(pruner, message):
    """1.14 test_pruning.py, test_gradient_sensitivity.py, test_pruning_group_lasso.py; pruning_2_plus.x/*"""
    with pytest.raises(ValueError, match=re.escape(message)):
        WeightPruningConfig({"pruning": {"approach": {"weight_compression": {"pruners": [pruner]}}}})


def test_prepare_pruning_drives_itself():
    """pruning_2_plus.x/test_pruning.py: a plain loop, in which only the optimizer steps"""
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    local = [BASIC[0] | {"target_sparsity": 0.6} | FALSE_KEY, BASIC[1] | {"pruning_scope": "local"}]
    with pytest.warns(UserWarning, match="false_key"):
        config = WeightPruningConfig(local, target_sparsity=0.8, start_step=1, end_step=4)
    pruning = prepare_pruning(model, config, optimizer)
    for images, target in batches(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()
    pruning.on_train_end()
    assert zeros(model.layer1) == pytest.approx(0.6, abs=16 / 13824) and zeros(model.layer2) == 0.5
    with pytest.raises(
        ValueError, match="optimizer: pruning without training is not here, got None; pass the optimizer"
    ):
        prepare_pruning(ResNet(), config, dataloader=[1])
    with pytest.raises(ValueError, match="framework: must be 'pytorch', got 'keras'"):
        prepare_pruning(ResNet(), config, optimizer, framework="keras")


def test_confs_that_are_not_about_pruning():
    """orchestration: a list of configurations, of which one is for pruning"""
    config = WeightPruningConfig(BASIC, start_step=1, end_step=10)
    assert prepare_compression(ResNet(), [config]).conf.pruning.pruners == config.pruners
    with pytest.raises(ValueError, match="confs: must be one pruning configuration, got WeightPruningConfig, object"):
        prepare_compression(ResNet(), [config, object()])
    with pytest.raises(ValueError, match="confs: must be one pruning configuration, got an empty list"):
        prepare_compression(ResNet(), [])
    with pytest.raises(ValueError, match=r"distillation: is not here, got object; .*docs/distillation\.md"):
        Config(pruning=config, distillation=object())


def test_a_manager_saves_and_loss_passes_through(tmp_path):
    """examples: ``compression_manager.save``, ``loss = callbacks.on_after_compute_loss(batch, output, loss)``"""
    model = ResNet()
    manager = prepare_compression(model, WeightPruningConfig(BASIC, start_step=1, end_step=2))
    manager.save(tmp_path / "new")
    stored = torch.load(tmp_path / "new" / "best_model.pt", weights_only=True)
    assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())
    loss = torch.ones(())
    assert manager.callbacks.on_after_compute_loss(None, None, loss) is loss
    assert manager.model is model


def test_pruning_func_and_fit():
    """1.x: ``prune.pruning_func = f; prune.eval_func = g; prune.fit()``"""
    prune = Pruning(WeightPruningConfig(BASIC, start_step=1, end_step=4))
    prune.model = model = ResNet()

    def training(given):
        assert given is model
        for step, (images, target) in enumerate(batches(6)):
            prune.on_step_begin(batch_id=step)
            model.zero_grad()
            nn.functional.cross_entropy(model(images), target).backward()
            prune.on_before_optimizer_step()
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
            prune.on_after_optimizer_step()

    prune.pruning_func = training
    prune.eval_func = zeros
    assert prune.fit() is model and prune.pruning_func is training
    assert prune.metrics == {"before": 0, "after": zeros(model)}
    assert_basic(model)


def bert():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=5, **sizes)).eval()


def tokens(count):
    return [(torch.randint(0, 50, (2, 10)), torch.randint(0, 5, (2,))) for _ in range(count)]


@pytest.mark.parametrize("given", [True, False], ids=["dataloader", "guess"])
def test_auto_slim_of_a_transformer(given):
    """pruning_2.x/test_auto_slim.py: half of the hidden channels and of the heads go, and the outputs stay"""
    model, data = bert(), tokens(10)
    before = sum(parameter.numel() for parameter in model.parameters())
    configs = parse_auto_slim_config(
        model, data if given else None, ffn2_sparsity=0.5, mha_sparsity=0.5, pruning_scope="local"
    )
    assert [each["pattern"] for each in configs] == ["channelx1", "channelx16"]
    assert configs[0]["op_names"] == [rf"^bert\.encoder\.layer\.{i}\.output\.dense$" for i in range(2)]
    manager = prepare_compression(model, WeightPruningConfig(configs, start_step=1, end_step=8))
    manager.callbacks.on_train_begin()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step, (words, target) in enumerate(data):
        manager.callbacks.on_step_begin(step)
        nn.functional.cross_entropy(model(words).logits, target).backward()
        manager.callbacks.on_before_optimizer_step()
        optimizer.step()
        manager.callbacks.on_after_optimizer_step()
    manager.callbacks.on_train_end()
    want = model(data[0][0]).logits
    assert model_slim(model, data if given else None) is model
    layer = model.bert.encoder.layer[1]
    assert layer.intermediate.dense.weight.shape == (64, 64) and layer.output.dense.weight.shape == (64, 64)
    assert layer.attention.self.query.weight.shape == (32, 64) and layer.attention.output.dense.in_features == 32
    torch.testing.assert_close(model(data[0][0]).logits, want, rtol=1e-5, atol=1e-6)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.7 * before
    with pytest.warns(UserWarning, match="model_slim: no channel is zero in every layer that reads it"):
        model_slim(model)


def test_model_slim_rounds_the_width():
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad():
        model[2].weight[:, :9] = 0
    want = model(torch.ones(2, 6))
    model_slim(model, [torch.randn(2, 6)], round_multiplier=8)
    assert model[0].out_features == 16  # 11 are read, 16 is the next multiple of 8
    torch.testing.assert_close(model(torch.ones(2, 6)), want)
    with pytest.raises(ValueError, match="round_multiplier: must be a whole number from 1, got 0"):
        model_slim(model, round_multiplier=0)


def test_model_slim_keeps_a_zero_channel_that_a_norm_looks_at():
    """Without it the norm would divide by another variance: its removal changes the outputs."""
    norm = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        norm[2].weight[:, :4] = 0
        norm[4].weight[:, 3:7] = 0
    want = norm(torch.ones(2, 6))
    model_slim(norm, [torch.randn(2, 6)], round_multiplier=1)
    assert norm[0].out_features == 16 and norm[2].out_features == 12
    torch.testing.assert_close(norm(torch.ones(2, 6)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_model_slim_of_wide_norms_and_other_dtypes(dtype, affine):
    """A norm over 2,000 channels shows a missing one by less than half precision can tell."""
    wide = nn.Sequential(
        nn.Linear(6, 2000),
        nn.LayerNorm(2000, elementwise_affine=affine),
        nn.Linear(2000, 64),
        nn.ReLU(),
        nn.Linear(64, 3),
    ).to(dtype)
    with torch.no_grad():
        wide[2].weight[:, 7] = 0
        wide[4].weight[:, :8] = 0
    model_slim(wide, [torch.randn(2, 6, dtype=dtype)], round_multiplier=1)
    assert wide[0].out_features == 2000 and wide[2].out_features == 56


def test_a_batch_of_one_and_a_batch_of_keywords():
    configs = [
        parse_auto_slim_config(bert(), data, ffn2_sparsity=0.5)
        for data in (tokens(1), [(torch.randint(0, 50, (1, 10)), torch.zeros(1))], [{"input_ids": tokens(1)[0][0]}])
    ]
    assert configs[0] == configs[1] == configs[2] and len(configs[0]) == 1
    assert parse_auto_slim_config(bert()) == []


def test_auto_slim_finds_nothing():
    with pytest.raises(
        ValueError, match=r"mha_sparsity: ResNet has no attention with removable heads, got 0\.5; set it to 0"
    ):
        parse_auto_slim_config(ResNet(), [torch.randn(2, 3, 8, 8)], mha_sparsity=0.5)
    with pytest.raises(ValueError, match="ffn2_sparsity: ResNet has no two consecutive linear layers"):
        parse_auto_slim_config(ResNet(), [torch.randn(2, 3, 8, 8)], ffn2_sparsity=0.5)
    with pytest.raises(ValueError, match=r"ffn2_sparsity: must be at least 0 and below 1, got 1\.5"):
        parse_auto_slim_config(ResNet(), [torch.randn(2, 3, 8, 8)], ffn2_sparsity=1.5)
    for share in ("0.5", True):
        with pytest.raises(ValueError, match=f"mha_sparsity: must be at least 0 and below 1, got {share!r}"):
            parse_auto_slim_config(ResNet(), mha_sparsity=share)
    with pytest.raises(ValueError, match="dataloader: has no batch"):
        parse_auto_slim_config(ResNet(), [], ffn2_sparsity=0.5)


def test_the_classifier_is_not_slimmed_and_not_excluded_in_secret():
    """pruning_2.x/test_auto_excluding_classifier.py: auto slim leaves the last layer; masks prune what is named"""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    (config,) = parse_auto_slim_config(model, [torch.randn(2, 32)], ffn2_sparsity=0.5)
    assert config["op_names"] == ["^2$"]
    prune = Pruning(WeightPruningConfig(start_step=1, end_step=2))
    prune.model = model
    prune.on_train_begin()
    assert prune.pruners[0].names == ("0.weight", "2.weight", "4.weight")


def test_no_warning_where_nothing_is_odd():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WeightPruningConfig(BASIC, target_sparsity=0.8, start_step=1, end_step=10)
