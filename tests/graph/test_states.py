"""First states of zeros, made in ``forward``: as wide as the weights that read them, and cut with these."""

import pytest
import torch
from torch import nn

from pruning_core import ChannelGraph, slim_

SERIES = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).double()


class Cell(nn.Module):
    """A recurrent cell written by hand."""

    def __init__(self, step, state=lambda x, width: torch.zeros(len(x), width, dtype=x.dtype), gates=1):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.step, self.state = 16, step, state
        self.read, self.again = nn.Linear(5, gates * 16), nn.Linear(16, gates * 16)
        self.cell, self.out = nn.GRUCell(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.state(x, self.hidden)
        c = torch.zeros_like(h)
        for at in range(x.shape[1]):
            h, c = self.step(self, x[:, at], h, c)
        return self.out(h)


def plain(m, x, h, c):
    return (m.read(x) + m.again(h)).tanh(), c


def leaky(m, x, h, c):
    return 0.5 * h + (m.read(x) + m.again(h)).tanh(), c


def memory(m, x, h, c):
    c = 0.9 * c + plain(m, x, h, c)[0]
    return c.tanh(), c


def lstm(m, x, h, c):
    i, f, o, u = (m.read(x) + m.again(h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * u.tanh()
    return o.sigmoid() * c.tanh(), c


def of_torch(m, x, h, c):
    return m.cell(x, h), c


STATES = {
    "zeros": lambda x, width: torch.zeros(len(x), width, dtype=x.dtype),
    "new_zeros": lambda x, width: x.new_zeros(len(x), width),
    "ones": lambda x, width: torch.ones(len(x), width, dtype=x.dtype),
    "full": lambda x, width: torch.full((len(x), width), 0.3, dtype=x.dtype),
    "expanded": lambda x, width: torch.zeros(1, width, dtype=x.dtype).expand(len(x), -1),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize(("step", "gates"), [(plain, 1), (leaky, 1), (memory, 1), (lstm, 4), (of_torch, 1)])
def test_a_first_state_loses_what_the_weights_lose_that_read_it(step, gates, state):
    model = Cell(step, state, gates).double()
    graph = ChannelGraph.trace(model, SERIES)
    assert [len(group) for group in graph.groups.values()] == [16]
    done = slim_(model, graph.plan(graph.restored({name: [0, 1, 5] for name in graph.groups})))
    assert done.difference < 1e-12 and model.hidden == 13 == model.out.in_features


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_states_that_are_handed_to_a_layer(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.hidden, self.layer, self.out = 16, kind(5, 16, num_layers=2, batch_first=True), nn.Linear(16, 3)

        def forward(self, x):
            return self.out(self.layer(x, torch.zeros(2, len(x), self.hidden, dtype=x.dtype))[0])

    model = Net().double()
    graph = ChannelGraph.trace(model, SERIES)
    assert slim_(model, graph.plan({name: [0, 1, 5] for name in graph.groups})).difference < 1e-12
    assert model.hidden == 13


def test_a_state_of_a_width_written_as_a_number_freezes_with_its_place():
    model = Cell(plain, lambda x, width: torch.zeros(len(x), 16, dtype=x.dtype)).double()
    graph = ChannelGraph.trace(model, SERIES)
    assert not graph.groups
    assert any("its code does not follow" in why for _, _, why in graph.frozen())
