"""The Lightning lines of docs/loops.md, taken from there, in Lightning's own loop."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pruning_core import checkpoint
from tests.support import ROOT

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers and devices

PAGE = ROOT / "docs" / "loops.md"
LINES = re.search(r"<!-- run: lightning -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
CONFIG = {"pattern": "1x1", "start_step": 2, "end_step": 14, "pruning_frequency": 2}


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def prune(config=CONFIG):
    names = {"__name__": "loops"}
    exec(LINES, names)
    return names["Prune"](config)


def fitted(callback, folder, *, ckpt_path=None, epochs=3, **more):
    torch.manual_seed(0)
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=4)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback, saving], **quiet, **more)
    model = Net()
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_documented_lines_reach_the_target(tmp_path, accumulation):
    callback = prune()
    more = {"accumulate_grad_batches": accumulation, "gradient_clip_val": 1.0}
    model = fitted(callback, tmp_path, **more)
    assert callback.pruner.step == 36 // accumulation
    (group,) = callback.pruner.report().groups
    assert group.zeros == round(0.8 * group.weights)
    for name, mask in callback.pruner.masks().items():
        assert not model.get_parameter(name)[~mask].any()


def test_a_resumed_fit_is_the_uninterrupted_fit(tmp_path):
    """The checkpoint after the first epoch, at step 12, is amid the window; it holds tensors and plain data only."""
    whole, again = prune(), prune()
    model = fitted(whole, tmp_path)
    saved = tmp_path / "epoch=0.ckpt"
    assert checkpoint.load(saved)["callbacks"]
    resumed = fitted(again, tmp_path / "again", ckpt_path=saved)
    assert again.pruner.step == whole.pruner.step == 36
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, mask in whole.pruner.masks().items():
        assert torch.equal(mask, again.pruner.masks()[name])
