"""Models that draw random numbers in evaluation mode."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pruning_core import ChannelGraph, slim_

SERIES = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0)).double()


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.draw = nn.Linear(6, 12), nn.Linear(12, 5), draw

    def forward(self, x):
        return self.last(self.draw(self.first(x)))


DRAWS = {
    "dropout that is always on": lambda h: functional.dropout(h, 0.5),
    "in place": lambda h: functional.dropout(h * 1, 0.5, inplace=True),
    "of features": lambda h: functional.dropout1d(h.mT, 0.5).mT,
    "alpha": lambda h: functional.alpha_dropout(h, 0.5, training=True),
    "reparametrization": lambda h: h + torch.randn_like(h) * h.exp(),
    "rand_like": lambda h: h * torch.rand_like(h),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "normal_": lambda h: h + torch.empty_like(h).normal_(),
    "new_empty": lambda h: h + h.new_empty(h.shape).uniform_(),
    "randint_like": lambda h: h * torch.randint_like(h, 2),
    "attention": lambda h: (
        functional.scaled_dot_product_attention(*(h.unflatten(-1, (-1, 4)).transpose(1, 2),) * 3, None, 0.5)
        .transpose(1, 2)
        .flatten(2)
    ),
    "beside the channels": lambda h: h * torch.rand(h.shape[1], 1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_draws_in_evaluation_mode_can_be_cut(draw):
    model = Draws(draw).double().eval()
    torch.manual_seed(7)
    graph = ChannelGraph.trace(model, SERIES)
    assert sum(len(group) for group in graph.groups.values()) == (3 if draw is DRAWS["attention"] else 12)
    plan = graph.plan({name: [0] for name in graph.groups})
    assert slim_(model, plan).difference < 1e-12
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(state, torch.random.get_rng_state())  # and the user's generator has not moved
    assert not torch.equal(model(SERIES), model(SERIES))  # the model goes on drawing
