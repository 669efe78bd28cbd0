import pytest
import torch

from pruning_core import Pruning
from pruning_core.criteria import CRITERIA

W = torch.tensor([[1.0, -2.0], [0.5, -0.25]])
G = torch.tensor([[0.5, 0.25], [-4.0, 2.0]])
GOLDEN = {
    "magnitude": [[1.0, 2.0], [0.5, 0.25]],
    "gradient": [[0.5, 0.25], [4.0, 2.0]],
    "snip": [[0.5, 0.5], [2.0, 0.5]],
    "snip_momentum": [[0.5, 0.5], [2.0, 0.5]],
}


@pytest.mark.parametrize("name", list(CRITERIA))
def test_golden_rows(name):
    assert CRITERIA[name]().score(W, G).tolist() == GOLDEN[name]


@pytest.mark.parametrize("name", list(CRITERIA))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_have_the_weights_shape_and_change_nothing(name, dtype):
    weight, gradient = torch.randn(4, 3, 3, 3, dtype=dtype), torch.randn(4, 3, 3, 3, dtype=dtype)
    before = weight.clone(), gradient.clone()
    score = CRITERIA[name]().score(weight, gradient)
    assert score.shape == weight.shape
    assert score.dtype in (torch.float32, torch.float64)
    assert score.isfinite().all()
    score.zero_()  # it is a new tensor
    assert torch.equal(weight, before[0])
    assert torch.equal(gradient, before[1])


def test_half_precision_products_do_not_overflow():
    score = CRITERIA["snip"]().score(torch.full((2,), 6e4, dtype=torch.float16), torch.full((2,), 6e4).half())
    assert score.isfinite().all()


def scores_after(gradients, **options):
    """The unit scores that a run of 1x1 snip_momentum holds after these gradients."""
    layer = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(W)
    pruner = Pruning({"pattern": "1x1", "start_step": 90, "end_step": 100, **options})
    pruner.model = layer
    pruner.on_train_begin()
    for gradient in gradients:
        layer.weight.grad = gradient
        pruner.on_step_begin()
        pruner.on_before_optimizer_step()
        pruner.on_after_optimizer_step()
    score = pruner._groups[0].weights[0].score
    return score.reshape(2, 2)


def test_snip_momentum_adds_nine_tenths_of_each_score():
    first, second = (W * G).abs(), (W * 3 * G).abs()
    assert torch.allclose(scores_after([G, 3 * G]), 0.9 * first + 0.9 * second)


def test_snip_momentum_with_its_own_factors():
    first, second = (W * G).abs(), (W * 3 * G).abs()
    got = scores_after([G, 3 * G], momentum_decay=0.9, momentum_gain=1.0)
    assert torch.allclose(got, 0.9 * first + second)


def test_a_missing_gradient_scores_zero():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Pruning({"pattern": "1x1", "target_sparsity": 0.5, "end_step": 2}).attach(model, optimizer):
        for _ in range(3):
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
    # Scores of 0 go first, but no further than max_sparsity_ratio_per_op: 8 of 9, and 1 of the layer that is used.
    assert (model.unused.weight == 0).sum() == 8
    assert (model.used.weight == 0).sum() == 1


def test_no_gradient_at_all_is_told_once_and_cuts_nothing():
    layer = torch.nn.Linear(4, 4)
    pruner = Pruning({"pattern": "1x1"})
    pruner.model = layer
    pruner.on_train_begin()
    with pytest.warns(UserWarning, match="no pruned weight has a gradient; call on_before_optimizer_step"):
        pruner.on_before_optimizer_step()
    pruner.on_after_optimizer_step()
    pruner.on_before_optimizer_step()
    pruner.on_after_optimizer_step()
    assert (layer.weight == 0).sum() == 0
