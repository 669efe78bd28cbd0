"""Distillation of classes and spans: against numbers worked out by hand, and against plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_core.distillation import DISTILLATIONS, LogitDistillation, Outputs

KINDS = list(DISTILLATIONS)
LN3 = math.log(3)
# Logits ln 3 and 0 are the probabilities 3/4 and 1/4; 0 and 0 are halves.
TEACHER, STUDENT = [[LN3, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, LN3]]
KL_FROM_HALVES = 3 / 4 * math.log((3 / 4) / (1 / 2)) + 1 / 4 * math.log((1 / 4) / (1 / 2))  # 0.1308
KL_TO_HALVES = 1 / 2 * math.log((1 / 2) / (1 / 4)) + 1 / 2 * math.log((1 / 2) / (3 / 4))  # 0.1438
GOLDEN = {"kl": (KL_FROM_HALVES + KL_TO_HALVES) / 2, "l2": LN3**2 / 2}


def test_every_kind_has_its_golden_row():
    assert set(GOLDEN) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind):
    loss = LogitDistillation(kind=kind, temperature=1.0)(
        Outputs([torch.tensor(STUDENT)]), Outputs([torch.tensor(TEACHER)])
    )
    assert list(loss) == ["logits"]
    assert loss["logits"].item() == pytest.approx(GOLDEN[kind], rel=1e-5)


def test_the_temperature_softens_kl_and_multiplies_by_its_square():
    scaled = [Outputs([4.0 * torch.tensor(logits)]) for logits in (STUDENT, TEACHER)]
    loss = LogitDistillation(kind="kl", temperature=4.0)(*scaled)
    assert loss["logits"].item() == pytest.approx(16 * GOLDEN["kl"], rel=1e-5)
    plain = LogitDistillation(kind="l2", temperature=4.0)(*scaled)
    assert plain["logits"].item() == pytest.approx(16 * GOLDEN["l2"], rel=1e-5)  # of the logits, not of T


def reference(kind, s, t, counts, temperature):
    """One head, loops over plain floats."""
    total = 0.0
    for row_s, row_t, row in zip(s.tolist(), t.tolist(), counts.tolist(), strict=True):
        pairs = [(a, b) for a, b, here in zip(row_s, row_t, row, strict=True) if here]
        if kind == "l2":
            total += sum((a - b) ** 2 for a, b in pairs) / len(pairs)
            continue
        p = [math.exp(b / temperature) for _, b in pairs]
        q = [math.exp(a / temperature) for a, _ in pairs]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += temperature**2 * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return total / len(s)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    classes=st.integers(1, 9),
    heads=st.integers(1, 2),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 8.0]),
)
def test_against_plain_python(kind, seed, batch, classes, heads, temperature):
    generator = torch.Generator().manual_seed(seed)
    s, t = (
        [3 * torch.randn(batch, classes, generator=generator, dtype=torch.float64) for _ in range(heads)]
        for _ in range(2)
    )
    counts = torch.rand(batch, classes, generator=generator) < 0.6
    counts[:, 0] = True
    loss = LogitDistillation(kind=kind, temperature=temperature)(Outputs(s, counts), Outputs(t, counts))
    wanted = sum(reference(kind, a, b, counts, temperature) for a, b in zip(s, t, strict=True)) / heads
    assert loss["logits"].item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    torch.manual_seed(0)
    s, t = torch.randn(2, 5), torch.randn(2, 5)
    features = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    loss_of = LogitDistillation(kind=kind, feature_weight=1.0)
    bare = loss_of(Outputs([s], features=[features[0]]), Outputs([t], features=[features[1]]))
    wide = [torch.cat([x, 100 * torch.randn(2, 3)], 1) for x in (s, t)]
    wide_features = [torch.cat([x, 100 * torch.randn(2, 3, 4)], 1) for x in features]
    here = torch.tensor([[True] * 5 + [False] * 3] * 2)
    padded = loss_of(
        Outputs([wide[0]], here, [wide_features[0]], here), Outputs([wide[1]], here, [wide_features[1]], here)
    )
    for name in ("logits", "feature"):
        torch.testing.assert_close(padded[name], bare[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equality_has_no_loss_and_no_gradient(kind, dtype):
    torch.manual_seed(1)
    logits, features = torch.randn(3, 4).to(dtype), torch.randn(3, 2, 5).to(dtype)
    leaves = logits.clone().requires_grad_(), features.clone().requires_grad_()
    counts = torch.tensor([[True, True, True, False]] * 3)
    loss = LogitDistillation(kind=kind, temperature=3.0, feature_weight=2.0)(
        Outputs([leaves[0]], counts, [leaves[1]]), Outputs([logits], counts, [features])
    )
    assert all(term.dtype == torch.float32 for term in loss.values())
    sum(loss.values()).backward()
    assert loss["logits"].item() == pytest.approx(0, abs=1e-6)
    assert loss["feature"].item() == 0
    assert all(leaf.grad.count_nonzero() == 0 for leaf in leaves)


def test_the_teacher_gets_no_gradient():
    s, t = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    LogitDistillation(kind="kl")(Outputs([s]), Outputs([t]))["logits"].backward()
    assert s.grad is not None
    assert t.grad is None


def test_features_by_hand():
    """Layer 1: differences (2, 0) on one token, squares of the teacher 1 + 3^2 = 10 -> 4 / 10; layer 2: 0."""
    s = Outputs([torch.zeros(1, 2)], features=[torch.tensor([[[3.0, 3.0]]]), torch.tensor([[[1.0, 1.0]]])])
    t = Outputs([torch.zeros(1, 2)], features=[torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[1.0, 1.0]]])])
    loss = LogitDistillation(kind="l2", feature_weight=3.0)(s, t)
    assert loss["feature"].item() == pytest.approx(3 * (4 / 10 + 0) / 2)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (Outputs([torch.zeros(2, 3)]), Outputs([torch.zeros(2, 4)]), r"^logits: student and teacher differ, got .*"),
        (Outputs([]), Outputs([]), r"^logits: student and teacher differ, got \[\] and \[\]; use a teacher with "),
        (Outputs([torch.zeros(2)]), Outputs([torch.zeros(2)]), r"^logits: must be \(batch, classes\) each, got"),
        (
            Outputs([torch.zeros(2, 3)], features=[torch.zeros(2, 1, 4)]),
            Outputs([torch.zeros(2, 3)], features=[torch.zeros(2, 1, 5)]),
            r"^features: student and teacher differ, got .*; use a teacher with the same layers and width$",
        ),
        (
            Outputs([torch.zeros(2, 3)]),
            Outputs([torch.zeros(2, 3)]),
            r"^features: student and teacher differ, got \[\] and \[\]; use a teacher with the same layers and width$",
        ),
    ],
)
def test_wrong_shapes(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        LogitDistillation(kind="kl", feature_weight=1.0)(student, teacher)
