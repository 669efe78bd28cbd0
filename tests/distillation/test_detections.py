"""Against numbers worked out by hand, and against loops over plain floats that a child could check."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_core.distillation import (
    DISTILLATIONS,
    DetectionDistillation,
    Detections,
    Distillation,
    LogitDistillation,
    Outputs,
)

KINDS = list(DISTILLATIONS)
LN2, LN3, LN8 = math.log(2), math.log(3), math.log(8)

# Two classes at two points. Logits ln 3, 0 and -ln 3 are the probabilities 3/4, 1/2 and 1/4.
TEACHER_SCORES = [[LN3, -LN3], [0.0, -LN3]]  # class 0 at both points, class 1 at both points
STUDENT_SCORES = [[0.0, -LN3], [0.0, LN3]]
# Three bins. Logits ln 8, 0, 0 are 8/10, 1/10, 1/10: on average 0.1 + 2 * 0.1 = 0.3. Equal logits are thirds: 1.
SURE, EVEN = [LN8, 0.0, 0.0], [0.0, 0.0, 0.0]
TEACHER_SIDES = [[SURE, EVEN], [EVEN, EVEN], [SURE, EVEN], [EVEN, SURE]]  # left at both points, top at both points, ...
STUDENT_SIDES = [[EVEN, EVEN], [EVEN, EVEN], [EVEN, EVEN], [EVEN, EVEN]]
# Levels of 1 x 1 and 1 x 1 pixels, two channels.
TEACHER_FEATURES = [[1.0, 3.0], [10.0, 20.0]]  # mean squares (1 + 9) / 2 = 5 and (100 + 400) / 2 = 250
STUDENT_FEATURES = [[3.0, 2.0], [10.0, 10.0]]  # mean squared differences (4 + 1) / 2 = 2.5 and (0 + 100) / 2 = 50

KL_THREE_HALVES = 3 / 4 * math.log((3 / 4) / (1 / 2)) + 1 / 4 * math.log((1 / 4) / (1 / 2))  # 0.1308; reversed 0.1438
KL_QUARTERS = 1 / 4 * math.log((1 / 4) / (3 / 4)) + 3 / 4 * math.log((3 / 4) / (1 / 4))  # 0.5493
KL_BINS = 8 / 10 * math.log((8 / 10) / (1 / 3)) + 2 / 10 * math.log((1 / 10) / (1 / 3))  # 0.4596; reversed 0.5108
SCORES = {
    "l2": [(3 / 4 - 1 / 2) ** 2 + 0, 0 + (3 / 4 - 1 / 4) ** 2],
    "kl": [KL_THREE_HALVES + 0, 0 + KL_QUARTERS],
}
SIDES = {  # two of four sides differ at point 0, one at point 1
    "l2": [2 * (1 - 0.3) ** 2 / 4, (1 - 0.3) ** 2 / 4],
    "kl": [2 * KL_BINS / 4, KL_BINS / 4],
}


def test_every_kind_has_its_golden_rows():
    assert set(SCORES) == set(SIDES) == set(KINDS)


def heads(scale=1.0):
    """Student and teacher with the numbers above, the logits times ``scale``."""
    return (
        Detections(
            scale * torch.tensor([scores]),
            # (4, A, R) -> (4 R, A): the bins of the left side first, as DFL heads give them.
            scale * torch.tensor(sides).transpose(1, 2).reshape(1, 12, 2),
            [torch.tensor(level).reshape(1, 2, 1, 1) for level in features],
        )
        for scores, sides, features in (
            (STUDENT_SCORES, STUDENT_SIDES, STUDENT_FEATURES),
            (TEACHER_SCORES, TEACHER_SIDES, TEACHER_FEATURES),
        )
    )


def random_heads(seed=0, b=2, c=3, levels=((2, 2), (1, 3)), r=4, dtype=torch.float32, size=2.0):
    generator = torch.Generator().manual_seed(seed)
    points = sum(h * w for h, w in levels)

    def normal(*shape):
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    return (
        Detections(
            normal(b, c, points), normal(b, 4 * r, points), [normal(b, 2 + i, *hw) for i, hw in enumerate(levels)]
        )
        for _ in range(2)
    )


def gradients(loss_of, student):
    """Of the summed terms, by the student's scores, bins and features."""
    leaves = [x.clone().requires_grad_() for x in (student.scores, student.bins, *student.features)]
    sum(loss_of(Detections(leaves[0], leaves[1], leaves[2:])).values()).backward()
    return [leaf.grad for leaf in leaves]


# Golden rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_golden_rows_of_the_points(kind, temperature):
    """At T = 3 kl is given logits 3 times as large: the same softened probabilities, so 3^2 times the number."""
    scale = temperature if kind == "kl" else 1.0
    student, teacher = heads(scale)
    scores = DISTILLATIONS[kind]().scores(student.scores, teacher.scores, temperature)
    sides = [each.bins.reshape(1, 4, 3, 2) for each in (student, teacher)]
    bins = DISTILLATIONS[kind]().bins(*sides, temperature)
    assert scores.tolist() == [pytest.approx([scale**2 * each for each in SCORES[kind]], rel=1e-5)]
    assert bins.tolist() == [pytest.approx([scale**2 * each for each in SIDES[kind]], rel=1e-5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_golden_rows_of_the_terms(kind, temperature):
    scale = temperature if kind == "kl" else 1.0
    loss = DetectionDistillation(kind=kind, temperature=temperature, feature_weight=0.5)(*heads(scale))
    # The teacher's best class: odds of 3 at point 0 (class 1 has 1) and of 1/3 at point 1; at thrice the logits 27 and
    # 1/27, as the temperature does not soften weights.
    first, second = (27 / 28, 1 / 28) if scale == 3 else (3 / 4, 1 / 4)
    assert first + second == pytest.approx(1)  # so nothing is left to divide by
    expected = {
        "cls": scale**2 * (first * SCORES[kind][0] + second * SCORES[kind][1]),
        "box": scale**2 * (first * SIDES[kind][0] + second * SIDES[kind][1]),
        "feature": 0.5 * (first * 2.5 / 5 + second * 50 / 250),
    }
    assert {name: term.item() for name, term in loss.items()} == pytest.approx(expected, rel=1e-5)


def test_the_temperature_softens_kl_and_leaves_l2_alone():
    """T = 3 with the logits as they are: odds of 3^(1/3), by hand."""
    student, teacher = heads()
    p = 3 ** (1 / 3) / (1 + 3 ** (1 / 3))
    soft = 9 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    assert DISTILLATIONS["kl"]().scores(student.scores, teacher.scores, 3.0)[0, 0].item() == pytest.approx(
        soft, rel=1e-5
    )
    left_top = [each.bins.reshape(1, 4, 3, 2)[:, :2] for each in (student, teacher)]
    p = [2 / 4, 1 / 4, 1 / 4]  # the logit ln 8 / 3 is ln 2
    soft = 9 * sum(each * math.log(each / (1 / 3)) for each in p) / 2  # the left side of the two
    assert DISTILLATIONS["kl"]().bins(*left_top, 3.0)[0, 0].item() == pytest.approx(soft, rel=1e-5)
    assert DISTILLATIONS["l2"]().scores(student.scores, teacher.scores, 3.0)[0, 0].item() == pytest.approx(1 / 16)


@pytest.mark.parametrize(("kind", "same"), [("kl", False), ("l2", True)])
def test_the_teacher_is_the_first_of_the_kl(kind, same):
    student, teacher = heads()
    sides = [each.bins.reshape(1, 4, 3, 2) for each in (student, teacher)]
    for name, one, other in (("scores", student.scores, teacher.scores), ("bins", *sides)):
        divergence = getattr(DISTILLATIONS[kind](), name)
        there, back = divergence(one, other, 1.0)[0, 0].item(), divergence(other, one, 1.0)[0, 0].item()
        assert (there == pytest.approx(back, rel=0.05)) is same


# Loops over plain floats


def slow_scores(kind, s, t, temperature):
    """One point: s and t are a logit per class."""
    total = 0.0
    for a, b in zip(s, t, strict=True):
        if kind == "l2":
            total += (1 / (1 + math.exp(-a)) - 1 / (1 + math.exp(-b))) ** 2
        else:
            q, p = (1 / (1 + math.exp(-x / temperature)) for x in (a, b))
            total += temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    return total


def slow_bins(kind, s, t, temperature):
    """One point: s and t are the 4 R logits, side by side."""
    r, total = len(s) // 4, 0.0
    for side in range(4):
        softened = temperature if kind == "kl" else 1.0
        odds = [[math.exp(x / softened) for x in each[side * r : (side + 1) * r]] for each in (s, t)]
        q, p = ([x / sum(each) for x in each] for each in odds)
        if kind == "l2":
            total += sum(i * (q[i] - p[i]) for i in range(r)) ** 2
        else:
            total += temperature**2 * sum(p[i] * math.log(p[i] / q[i]) for i in range(r))
    return total / 4


def slow_features(student, teacher):
    """(B, A) as lists, from levels."""
    images = [[] for _ in student[0]]
    for s, t in zip(student, teacher, strict=True):
        values = [x for image in t.tolist() for channel in image for row in channel for x in row]
        unit = sum(x * x for x in values) / len(values)
        _, c, h, w = t.shape
        for image, y, x in itertools.product(range(len(images)), range(h), range(w)):
            error = sum((s[image, k, y, x].item() - t[image, k, y, x].item()) ** 2 for k in range(c)) / c
            images[image].append(error / unit)
    return images


def slow(kind, temperature, feature_weight, student, teacher):
    b, _, points = student.scores.shape
    sums, total = {"cls": 0.0, "box": 0.0, "feature": 0.0}, 0.0
    feature = slow_features(student.features, teacher.features)
    for image, point in itertools.product(range(b), range(points)):
        s, t = (each.scores[image, :, point].tolist() for each in (student, teacher))
        weight = max(1 / (1 + math.exp(-x)) for x in t)
        total += weight
        sums["cls"] += weight * slow_scores(kind, s, t, temperature)
        s, t = (each.bins[image, :, point].tolist() for each in (student, teacher))
        sums["box"] += weight * slow_bins(kind, s, t, temperature)
        sums["feature"] += weight * feature_weight * feature[image][point]
    return {name: value / total for name, value in sums.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3),
    c=st.integers(1, 4),
    levels=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3),
    r=st.integers(2, 5),
    temperature=st.floats(0.5, 8),
    seed=st.integers(0, 999),
)
def test_the_same_as_slow_loops(kind, b, c, levels, r, temperature, seed):
    student, teacher = random_heads(seed, b, c, levels, r, torch.float64)
    got = DetectionDistillation(kind=kind, temperature=temperature, feature_weight=0.3)(student, teacher)
    expected = slow(kind, temperature, 0.3, student, teacher)
    assert {name: term.item() for name, term in got.items()} == pytest.approx(expected, rel=1e-8, abs=1e-12)


# Gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_no_loss_and_no_gradient_at_equality(kind, temperature):
    student, _ = random_heads(b=3, c=7, levels=((5, 5), (3, 3)), r=16, size=6.0)
    loss = DetectionDistillation(kind=kind, temperature=temperature, feature_weight=1.0)
    teacher = Detections(student.scores.clone(), student.bins.clone(), [each.clone() for each in student.features])
    assert {name: term.item() for name, term in loss(student, teacher).items()} == {"cls": 0, "box": 0, "feature": 0}
    for gradient in gradients(lambda each: loss(each, teacher), student):
        assert not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_value(kind):
    student, teacher = random_heads(dtype=torch.float64)
    loss = DetectionDistillation(kind=kind, temperature=1.5, feature_weight=0.7)
    inputs = [x.requires_grad_() for x in (student.scores, student.bins, *student.features)]

    def terms(scores, bins, *features):
        return tuple(loss(Detections(scores, bins, features), teacher).values())

    assert torch.autograd.gradcheck(terms, inputs)


@pytest.mark.parametrize("temperature", [50.0, 500.0])
def test_the_gradient_of_kl_keeps_its_size_at_any_temperature(temperature):
    """What T^2 is for. With u = logit / T, near u = 0: T^2 KL is the sum of T^2 (u_s - u_t)^2 / 8 = (s - t)^2 / 8 over
    classes, and half the variance of s - t over bins; the gradients are (s - t) / 4 and (d - mean d) / R, d = s - t."""
    student, teacher = random_heads(dtype=torch.float64)
    kl = DISTILLATIONS["kl"]()
    s, t = student.scores.requires_grad_(), teacher.scores
    kl.scores(s, t, temperature).sum().backward()
    assert torch.allclose(s.grad, ((s - t) / 4).detach(), atol=3 / temperature)
    assert s.grad.abs().mean() > 0.3
    s, t = (each.bins.reshape(2, 4, 4, 7) for each in (student, teacher))
    s.requires_grad_()
    kl.bins(s, t, temperature).sum().backward()
    difference = (s - t).detach()
    assert torch.allclose(s.grad, (difference - difference.mean(2, keepdim=True)) / 4 / 4, atol=3 / temperature)
    assert s.grad.abs().mean() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient(kind):
    student, teacher = random_heads()
    leaves = [teacher.scores, teacher.bins, *teacher.features]
    for leaf in (student.scores, *leaves):
        leaf.requires_grad_()
    loss = DetectionDistillation(kind=kind, feature_weight=1.0)(student, teacher)
    sum(loss.values()).backward()
    assert student.scores.grad.any()
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_down_the_gradient_brings_the_student_nearer(kind):
    student, teacher = random_heads()
    loss = DetectionDistillation(kind=kind, feature_weight=1.0)
    down = gradients(lambda each: loss(each, teacher), student)
    moved = [x - 0.1 * g for x, g in zip((student.scores, student.bins, *student.features), down, strict=True)]
    before, after = loss(student, teacher), loss(Detections(moved[0], moved[1], moved[2:]), teacher)
    assert all(after[name] < before[name] for name in before)


# Which points count


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_the_teacher_is_sure_of_counts_more(kind):
    """The same boxes and features are wrong by the same at every point; the teacher is sure of the first alone."""
    _, teacher = random_heads(b=1, levels=((1, 4),))
    scores = torch.tensor([[3.0, -3.0, -3.0, -3.0], [-3.0, -3.0, -3.0, -3.0], [-3.0, -3.0, -3.0, -3.0]])[None]
    bins, feature = (x[..., :1].expand(x.shape).clone() for x in (teacher.bins, teacher.features[0]))
    teacher = Detections(scores, bins, [feature])
    loss = DetectionDistillation(kind=kind, feature_weight=1.0)

    def wrong_at(point):
        off = [x.clone() for x in (bins, feature)]
        off[0][:, 0, point] += 1
        off[1][..., point] += 1
        return loss(Detections(scores, off[0], off[1:]), teacher)

    sure, unsure = wrong_at(0), wrong_at(2)
    odds = (1 + math.exp(3)) / (1 + math.exp(-3))  # sigmoid(3) / sigmoid(-3) = 20.1
    for name in ("box", "feature"):
        assert (sure[name] / unsure[name]).item() == pytest.approx(odds, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_background_does_not_move_the_loss(kind):
    """One point of an object among many of background, where the student says anything at all."""
    student, teacher = random_heads(b=1, levels=((1, 1), (10, 10)))
    teacher.scores[0, :, 1:] = -30
    loss = DetectionDistillation(kind=kind, temperature=1.0)
    alone = loss(*(Detections(each.scores[..., :1], each.bins[..., :1]) for each in (student, teacher)))
    both = loss(student, teacher)
    for name in ("cls", "box"):
        assert both[name].item() == pytest.approx(alone[name].item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_sees_nothing_teaches_nothing(kind):
    student, teacher = random_heads()
    teacher.scores.fill_(-200)  # the sigmoid is 0 in float32
    for term in DetectionDistillation(kind=kind, feature_weight=1.0)(student, teacher).values():
        assert term.item() == 0


def test_a_level_of_teacher_features_that_is_all_zero_is_finite():
    student, teacher = random_heads()
    teacher.features[0].zero_()
    assert DetectionDistillation(kind="l2", feature_weight=1.0)(student, teacher)["feature"].isfinite()


def test_a_level_counts_the_same_in_any_unit():
    """Features of both times 1000 at one level: a difference of the same share of them."""
    student, teacher = random_heads()
    loss = DetectionDistillation(kind="kl", feature_weight=1.0)
    large = (each._replace(features=[1000 * each.features[0], each.features[1]]) for each in (student, teacher))
    assert loss(*large)["feature"].item() == pytest.approx(loss(student, teacher)["feature"].item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_independent_and_bins_are_not(kind):
    """A softmax does not see a constant on all its logits, a sigmoid for each class does."""
    _, teacher = random_heads()
    student = teacher._replace(scores=teacher.scores + 1, bins=teacher.bins + 1)
    loss = DetectionDistillation(kind=kind)(student, teacher)
    assert loss["cls"] > 0.05
    assert loss["box"].item() == pytest.approx(0, abs=1e-5)


# Number formats


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(kind, dtype, autocast):
    student, teacher = random_heads(dtype=dtype)
    wide = [
        Detections(each.scores.float(), each.bins.float(), [f.float() for f in each.features])
        for each in (student, teacher)
    ]
    loss = DetectionDistillation(kind=kind, feature_weight=1.0)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        got = loss(student, teacher)
    expected = loss(*wide)
    for name, term in got.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, expected[name])
    for gradient, leaf in zip(
        gradients(lambda each: loss(each, teacher), student),
        (student.scores, student.bins, *student.features),
        strict=True,
    ):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_overflow_when_squared_in_half_precision(kind):
    student, teacher = random_heads(dtype=torch.float16, size=400.0)
    loss = DetectionDistillation(kind=kind, feature_weight=1.0)(student, teacher)
    assert all(term.isfinite() for term in loss.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_extreme_logits_are_finite(kind, temperature):
    student, teacher = random_heads()
    extreme = [
        each._replace(scores=100 * each.scores.sign(), bins=100 * each.bins.sign()) for each in (student, teacher)
    ]
    loss = DetectionDistillation(kind=kind, temperature=temperature)
    terms = loss(*extreme)
    assert all(0 < term < math.inf for term in terms.values())
    for gradient in gradients(lambda each: loss(each, extreme[1]), extreme[0])[:2]:
        assert gradient.isfinite().all()


def test_kl_of_extremes_by_hand():
    """A teacher at 100 and a student at -100: -ln sigmoid(-100) = 100 for a class, 200 for two bins of +-100."""
    kl = DISTILLATIONS["kl"]()
    hundred = torch.tensor([[[100.0]]])
    assert kl.scores(-hundred, hundred, 1.0).item() == pytest.approx(100)
    assert kl.scores(hundred, -hundred, 1.0).item() == pytest.approx(100)
    bins = torch.tensor([100.0, -100.0]).reshape(1, 1, 2, 1)
    assert kl.bins(-bins, bins, 1.0).item() == pytest.approx(200)


# Options, shapes and new kinds


def test_the_feature_term_is_there_when_asked_for():
    student, teacher = random_heads()
    assert set(DetectionDistillation(kind="kl")(student, teacher)) == {"cls", "box"}
    # Without the term nobody looks at the features.
    assert set(DetectionDistillation(kind="kl")(student._replace(features=()), teacher)) == {"cls", "box"}
    loss = DetectionDistillation(kind="kl", feature_weight=0.1)(student, teacher)
    assert set(loss) == {"cls", "box", "feature"}
    assert all(term.shape == () for term in loss.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kll"}, r"^dist_loss: unknown distillation, got 'kll'; did you mean 'kl'\?$"),
        ({"kind": "hinton"}, r"^dist_loss: unknown distillation, got 'hinton'; known: l2, kl$"),
        ({"temperature": 0.0}, r"^temperature: must be finite and above 0, got 0\.0; use for example 2\.0$"),
        ({"temperature": -1.0}, r"^temperature: must be finite and above 0, got -1\.0"),
        ({"temperature": math.inf}, r"^temperature: must be finite and above 0, got inf"),
        ({"temperature": math.nan}, r"^temperature: must be finite and above 0, got nan"),
        ({"feature_weight": -0.1}, r"^feature_weight: must be finite and at least 0, got -0\.1; use 0 for no feature"),
        ({"feature_weight": math.inf}, r"^feature_weight: must be finite and at least 0, got inf"),
        ({"feature_weight": math.nan}, r"^feature_weight: must be finite and at least 0, got nan"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionDistillation(**{"kind": "kl", **options})


def shaped(scores=(2, 3, 7), bins=(2, 16, 7), features=((2, 5, 2, 2), (2, 6, 1, 3))):
    return Detections(torch.zeros(scores), torch.zeros(bins), [torch.zeros(each) for each in features])


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            shaped(),
            shaped(scores=(2, 4, 7)),
            r"^scores: student and teacher differ, got \(2, 3, 7\) and \(2, 4, 7\); "
            "use a teacher with the same classes and head$",
        ),
        (
            shaped(),
            shaped(bins=(2, 64, 7)),
            r"^bins: student and teacher differ, got \(2, 16, 7\) and \(2, 64, 7\); use a teacher with",
        ),
        (
            shaped(scores=(2, 3, 1, 7)),
            shaped(scores=(2, 3, 1, 7)),
            r"^scores: must be \(batch, channels, points\), got \(2, 3, 1, 7\); join the levels$",
        ),
        (
            shaped(bins=(2, 16)),
            shaped(bins=(2, 16)),
            r"^bins: must be \(batch, channels, points\), got \(2, 16\); join the levels$",
        ),
        (
            shaped(bins=(2, 16, 1)),
            shaped(bins=(2, 16, 1)),
            r"^bins: need the images and points of the scores \(2, 3, 7\), got \(2, 16, 1\); pass one head's outputs$",
        ),
        (
            shaped(bins=(1, 16, 7)),
            shaped(bins=(1, 16, 7)),
            r"^bins: need the images and points of the scores \(2, 3, 7\), got \(1, 16, 7\)",
        ),
        (
            shaped(bins=(2, 18, 7)),
            shaped(bins=(2, 18, 7)),
            r"^bins: must be 4 sides of 2 or more bins each, got 18 channels; use a head with DFL$",
        ),
        (
            shaped(bins=(2, 4, 7)),
            shaped(bins=(2, 4, 7)),
            r"^bins: must be 4 sides of 2 or more bins each, got 4 channels; use a head with DFL$",
        ),
        (
            shaped(),
            shaped(features=((2, 5, 2, 2), (2, 9, 1, 3))),
            r"^features: student and teacher differ, got \[\(2, 5, 2, 2\), \(2, 6, 1, 3\)\] and "
            r"\[\(2, 5, 2, 2\), \(2, 9, 1, 3\)\]; use a teacher with the same layers$",
        ),
        (shaped(), shaped(features=((2, 5, 2, 2),)), r"^features: student and teacher differ, got \[\(2, 5"),
        (
            shaped(features=((2, 5, 2, 2),)),
            shaped(features=((2, 5, 2, 2),)),
            r"^features: need one point for each of the 7 of the scores, got 4; "
            "pass every level, in the order of the points$",
        ),
        (
            shaped(features=()),
            shaped(features=()),
            r"^features: need one point for each of the 7 of the scores, got 0;",
        ),
    ],
)
def test_wrong_shapes(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        DetectionDistillation(kind="kl", feature_weight=1.0)(student, teacher)


def test_a_new_kind_is_a_class_and_a_line():
    @DISTILLATIONS.add("l1")
    class L1(Distillation):
        def scores(self, student, teacher, temperature):
            assert student.dtype == teacher.dtype == torch.float32
            assert not teacher.requires_grad
            return (student - teacher).abs().sum(1) / temperature

        def bins(self, student, teacher, temperature):
            assert student.shape == (1, 4, 3, 2)
            return (student - teacher).abs().sum(2).mean(1)

        def classes(self, student, teacher, temperature, counts):
            return (student - teacher).abs().sum(1) / temperature

    try:
        loss = DetectionDistillation(kind="l1", temperature=4.0)(*heads())
        # Points 0 and 1 weigh 3/4 and 1/4; scores differ by ln 3 and 2 ln 3, two and one of four sides by ln 8.
        assert loss["cls"].item() == pytest.approx((3 / 4 * LN3 + 1 / 4 * 2 * LN3) / 4, rel=1e-5)
        assert loss["box"].item() == pytest.approx(3 / 4 * 2 * LN8 / 4 + 1 / 4 * LN8 / 4, rel=1e-5)
        logits = LogitDistillation(kind="l1", temperature=4.0)
        both = Outputs([torch.tensor([[1.0, 2.0]])]), Outputs([torch.tensor([[0.0, 4.0]])])
        assert logits(*both)["logits"].item() == pytest.approx(3 / 4)
    finally:
        DISTILLATIONS.remove("l1")
    assert "l1" not in DISTILLATIONS
    with pytest.raises(ValueError, match="dist_loss: unknown distillation, got 'l1'"):
        DetectionDistillation(kind="l1")
