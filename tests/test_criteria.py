import pytest
import torch

from pruning_core import Pruning
from pruning_core.criteria import CRITERIA

W = torch.tensor([[1.0, -2.0], [0.5, -0.25]])
G = torch.tensor([[0.5, 0.25], [-4.0, 2.0]])
NAMES = [name for name in CRITERIA if not CRITERIA[name].needs]
GOLDEN = {
    "magnitude": [[1.0, 2.0], [0.5, 0.25]],
    "gradient": [[0.5, 0.25], [4.0, 2.0]],
    "snip": [[0.5, 0.5], [2.0, 0.5]],
    "snip_momentum": [[0.5, 0.5], [2.0, 0.5]],
    "l2": [[1.0, 4.0], [0.25, 0.0625]],
    "taylor": [[0.5, -0.5], [-2.0, -0.5]],
    "fisher": [[0.5, -0.5], [-2.0, -0.5]],
    "random": [[0.5655812, 0.3716486], [0.6493711, 0.4705031]],
}


@pytest.mark.parametrize("name", NAMES)
def test_golden_rows(name):
    torch.testing.assert_close(CRITERIA[name]().score(W, G), torch.tensor(GOLDEN[name]), rtol=0, atol=1e-6)


def test_how_a_unit_finishes_its_sums():
    """taylor: |sum over steps|; fisher: the sum over steps of squares; the others as they are."""
    steps = [torch.tensor([1.0, -2.0]), torch.tensor([-3.0, -1.0])]
    finished = {}
    for name in NAMES:
        criterion = CRITERIA[name]()
        finished[name] = criterion.finish(sum(criterion.each_step(step.clone()) for step in steps)).tolist()
    assert finished.pop("taylor") == [2.0, 3.0]
    assert finished.pop("fisher") == [10.0, 5.0]
    assert all(total == [-2.0, -3.0] for total in finished.values())


@pytest.mark.parametrize(("name", "needs"), [(name, CRITERIA[name].needs) for name in CRITERIA if CRITERIA[name].needs])
def test_what_needs_more_than_weights_and_gradients_says_so(name, needs):
    for spelled in (name, f"{name}_progressive"):
        with pytest.raises(ValueError, match=f"pruning_type: ranks channels only: it needs {needs}, got '{spelled}'"):
            Pruning({"pruning_type": spelled})


@pytest.mark.parametrize("name", NAMES)
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


def test_a_missing_gradient_adds_nothing():
    """A weight that once had a gradient keeps its score; one that never had any has none."""
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
    pruner = Pruning({"pattern": "1x1", "target_sparsity": 0.5, "end_step": 9})
    pruner.model = layers
    pruner.on_train_begin()
    for used in (0, 1, 0):
        layers.zero_grad()
        layers[used](torch.randn(4, 3)).square().sum().backward()
        pruner.on_before_optimizer_step()
        first, second = (weight["score"] for weight in pruner.state_dict()["groups"][0]["weights"].values())
        if used == 0 and second is None:
            early = first.clone()
        elif used == 1:
            assert torch.equal(first, early) and second is not None
        pruner.on_after_optimizer_step()
    assert first.sum() > early.sum()


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


def test_random_is_uniform_and_its_seed_matters():
    weight = torch.randn(100_000)
    first, again, other = (CRITERIA["random"](seed).score(weight, None) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.mean().item() == pytest.approx(0.5, abs=0.01) and first.std().item() == pytest.approx(0.2887, abs=0.01)
    assert first.min() >= 0 and first.max() < 1


@pytest.mark.parametrize("name", ["taylor", "fisher"])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_blocks_are_ranked_by_the_signed_sums_of_their_weights(name, scale):
    """4x1 blocks after three steps, beside a loop over blocks; also under a loss scale."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 8, bias=False)
    pruner = Pruning({"pattern": "4x1", "pruning_type": name, "start_step": 3, "end_step": 3, "target_sparsity": 0.5})
    pruner.model = layer
    pruner.on_train_begin()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    if scale is not None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    pruner._params, pruner._clocks = {optimizer: None}, {optimizer: next(iter(pruner._clocks.values()))}
    weight, sums = layer.weight.detach().clone(), torch.zeros(2, 6)
    for _ in range(3):
        gradient = torch.randn(8, 6)
        layer.weight.grad = gradient * (scale or 1.0)
        pruner.before_step(optimizer)
        pruner.after_step(optimizer)
        step = (weight * gradient).unflatten(0, (2, 4)).mean(1)
        sums += step if name == "taylor" else step.square()
    score = sums.abs().flatten()
    gone = score.argsort()[:6]
    mask = pruner.masks()["weight"].unflatten(0, (2, 4))
    assert (~mask).all(1).flatten().nonzero().flatten().tolist() == sorted(gone.tolist())
    assert mask.any(1).sum() == 6
