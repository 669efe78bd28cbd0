"""``masked_``: dense, and yet what the cut model computes."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from transformers import LlamaConfig, LlamaForCausalLM

from pruning_core.channels import plan_channels
from pruning_core.graph import ChannelGraph, GraphError, Plan, masked_, slim_

IDS = torch.arange(3, 15)[None]


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Linear(6, 24)
        self.norms = nn.ModuleList(norm() for _ in range(2))
        self.up = nn.Linear(24, 32)
        self.down = nn.Linear(32, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        x = self.stem(x).sigmoid()
        x = x + self.down(self.up(self.norms[0](x)).sigmoid())
        return self.head(self.norms[1](x))


def images(norm):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.Sigmoid(), nn.Conv2d(16, 24, 3, padding=1), norm(24), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def llama():
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=4, num_key_value_heads=2, use_cache=False))


class OneHead(nn.Module):
    """Queries and keys are summed with each other: no weight reads them."""

    def __init__(self, scale=1.0, heads=1):
        super().__init__()
        self.stem, self.out = nn.Linear(6, 24), nn.Linear(24, 3)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.scale, self.heads = scale, heads

    def forward(self, x):
        x = self.stem(x).sigmoid()
        q, k, v = (
            f(x)[None].unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        x = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(x.transpose(1, 2).flatten(2)[0])


class ChannelsFirst(nn.LayerNorm):
    """As torchvision's and timm's LayerNorm2d: over dimension 1, by a layer norm of the moved image."""

    def forward(self, x):
        x = nn.functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ByHand(nn.Module):
    """Over dimension 1, from the mean of squares."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]


class Gated(nn.Module):
    """A norm of a product with a second argument, as in Mamba-2."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x, gate):
        x = x * gate.sigmoid()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class TiedNorms(Residual):
    """Two norms with one weight, which has the name of the first."""

    def __init__(self):
        super().__init__(lambda: nn.RMSNorm(24))
        self.norms[1].weight = self.norms[0].weight


class WithGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.norm, self.head = nn.Linear(6, 24), nn.Linear(6, 24), Gated(24), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.norm(self.stem(x), gate=self.gate(x)))


ROWS, IMAGE = torch.randn(5, 6, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)
CASES = {
    "layer norm": (lambda: Residual(lambda: nn.LayerNorm(24)), ROWS),
    "layer norm without bias": (lambda: Residual(lambda: nn.LayerNorm(24, bias=False)), ROWS),
    "rms norm": (lambda: Residual(lambda: nn.RMSNorm(24)), ROWS),
    "batch norm": (lambda: images(nn.BatchNorm2d), IMAGE),
    "one group": (lambda: images(lambda n: nn.GroupNorm(1, n)), IMAGE),
    "four groups": (lambda: images(lambda n: nn.GroupNorm(4, n)), IMAGE),
    "groups of one": (lambda: images(lambda n: nn.GroupNorm(n, n)), IMAGE),
    "layer norm over dimension 1": (lambda: images(ChannelsFirst), IMAGE),
    "torchvision's LayerNorm2d": (lambda: images(LayerNorm2d), IMAGE),
    "norm by hand over dimension 1": (lambda: images(ByHand), IMAGE),
    "norm by hand with a gate": (WithGate, ROWS),
    "norms with one weight": (TiedNorms, ROWS),
    "transformers' own norm": (llama, IDS),
}


def output(model, inputs):
    found = model(inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("case", CASES)
def test_masked_is_slim(case):
    build, inputs = CASES[case]
    torch.manual_seed(0)
    model = build().double() if inputs.is_floating_point() else build()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        assert parameter.requires_grad, name
    model.eval()
    dense = output(model, inputs).detach()
    plan = plan_channels(ChannelGraph.trace(model, inputs), {"params": 0.5}, criterion="random", scope="local")
    small = copy.deepcopy(model)
    slim_(small, plan, example_inputs=inputs)

    masked = masked_(model, plan)
    near = {"rtol": 1e-9, "atol": 1e-12} if inputs.is_floating_point() else {"rtol": 1e-4, "atol": 1e-5}
    for training in (False, True):
        model.train(training)
        small.train(training)
        torch.testing.assert_close(output(model, inputs), output(small, inputs), **near)
    for each in (model, small):
        each.zero_grad()
        output(each, inputs).square().mean().backward()
    kept = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        grad = kept[name].grad
        for axis in plan.removed:
            if axis.tensor == name:
                grad = grad.index_select(axis.dim, torch.tensor(plan.kept(axis)))
        torch.testing.assert_close(parameter.grad, grad, **near)

    masked.undo()
    model.eval()
    if "batch" not in case:
        assert torch.equal(output(model, inputs), dense)


@pytest.mark.parametrize("heads", [1, 4])
def test_channels_that_are_multiplied_with_each_other_cannot_be_masked(heads):
    model = OneHead(heads=heads).double()
    graph = ChannelGraph.trace(model, ROWS, narrow_heads=True)
    plan = Plan.from_dict(graph.plan(graph.restored({"query.weight:0": [0], "out.weight:1": [0]})).to_dict())
    with pytest.raises(GraphError, match=r"^scaled_dot_product_attention in the model: multiplies removed channels"):
        masked_(model, plan)
    slim_(copy.deepcopy(model), plan, example_inputs=ROWS)
    rest = graph.plan({"stem.weight:0": [0, 1]})
    small, dense = copy.deepcopy(model), model
    slim_(small, rest, example_inputs=ROWS)
    masked_(dense, rest)
    torch.testing.assert_close(dense(ROWS), small(ROWS))


def test_what_cannot_be_masked():
    class Free(Residual):
        def forward(self, x):
            x = self.stem(x)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.head(x)

    model = Free(nn.Identity).eval()
    rows = ROWS.float()
    plan = plan_channels(ChannelGraph.trace(model, rows), {"params": 0.9})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(GraphError, match=r"^the model: takes statistics over channels outside of a norm"):
        masked_(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    slim_(model, plan, example_inputs=rows)
    with pytest.raises(GraphError, match=r"^plan: is for another model"):
        masked_(model, plan)
