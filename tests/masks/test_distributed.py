"""Two and three real processes (gloo): DistributedDataParallel and fully_shard. Scenarios: distributed_worker.py."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from pruning_core import checkpoint
from pruning_core.cli.inspection import inspect
from tests.support import ROOT
from tests.support.masks_two_ranks import (
    DDP,
    LASSOS,
    ON_2,
    ON_3,
    RESUMABLE,
    RESUME_AT,
    RESUMED,
    SPOILED,
    Training,
    error_of,
)

pytestmark = pytest.mark.slow
WORKER = ROOT / "tests/support/masks_two_ranks.py"
RANKS = {"two": 2, "three": 3}
Results = list[dict[str, Any]]


def launch(folder: Path, stage: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS[stage])]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "PYTHONPATH": os.pathsep.join(paths)}
    command += [str(WORKER), str(folder), stage]
    with (folder / f"{stage}.log").open("w") as log:
        child = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = child.wait(timeout=120)  # the ranks end themselves before that
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
    (folder / f"{stage}.json").write_text(json.dumps(code))


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """``ran(stage)``: what each rank left. Each stage runs once, also when pytest itself runs in several processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    folder.mkdir(exist_ok=True)

    @cache
    def results(stage: str) -> Results:
        if stage != "two":
            results("two")  # the other loads what it saved
        with FileLock(folder / f"{stage}.lock", timeout=300):
            if not (folder / f"{stage}.json").exists():
                launch(folder, stage)
        log = (folder / f"{stage}.log").read_text()
        assert json.loads((folder / f"{stage}.json").read_text()) == 0, f"stage {stage} failed:\n{log[-6000:]}"
        return [checkpoint.load(folder / f"{stage}-{rank}.pt") for rank in range(RANKS[stage])]

    results.folder = folder  # type: ignore[attr-defined]
    return results


def the_same(left: Any, right: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(the_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(the_same, left, right))
    return left == right


def joined(slices: Results, what: str) -> dict[str, Tensor]:
    """The slices of all ranks, put together."""
    return {name: torch.cat([each[what][name] for each in slices]) for name in slices[0][what]}


def reference(results: Results, name: str) -> dict[str, Any]:
    return next(each["reference"][name] for each in results if name in each["reference"])


def unequal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not the_same(left[name], right[name])]


def check_sharded(results: Results, name: str, against: str = "") -> None:
    slices, alone = [each[name] for each in results], reference(results, against or name)
    # Where a unit reaches over a border, its score is the sum of the ranks' sums: the last bit may differ from that of
    # one sum. That changes a mask only where two units tie up to rounding, which the random weights here never do.
    assert unequal(joined(slices, "masks"), alone["masks"]) == []
    assert unequal(joined(slices, "parameters"), alone["parameters"]) == []
    for each in slices:
        assert the_same(each["report"], alone["report"])
        assert each["step"] == alone["step"]
    cut = sum(int((~mask).sum()) for mask in alone["masks"].values())
    assert cut > 0


def reached_is_asked(report: dict[str, Any], unit: int) -> bool:
    """Never above, and less than one unit below."""
    group = report["groups"][0]
    weights, zeros = (sum(layer[key] for layer in group["layers"]) for key in ("weights", "zeros"))
    return group["asked"] == group["target"] and 0 <= group["target"] * weights - zeros + 0.5 < unit + 0.5


# ---- fully_shard -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_2)
def test_sharded_run_equals_the_unsharded_one(ran, name):
    check_sharded(ran("two"), name)


@pytest.mark.parametrize("name", ON_3)
def test_three_ranks_with_uneven_and_empty_slices(ran, name):
    check_sharded(ran("three"), name)


@pytest.mark.parametrize("mesh", ["hybrid (1, 2)", "hybrid (2, 1)"])
def test_hybrid_sharding(ran, mesh):
    results = ran("two")
    if mesh == "hybrid (2, 1)":  # two replicas, each whole
        assert the_same(results[0][mesh], results[1][mesh])
        assert unequal(results[0][mesh]["masks"], reference(results, "hybrid")["masks"]) == []
    else:
        check_sharded(results, mesh, against="hybrid")


def test_layers_that_fully_shard_wrapped_one_by_one_keep_their_class_names(ran):
    check_sharded(ran("two"), "each")


def test_weights_that_are_not_pruned_may_be_sharded_otherwise(ran):
    for each in ran("two"):
        assert the_same(each["spared"]["report"], reference(ran("two"), "spared")["report"])
    two = joined([each["spared"] for each in ran("two")], "masks")
    assert unequal(two, reference(ran("two"), "spared")["masks"]) == []


@pytest.mark.parametrize("name", LASSOS)
def test_group_lasso_of_units_over_borders(ran, name):
    slices, alone = [each[name] for each in ran("two")], reference(ran("two"), name)
    assert unequal(joined(slices, "masks"), alone["masks"]) == []
    for key, value in joined(slices, "parameters").items():  # norms are sums over ranks: up to rounding
        assert torch.allclose(value, alone["parameters"][key], rtol=0, atol=1e-6), key


def test_group_lasso_does_something(ran):
    lasso, plain = (reference(ran("two"), name) for name in ("lasso 4x1", "4x1 snip_momentum global"))
    assert unequal(lasso["parameters"], plain["parameters"])


def test_evaluation_and_reports_between_steps(ran):
    check_sharded(ran("two"), "late")


def test_a_gradient_that_overflows_on_one_rank_changes_no_score_on_any(ran):
    for each in ran("two"):
        assert the_same(each["skipping"]["before"], each["skipping"]["after"])
        assert each["skipping"]["after"]["step"] == 3
    check_sharded(ran("two"), "skipping")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_grad_scaler_skips_on_all_ranks(ran, fused, explicit):
    for each in ran("two"):
        result = each[f"scaler {fused=} {explicit=}"]
        assert result["steps"] == [1, 2, 3, 3, 4, 5]
        assert all(parameter.isfinite().all() for parameter in result["parameters"].values())
        assert reached_is_asked(result["report"], 4)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_bytes_sent_do_not_grow_with_the_weights(ran, scope):
    for each in ran("two"):
        for pattern in ("1x1", "4x1"):
            few, sixteen_times, odd = (each[f"bytes {pattern} {scope} {width}"] for width in (16, 64, 20))
            assert few == sixteen_times > 0
            # three layers with one row of 20 units over the border: a float32 score and a one-byte verdict each
            assert odd - few == (3 * 20 * (4 + 1) if pattern == "4x1" else 0)


# ---- DistributedDataParallel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DDP)
def test_data_parallel_ranks_reach_the_same_masks(ran, name):
    first, second = (each[name] for each in ran("two"))
    assert the_same(first, second)
    assert list(first["masks"]) == ["0.weight", "2.weight", "4.weight"]  # op_names ^0$ match below the wrapper
    assert reached_is_asked(first["report"], {"ddp attached": 1, "ddp hooks": 4, "ddp progressive": 6}[name])
    assert unequal(first["parameters"], reference(ran("two"), name)["parameters"])  # rank 1's data counted too


@pytest.mark.parametrize("kind", ["snip_momentum", "snip_momentum_progressive"])
@pytest.mark.parametrize("what", SPOILED)
def test_diverged_ranks_all_stop_at_the_next_mask_update(ran, what, kind):
    for each in ran("two"):
        result = each[f"{what}, {kind}"]
        assert re.match(r"masks of \d weights differ between ranks at step \d, first .*\d\.weight", result["error"])
        assert "2.weight" in result["error"] or what != "mask"
        assert result["step"] == 5 or (kind == "snip_momentum_progressive" and result["step"] == 4)


@pytest.mark.parametrize("kind", ["snip_momentum", "snip_momentum_progressive"])
def test_ranks_that_were_never_synchronized(ran, kind):
    for each in ran("two"):
        assert re.search("differ between ranks at step 3, .*DistributedDataParallel", each[f"no ddp, {kind}"]["error"])


@pytest.mark.parametrize("kind", ["snip_momentum", "snip_momentum_progressive"])
@pytest.mark.parametrize("what", SPOILED)
def test_repair_takes_masks_and_weights_of_rank_0(ran, what, kind):
    first, second = (each[f"repaired {what}, {kind}"] for each in ran("two"))
    assert first["error"] is second["error"] is None
    assert first["step"] == second["step"] == 8
    masks = [[step["masks"] for step in each["history"]] for each in (first, second)]
    assert the_same(masks[0][4:], masks[1][4:])  # step 4 ends with the update of step 5
    assert the_same(masks[0][:3], masks[1][:3])
    if what == "mask":
        assert kind != "snip_momentum" or not the_same(masks[0][3], masks[1][3])
    else:
        assert not the_same(first["parameters"], second["parameters"])  # rank 1 did go astray
    if kind == "snip_momentum":
        assert the_same(*(each["history"][4]["weight"] for each in (first, second)))
    assert first["doomed"] == second["doomed"]
    assert all(reached_is_asked(each["report"], 1) for each in (first, second))


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESUMABLE)
def test_resumed_ranks_equal_uninterrupted_ones(ran, name):
    for each in ran("two"):
        assert the_same(each[f"uninterrupted {name}"], each[f"resumed {name}"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_progressive_run_was_interrupted_between_two_updates(ran, kind):
    ran("two")
    group = checkpoint.load(ran.folder / f"{kind} progressive-0.pt")["pruner"]["groups"][0]
    assert group["structured_at"] < group["updated_at"] == RESUME_AT
    assert any(not the_same(each["keep"], each["whole_units"]) for each in group["weights"].values())


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("columns", r"0\.weight: only weights sharded once, along their first axis, .*without a shard_placement_fn"),
        (
            "in part",
            r"pruning_configs\[0\]: .* got 0\.weight over ranks \[0, 1\] and 2\.weight whole; call fully_shard",
        ),
        ("N:M", r"0\.weight: under fully_shard the 6 rows of a rank must be a multiple of 4, got pattern 2:4"),
        (
            "groups",
            r"0\.attention\.in_proj_weight: .*10 channels of each group must be a multiple of 4, got pattern 4x1",
        ),
        ("copy", r"mask_: 0\.weight is not in that model, got \(12, 16\) for \(6, 16\); pass a copy, sharded alike"),
    ],
)
def test_refused(ran, what, message):
    for each in ran("two"):
        assert re.match(message, each[f"refused {what}"])


def test_a_slice_is_not_loaded_on_another_number_of_ranks(ran):
    for rank, each in enumerate(ran("three")):
        held = f"the state is of slice {min(rank, 1)} of 2, got rank {rank} of 3"
        assert re.match(f"load_state_dict: {held}", each["refused state"])


def test_a_slice_cannot_be_inspected(ran):
    ran("two")
    with pytest.raises(checkpoint.CheckpointError, match="one rank's slices of sharded weights; inspect a full state"):
        inspect(ran.folder / "fsdp basic-1.pt")


def test_a_slice_is_not_loaded_into_a_whole_model(ran):
    ran("two")
    state = checkpoint.load(ran.folder / "fsdp basic-1.pt")["pruner"]
    training = Training(RESUMED["basic"]).begin()
    assert "slice 1 of 2, got rank 0 of 1" in error_of(lambda: training.pruner.load_state_dict(state))
