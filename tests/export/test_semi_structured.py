"""2:4 weights and the kernels of torch that take them: the rules, and what is said where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.sparse import semi_structured as torchs

from pruning_core import CheckpointError
from pruning_core.export import check_semi_structured, semi_structured, to_semi_structured_


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> nn.Linear:
    layer = nn.Linear(columns, rows).to(dtype)
    with torch.no_grad():
        layer.weight.unflatten(1, (-1, 4))[..., 1:3] = 0
    return layer


def test_the_rules_are_those_of_torch():
    theirs = {
        "CUTLASS": torchs.SparseSemiStructuredTensorCUTLASS,
        "cuSPARSELt": torchs.SparseSemiStructuredTensorCUSPARSELT,
    }
    for kernel, rules in semi_structured.RULES.items():
        for dtype, rule in rules.items():
            limits = theirs[kernel]._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert (limits.sparse_min_rows, limits.sparse_min_cols) == (rule.rows, rule.columns)


CASES = {
    "both": (lambda: two_of_four(32, 64), None, None),
    "bf16": (lambda: two_of_four(64, 128, torch.bfloat16), None, None),
    "small": (lambda: two_of_four(16, 16), "shape must be multiples of 32x64", None),
    "odd": (lambda: two_of_four(24, 64), "shape must be multiples of 32x64", "shape must be multiples of 16x16"),
    "fp32": (lambda: two_of_four(32, 64, torch.float32), *["dtype must be float16 or bfloat16"] * 2),
    "dense": (lambda: nn.Linear(64, 32).half(), *["is not 2:4 along its inputs"] * 2),
    "empty": (lambda: nn.Linear(4, 0).half(), *["is not 2:4 along its inputs"] * 2),
    "without inputs": (lambda: nn.Linear(0, 4).half(), *["is not 2:4 along its inputs"] * 2),
    "ragged": (lambda: nn.Linear(30, 32).half(), *["is not 2:4 along its inputs"] * 2),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", CASES)
def test_which_layers_fit(name):
    make, cutlass, cusparselt = CASES[name]
    (layer,) = check_semi_structured(nn.Sequential(make(), nn.Conv2d(4, 4, 1)))
    assert layer.name == "0" and layer.why_not == {"CUTLASS": cutlass, "cuSPARSELt": cusparselt}


def test_how_a_layer_reads():
    lines = [str(layer) for layer in check_semi_structured(nn.Sequential(two_of_four(16, 16), nn.Linear(4, 8)))]
    assert lines == [
        "0 16x16 float16: CUTLASS: shape must be multiples of 32x64; cuSPARSELt: fits",
        "1 8x4 float32: CUTLASS: is not 2:4 along its inputs; cuSPARSELt: is not 2:4 along its inputs",
    ]


def test_two_of_four_of_a_single_group_that_is_full():
    layer = two_of_four(32, 64)
    layer.weight.data[5, 8:12] = 1
    assert check_semi_structured(layer)[0].why_not["CUTLASS"] == "is not 2:4 along its inputs"


def test_on_a_cpu():
    expected = r"^to_semi_structured_: its kernels run on CUDA only, got a model on cpu; model\.cuda\(\) first$"
    model = nn.Sequential(two_of_four(32, 64))
    with pytest.raises(CheckpointError, match=expected):
        to_semi_structured_(model)
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernels run on CUDA only")
def test_on_a_gpu():
    model = nn.Sequential(two_of_four(128, 128), nn.ReLU(), nn.Linear(128, 10).half()).cuda()
    batch = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    with torch.inference_mode():
        expected = model(batch)
        assert to_semi_structured_(model) == ["0"]
        torch.testing.assert_close(model(batch), expected, rtol=1e-2, atol=1e-2)
