"""Plans as files, what they refuse, and the structure that makes a fresh model as slim as the one that was saved."""

import json

import pytest
import torch
from torch import nn

from pruning_core.graph import ChannelGraph, GraphError, Plan, apply_structure, expanded, slim_, structure
from pruning_core.graph.trace.labels import Axis
from tests.graph.test_attention import CASES as ATTENTION
from tests.graph.test_moves import CASES as MOVES
from tests.graph.test_operations import CASES as OPERATIONS
from tests.support.graph_reference import (
    Calls,
    assert_close,
    assert_same,
    chosen,
    double,
    head,
    made,
    reference,
    run,
    slimmed,
    stem,
)

EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def net(width=8):
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Sigmoid(), nn.Conv2d(width, 6, 3), nn.ReLU(), head(6)]
    return nn.Sequential(*layers).eval()


def planned(model, seed=0):
    graph = ChannelGraph.trace(model, EXAMPLE)
    return graph.plan(chosen(graph, seed))


# ---- plans as data --------------------------------------------------------------------------------------------------


def test_a_plan_is_the_same_after_a_round_trip_through_json_and_a_file(tmp_path):
    plan = planned(net())
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    slim, other = net(), net()
    other.load_state_dict(slim.state_dict())
    slim_(slim, plan, example_inputs=EXAMPLE)
    slim_(other, Plan.load(tmp_path / "plan.json"), example_inputs=EXAMPLE)
    assert_same(dict(other.state_dict()), dict(slim.state_dict()))


def test_a_plan_says_what_it_removes_in_ranges():
    plan = ChannelGraph.trace(net(), EXAMPLE).plan({"0.weight:0": [0, 1, 2, 7], "3.weight:0": []})
    data = plan.to_dict()
    assert data["axes"]["0.weight:0"] == {"size": 8, "removed": [[0, 2], [7, 7]]}
    assert data["axes"]["1.running_mean:0"] == data["axes"]["3.weight:1"] == data["axes"]["0.weight:0"]
    assert data["channels"] == {"0.weight:0": [[0, 2], [7, 7]]}
    assert data["consumers"] == ["3.weight:1"]
    assert plan.kept(Axis("0.bias", 0)).tolist() == [3, 4, 5, 6]


def test_an_empty_plan_is_false_and_a_plan_with_channels_true():
    graph = ChannelGraph.trace(net(), EXAMPLE)
    assert not graph.plan({}) and not graph.plan({"0.weight:0": []})
    assert graph.plan({"0.weight:0": [1]})


def test_the_difference_of_two_plans_is_counted_by_group():
    graph = ChannelGraph.trace(net(), EXAMPLE)
    first = graph.plan({"0.weight:0": [0, 1], "3.weight:0": [2]})
    assert first.difference(graph.plan({"0.weight:0": [1, 0], "3.weight:0": [2]})) == {}
    assert first.difference(graph.plan({"0.weight:0": [0, 2, 3], "3.weight:0": [2]})) == {"0.weight:0": (2, 3)}
    assert first.difference(graph.plan({})) == {"0.weight:0": (2, 0), "3.weight:0": (1, 0)}


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_json_and_one_that_is_no_plan(tmp_path):
    (tmp_path / "text").write_text("{")
    with pytest.raises(GraphError, match=r"text: is no JSON, got .*; give a file written by plan.save\(\)"):
        Plan.load(tmp_path / "text")
    for text in ("{}", '{"format": "pruning_core.channel_plan", "version": 2}', '{"format": "other", "version": 1}'):
        (tmp_path / "text").write_text(text)
        with pytest.raises(GraphError, match=r"plan: is no channel plan of version 1, got format .*; write it with"):
            Plan.load(tmp_path / "text")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"plan"'])
def test_a_file_of_other_json(tmp_path, text):
    (tmp_path / "text").write_text(text)
    with pytest.raises(GraphError, match=r"plan: is no channel plan of version 1"):
        Plan.load(tmp_path / "text")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("axes"),
        lambda data: data.pop("model"),
        lambda data: data["axes"].update({"0.weight": {"size": 8, "removed": []}}),
        lambda data: data["axes"]["0.weight:0"].pop("size"),
        lambda data: data["axes"]["0.weight:0"].update(removed=[[1]]),
        lambda data: data["axes"]["0.weight:0"].update(removed="all"),
        lambda data: data.update(channels=[]),
        lambda data: data.update(consumers=None),
    ],
)
def test_a_damaged_plan(damage):
    data = planned(net()).to_dict()
    damage(data)
    with pytest.raises(GraphError, match=r"plan: is damaged, got \w+: .*; make it again"):
        Plan.from_dict(data)


REFUSED = {
    r"plan: names a layer that the model lacks, got '9.weight'; make it for this model": {
        "9.weight:0": {"size": 8, "removed": [[0, 0]]}
    },
    r"plan: is for another model: 0.weight has shape \(8, 3, 3, 3\), the plan wants 16 at dimension 0": {
        "0.weight:0": {"size": 16, "removed": [[0, 0]]}
    },
    r"plan: is for another model: 0.weight has shape .*, the plan wants 8 at dimension 4": {
        "0.weight:4": {"size": 8, "removed": [[0, 0]]}
    },
    r"plan: 0.weight:0 removes an index that is not there; make it again": {
        "0.weight:0": {"size": 8, "removed": [[7, 8]]}
    },
    r"plan: 0.weight:0 removes all of its 8 indices, of which one must stay": {
        "0.weight:0": {"size": 8, "removed": [[0, 7]]}
    },
    r"cannot follow the cut at its conv2d": {"0.weight:0": {"size": 8, "removed": [[0, 0]]}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_is_cut(message):
    model = net()
    before = dict(model.state_dict())
    plan = Plan.from_dict({**planned(net()).to_dict(), "axes": REFUSED[message], "consumers": [], "channels": {}})
    with pytest.raises(GraphError, match=message):
        slim_(model, plan, example_inputs=EXAMPLE)
    assert_same(dict(model.state_dict()), before)
    assert structure(model) is None


def test_a_plan_for_another_model():
    with pytest.raises(GraphError, match=r"plan: is for another model: 0.weight has shape \(9, 3, 3, 3\)"):
        slim_(net(9), planned(net()), example_inputs=EXAMPLE)


def test_groups_and_channels_that_are_not_there():
    graph = ChannelGraph.trace(net(), EXAMPLE)
    with pytest.raises(GraphError, match=r"plan: there is no such group, got '0.bias:0'; see graph.groups"):
        graph.plan({"0.bias:0": [1]})
    for channels in (range(8), [8], [-1]):
        with pytest.raises(GraphError, match=r"plan: 0.weight:0 has 8 channels of which one must stay, got \[.*\]"):
            graph.plan({"0.weight:0": channels})


def halves(m, x):
    first, second = m.a(x).chunk(2, 1)
    return m.out(torch.cat([first, m.b(second)], 1))


def test_pieces_of_a_chunk_must_stay_equal():
    model = Calls(halves, {"a": stem(), "b": nn.Conv2d(4, 4, 1), "out": head()}, {})
    graph = ChannelGraph.trace(model, EXAMPLE)
    first, second = "a.weight:0", "a.weight:0#2"
    assert set(graph.groups) == {first, second, "b.weight:0"}
    with pytest.raises(GraphError, match=r"plan: the pieces of a chunk or split would differ in size"):
        graph.plan({first: [0]})
    assert graph.plan({first: [0], second: [3]})
    assert graph.restored({first: [0, 1, 2], second: [3]}, {graph.groups[first].members[1]: 1.0})[second] == [3]


def test_the_best_channels_are_given_back_first():
    model = Calls(halves, {"a": stem(), "b": nn.Conv2d(4, 4, 1), "out": head()}, {})
    graph = ChannelGraph.trace(model, EXAMPLE)
    first, second = graph.groups["a.weight:0"], graph.groups["a.weight:0#2"]
    score = dict(zip(first.members, [1.0, 4.0, 2.0, 3.0], strict=True))
    removed = graph.restored({first.name: [0, 1, 2], second.name: [3], "b.weight:0": [0]}, score)
    assert removed == {first.name: [0], second.name: [3], "b.weight:0": [0]}


# ---- structure ------------------------------------------------------------------------------------------------------

EACH = {case.name: case for case in [*OPERATIONS, *MOVES, *ATTENTION]}
STRUCTURES = [
    "depthwise_conv2d",
    "grouped_conv2d",
    "batch_norm2d",
    "frozen_batch_norm",
    "group_norm_of_single_channels",
]
STRUCTURES += ["layer_norm", "tied_head", "prelu_many", "chunk", "split_by_attribute", "channel_shuffle", "focus"]
STRUCTURES += ["windows", "fused_reshape", "multihead_attention", "transformer_encoder", "lstm_bidirectional", "gru"]
STRUCTURES += ["weight_norm", "lstm_projected", "depthwise_conv_transpose2d", "instance_norm_affine"]


def cut(case, seed=0):
    model, example = made(case), double(case.example(2))
    graph = ChannelGraph.trace(model, example)
    plan = graph.plan(chosen(graph, seed))
    return model, plan, slimmed(model, plan, example), example


NUMBERS = {
    "conv2d": ("0", {"in_channels": 3, "out_channels": 6}),
    "depthwise_conv2d": ("2", {"in_channels": 6, "out_channels": 6, "groups": 6}),
    "depthwise_with_multiplier": ("1", {"in_channels": 4, "out_channels": 8, "groups": 4}),
    "grouped_conv2d": ("2", {"in_channels": 4, "out_channels": 8, "groups": 4}),
    "grouped_conv_transpose2d": ("2", {"in_channels": 4, "out_channels": 8, "groups": 4}),
    "depthwise_conv_transpose2d": ("2", {"in_channels": 6, "out_channels": 6, "groups": 6}),
    "linear": ("2", {"in_features": 6, "out_features": 4}),
    "embedding": ("0", {"num_embeddings": 10, "embedding_dim": 6}),
    "batch_norm2d": ("1", {"num_features": 6}),
    "layer_norm": ("1", {"normalized_shape": (6,)}),
    "rms_norm": ("1", {"normalized_shape": (6,)}),
    "group_norm_1": ("1", {"num_channels": 6, "num_groups": 1}),
    "group_norm_4": ("1", {"num_channels": 8, "num_groups": 4}),
    "group_norm_of_single_channels": ("1", {"num_channels": 6, "num_groups": 6}),
    "prelu_many": ("1", {"num_parameters": 6}),
    "multihead_attention": ("mha", {"embed_dim": 9, "num_heads": 3, "head_dim": 3, "kdim": 9, "vdim": 9}),
    "gru": ("1", {"input_size": 5, "hidden_size": 4}),
    "lstm_projected": ("1", {"input_size": 5, "hidden_size": 4, "proj_size": 1}),
    "lstm_cell": ("cell", {"input_size": 5, "hidden_size": 4}),
    "split_by_attribute": ("", {"parts": [2, 3]}),
    "sdpa": ("", {"heads": 3, "head_dim": 3}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_modules_say_their_new_widths(name):
    """Of every group a quarter goes."""
    model, example = made(EACH[name]), double(EACH[name].example(2))
    graph = ChannelGraph.trace(model, example)
    removed = {key: range((len(group) + 3) // 4) for key, group in graph.groups.items()}
    slim = slimmed(model, graph.plan(removed), example)
    path, want = NUMBERS[name]
    assert {key: getattr(slim.get_submodule(path), key) for key in want} == want


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_fresh_model_takes_the_structure_and_then_the_weights(name, tmp_path):
    case = EACH[name]
    _, _, slim, example = cut(case)
    torch.save(slim.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "structure.json").write_text(json.dumps(structure(slim)))
    fresh = case.build().double().eval()
    apply_structure(fresh, json.loads((tmp_path / "structure.json").read_text()))
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same(run(fresh, example), run(slim, example))
    assert structure(fresh) == json.loads(json.dumps(structure(slim)))
    assert repr(fresh) == repr(slim)


@pytest.mark.parametrize("name", [each for each in STRUCTURES if "norm" not in each and "transformer" not in each])
def test_the_expanded_state_makes_the_dense_model_compute_the_same(name):
    model, plan, slim, example = cut(EACH[name])
    dense = EACH[name].build().double().eval()
    dense.load_state_dict(expanded(slim.state_dict(), structure(slim)))
    assert_close(run(dense, example), run(slim, example))
    assert_close(run(dense, example), run(reference(model, plan, EACH[name].reader), example))


def test_expanding_pads_with_zeros_at_the_removed_places_only():
    model = net()
    plan = ChannelGraph.trace(model, EXAMPLE).plan({"0.weight:0": [1, 6]})
    slim = slimmed(model, plan, EXAMPLE)
    full = expanded(slim.state_dict(), structure(slim))
    assert {name: each.shape for name, each in full.items()} == {k: v.shape for k, v in model.state_dict().items()}
    gone = torch.tensor([1, 6])
    assert not full["0.weight"][gone].any() and not full["3.weight"][:, gone].any()
    kept = torch.tensor([0, 2, 3, 4, 5, 7])
    assert_same(full["0.weight"][kept], model[0].weight[kept].detach())
    assert_same(full["1.num_batches_tracked"], model[1].num_batches_tracked)


def test_the_history_of_two_cuts_is_one_structure():
    model = net()
    first = slimmed(model, ChannelGraph.trace(model, EXAMPLE).plan({"0.weight:0": [0, 5], "3.weight:0": [2]}), EXAMPLE)
    slim = slimmed(first, ChannelGraph.trace(first, EXAMPLE).plan({"0.weight:0": [1, 5]}), EXAMPLE)
    found = structure(slim)
    assert found["kept"]["0.weight:0"] == {"size": 8, "at": [[1, 1], [3, 4], [6, 6]]}
    assert found["kept"]["3.weight:0"] == {"size": 6, "at": [[0, 1], [3, 5]]}
    assert structure(first)["kept"]["0.weight:0"] == {"size": 8, "at": [[1, 4], [6, 7]]}
    fresh = net()
    apply_structure(fresh, found)
    fresh.load_state_dict(slim.state_dict())
    assert_same(run(fresh, EXAMPLE), run(slim, EXAMPLE))
    dense = net()
    dense.load_state_dict(expanded(slim.state_dict(), found))
    torch.testing.assert_close(run(dense, EXAMPLE), run(slim, EXAMPLE))


def test_structures_that_do_not_fit():
    model = net()
    assert structure(model) is None
    found = structure(slimmed(model, planned(model), EXAMPLE))
    with pytest.raises(GraphError, match=r"structure: is none of version 1, got format None version None; give what"):
        apply_structure(net(), {})
    with pytest.raises(GraphError, match=r"plan: is for another model: 0.weight has shape"):
        apply_structure(net(9), found)
    with pytest.raises(GraphError, match=r"plan: names a layer that the model lacks, got '0.weight'"):
        apply_structure(nn.Linear(2, 2), found)
    other = net()
    with pytest.raises(GraphError, match=r"structure: names a module that the model lacks, got 'body'; build the same"):
        apply_structure(other, {**found, "attributes": {"body": {"width": 3}}})


def test_values_stay_where_they_were_when_a_structure_is_applied():
    model = net()
    slim = slimmed(model, planned(model), EXAMPLE)
    apply_structure(model, structure(slim))
    assert_same(dict(model.state_dict()), dict(slim.state_dict()))
