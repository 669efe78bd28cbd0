"""The table of what a plan leaves."""

import json

import pytest
import torch
from torch import nn

from pruning_core.channels import ChannelReport, plan_channels
from pruning_core.graph import ChannelGraph, slim_

IMAGE = torch.randn(1, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def planned():
    torch.manual_seed(0)
    model = Net()
    graph = ChannelGraph.trace(model, IMAGE)
    return model, graph, plan_channels(graph, {"channels": 0.5}, scope="local")


def test_it_says_what_slim_does(planned, tmp_path):
    model, graph, plan = planned
    report = ChannelReport.of(graph, plan)
    slim_(model, plan, example_inputs=IMAGE)
    rows = {row.name: row for row in report.layers}
    assert {name: row.kept for name, row in rows.items()} == {
        "stem.weight": model.stem.out_channels,
        "body.weight": model.body.out_channels,
        "head.weight": 4,
        "unused.weight": 2,
    }
    assert report.params[1] == sum(each.numel() for each in model.parameters())
    assert rows["head.weight"].stays == 4
    report.save_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["params"] == list(report.params)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[1:4] == b"PNG"


def test_the_text(planned):
    _, graph, _ = planned
    text = str(ChannelReport.of(graph))
    assert "head.weight    4x16" in text
    assert "4: is an output" in text
    assert "24 channels in 2 groups can be removed" in text
    assert "note: 2 parameters are not used on these inputs and stay unchanged: unused.weight, unused.bias" in text


def test_a_table_has_the_channels_that_it_gives_not_its_rows():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 3))
    words = torch.arange(6)[None]
    graph = ChannelGraph.trace(model, words)
    table, head = ChannelReport.of(graph, graph.plan({"0.weight:1": [1, 2]})).layers
    assert (table.channels, table.kept, table.stays) == (8, 6, 0) and head.stays == 3
