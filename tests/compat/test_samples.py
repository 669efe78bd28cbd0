"""The documented samples of Neural Compressor's two pruning APIs, verbatim, with only their import line changed."""

import math
import types

import pytest
import torch
from torch import nn

from tests.support.loops import batch, small_net
from tests.support.samples import NEURAL_COMPRESSOR_YAML

TEMPLATE = """\
model = Model()
criterion = Criterion()
optimizer = Optimizer()
args = Args()

from pruning_core import Pruning

pruner = Pruning("path/to/your/config.yaml")
if opt.do_prune:
    start, end = nw, int(total_iterations)
else:
    start = nb * epochs + 1
    end = start
pruner.update_items_for_all_pruners(start_step=start, end_step=end)
pruner.model = model
pruner.on_train_begin()
for epoch in range(start_epoch, epochs):
    callbacks.run('on_train_epoch_start')
    model.train()
    for i, (imgs, targets, paths, _) in pbar:
        ni = i + nb * epoch  # number integrated batches (since train start)
        imgs = imgs.to(device, non_blocking=True).float() / 255
        # Forward
        with torch.cuda.amp.autocast(amp):
            pruner.on_step_begin(local_step=ni)
            pred = model(imgs)  # forward
            loss, loss_items = compute_loss(pred, targets.to(device))  # loss scaled by batch_size
        # Backward
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # unscale gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)  # clip gradients
        pruner.on_before_optimizer_step()
        scaler.step(optimizer)  # optimizer.step
        pruner.on_after_optimizer_step()
        scaler.update()
        optimizer.zero_grad()
"""

SAMPLE = """\
    configs = [
            { ## pruner1
                'target_sparsity': 0.9,   # Target sparsity ratio of modules.
                'pruning_type': "snip_momentum", # Default pruning type.
                'pattern': "4x1", # Default pruning pattern.
                'op_names': ['layer1.*'],  # A list of modules that would be pruned.
                'excluded_op_names': ['layer3.*'],  # A list of modules that would not be pruned.
                'start_step': 0,  # Step at which to begin pruning.
                'end_step': 10,   # Step at which to end pruning.
                'pruning_scope': "global", # Default pruning scope.
                'pruning_frequency': 1, # Frequency of applying pruning.
                'min_sparsity_ratio_per_op': 0.0,  # Minimum sparsity ratio of each module.
                'max_sparsity_ratio_per_op': 0.98, # Maximum sparsity ratio of each module.
                'sparsity_decay_type': "exp", # Function applied to control pruning rate.
                'pruning_op_types': ['Conv', 'Linear'], # Types of op that would be pruned.
            },
            { ## pruner2
                "op_names": ['layer3.*'], # A list of modules that would be pruned.
                "pruning_type": "snip_momentum_progressive",   # Pruning type for the listed ops.
                # 'target_sparsity'
            } # For layer3, the missing target_sparsity would be complemented by default setting (i.e. 0.8)
        ]
"""

LOOP = '''\
    """ All you need is to insert following API functions to your codes:
    pruner.on_train_begin() # Setup pruner
    pruner.on_step_begin() # Prune weights
    pruner.on_before_optimizer_step() # Do weight regularization
    pruner.on_after_optimizer_step() # Update weights' criteria, mask weights
    """
    from pruning_core import Pruning, WeightPruningConfig
    config = WeightPruningConfig(configs)
    pruner = Pruning(config)  # Define a pruning object.
    pruner.model = model      # Set model object to prune.
    pruner.on_train_begin()
    for epoch in range(num_train_epochs):
        model.train()
        for step, batch in enumerate(train_dataloader):
            pruner.on_step_begin(step)
            outputs = model(**batch)
            loss = outputs.loss
            loss.backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_after_optimizer_step()
            lr_scheduler.step()
            model.zero_grad()
'''


class Yolo(nn.Module):
    """Names as in YOLOv5: model.0.conv, model.1.cv1.conv, model.33.m.0."""

    def __init__(self):
        super().__init__()

        def conv(i, o):
            return nn.ModuleDict({"conv": nn.Conv2d(i, o, 3, padding=1)})

        self.model = nn.ModuleDict(
            {
                "0": conv(3, 8),
                "1": nn.ModuleDict({"cv1": conv(8, 8), "cv2": conv(8, 8), "cv3": conv(8, 8)}),
                "33": nn.ModuleDict({"m": nn.ModuleList([nn.Conv2d(8, 5, 1)])}),
            }
        )

    def forward(self, x):
        x = self.model["0"]["conv"](x).relu()
        for layer in self.model["1"].values():
            x = layer["conv"](x).relu()
        return self.model["33"]["m"][0](x).mean((2, 3))


class Callbacks:
    def run(self, event):
        pass


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("do_prune", [True, False])
def test_the_template_of_the_yaml_api(do_prune, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to" / "your").mkdir(parents=True)
    (tmp_path / "path/to/your/config.yaml").write_text(NEURAL_COMPRESSOR_YAML)
    nb, epochs, nw = 5, 4, 6
    model = Yolo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = [(i, (batch(i)[0] * 255, batch(i)[1], None, None)) for i in range(nb)]

    def compute_loss(pred, targets):
        loss = nn.functional.cross_entropy(pred, targets)
        return loss, loss.detach()

    names = {
        **{"Model": lambda: model, "Criterion": object, "Optimizer": lambda: optimizer, "Args": object},
        **{"opt": types.SimpleNamespace(do_prune=do_prune), "nw": nw, "total_iterations": nb * epochs, "nb": nb},
        **{"epochs": epochs, "start_epoch": 0, "callbacks": Callbacks(), "pbar": batches, "device": "cpu"},
        **{"amp": False, "compute_loss": compute_loss, "scaler": torch.amp.GradScaler("cpu"), "torch": torch},
    }
    exec(TEMPLATE, names)
    pruner = names["pruner"]
    if not do_prune:
        assert all((p != 0).all() for p in model.parameters())
        return
    first, second = pruner.report().groups
    assert [row.name for row in first.layers] == ["model.0.conv.weight"]
    assert [row.name for row in second.layers] == [f"model.1.cv{i}.conv.weight" for i in (1, 2, 3)]
    assert first.zeros == math.floor(0.8 * first.weights + 0.5)
    assert second.weights * 0.8 - 4 < second.zeros <= second.weights * 0.8 + 0.5
    assert (model.model["33"]["m"][0].weight != 0).all()


class Layers(nn.Module):
    """Answers a loss for keyword batches, as `transformers` models do."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = nn.Sequential(nn.Flatten(), nn.Linear(192, 32)), nn.Linear(32, 16)
        self.layer3 = nn.Sequential(nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x, y):
        out = self.layer3(self.layer2(self.layer1(x)))
        return types.SimpleNamespace(loss=nn.functional.cross_entropy(out, y))


def outdented(text):
    import textwrap

    return textwrap.dedent(text)


@pytest.mark.parametrize("num_train_epochs", [1, 3])
@pytest.mark.filterwarnings("ignore:on_step_begin. the step went from")
def test_the_sample_of_the_dict_api(num_train_epochs):
    """Whether ten steps make one epoch or three: the target is reached when the tenth is over."""
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = {1: 10, 3: 4}[num_train_epochs]
    loader = [dict(zip(("x", "y"), batch(i), strict=True)) for i in range(steps)]
    names = {
        **{"model": model, "optimizer": optimizer, "num_train_epochs": num_train_epochs, "train_dataloader": loader},
        "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer),
    }
    exec(outdented(SAMPLE) + outdented(LOOP), names)
    first, second = names["pruner"].report().groups
    assert [row.name for row in first.layers] == ["layer1.1.weight"]
    assert [row.name for row in second.layers] == ["layer3.1.weight"]
    assert first.target == 0.9
    assert 0.9 * first.weights - 4 < first.zeros <= 0.9 * first.weights
    assert second.target == 0.8
    assert 0.8 * second.weights - 5 < second.zeros <= 0.8 * second.weights
    assert (model.layer2.weight != 0).all()


def test_user_functions_with_the_hooks_of_the_sample():
    from pruning_core import Pruning, WeightPruningConfig

    model, losses = small_net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prune = Pruning(WeightPruningConfig([{"end_step": 5}], pattern="1x1"))
    prune.model = model

    def f(model):
        for epoch in range(2):
            prune.on_epoch_begin(epoch)
            for step in range(3):
                prune.on_step_begin(3 * epoch + step)
                images, labels = batch(step)
                nn.functional.cross_entropy(model(images), labels).backward()
                prune.on_before_optimizer_step()
                optimizer.step()
                prune.on_after_optimizer_step()
                prune.on_step_end()
                optimizer.zero_grad()
            prune.on_epoch_end()

    prune.train_func = f
    prune.eval_func = lambda model: losses.append(1) or 0.5
    assert prune() is model
    assert len(losses) == 2
    assert prune.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)
