"""Confidence, AUROC and FPR95 against sums and double loops in float64, and by hand."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.diagnostics.ood_metrics import auroc, fpr95
from equipoise.diagnostics.ood_scores import CONFIDENCES, energy, gen_score, max_logit, msp
from equipoise.diagnostics.ood_test import ood
from equipoise.diagnostics.prediction_collection import collect_predictions
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from helpers.fusion import batch, joint_model
from helpers.tolerance import TOL

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]


def slow_gen(logits, gamma, top):
    result = []
    for row in logits:
        full = sum(math.exp(value) for value in row)
        likely = sorted((math.exp(value) / full for value in row), reverse=True)[:top]
        result.append(-sum(p**gamma * (1 - p) ** gamma for p in likely))
    return result


def slow_auroc(inside, outside):
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside)
    return won / (len(inside) * len(outside))


def slow_fpr95(positives, negatives):
    """Every threshold in turn, the strictest first; a sample at the threshold counts as found."""
    for threshold in sorted({*positives, *negatives}, reverse=True):
        result = sum(value >= threshold for value in positives)
        if 100 * result >= 95 * len(positives):
            return sum(value >= threshold for value in negatives) / len(negatives)
    raise AssertionError


def random_logits(samples, classes, seed, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(samples, classes, generator=random, dtype=torch.float64) * scale


def tied_scores(size, seed, steps):
    """Few different values, so that there are ties."""
    return torch.randint(steps, (size,), generator=torch.Generator().manual_seed(seed)).double()


def test_gen_by_hand():
    assert float(gen_score(torch.zeros(1, 4))) == pytest.approx(-3.383453, abs=1e-6)
    assert float(gen_score(torch.tensor([[0.7, 0.2, 0.1]]).log())) == pytest.approx(-2.474060, abs=1e-6)
    ruled_out = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    assert float(gen_score(ruled_out)) == 0
    half = -(0.5**0.2)
    assert float(gen_score(torch.zeros(1, 2), top=1)) == pytest.approx(half)
    assert float(gen_score(torch.zeros(1, 2))) == pytest.approx(2 * half)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(2, 11), st.integers(0, 1000), st.sampled_from([0.1, 0.5, 1.0]), st.data())
def test_confidences_against_sums(samples, classes, seed, gamma, data):
    values, top = random_logits(samples, classes, seed, 3.0), data.draw(st.integers(1, classes))
    result = gen_score(values, gamma=gamma, top=top)
    expected = torch.tensor(slow_gen(values.tolist(), gamma, top), dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e3 * EXACT["rtol"], atol=EXACT["atol"])
    for number, row in enumerate(values.tolist()):
        full = sum(math.exp(value) for value in row)
        assert float(msp(values)[number]) == pytest.approx(math.exp(max(row)) / full)
        assert float(energy(values)[number]) == pytest.approx(math.log(full))
        assert float(max_logit(values)[number]) == max(row)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(0, 1000), st.floats(-50, 50))
def test_gen_is_invariant_to_class_order_and_offset(classes, seed, level):
    values = random_logits(5, classes, seed)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(gen_score(values[:, order] + level), gen_score(values), **SINGLE)
    assert (gen_score(values) <= 0).all()
    assert (gen_score(values) >= gen_score(torch.zeros(1, classes)) - EXACT["atol"]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_near_certain_predictions_are_distinguished(dtype):
    # 1 - p is exp(-gap) for the first class, far below what is left of 1 in any of these types.
    gaps = torch.tensor([60.0, 80.0, 100.0], dtype=dtype)
    result = gen_score(torch.stack([gaps, torch.zeros_like(gaps)], dim=1))
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, -2 * (-0.1 * gaps.double()).exp(), **EXACT)
    assert (msp(torch.stack([gaps, torch.zeros_like(gaps)], dim=1)) == 1).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 31), st.integers(1, 37), st.integers(0, 1000), st.sampled_from([2, 5, 1000]))
def test_auroc_against_a_double_loop(inside, outside, seed, steps):
    first, second = tied_scores(inside, seed, steps), tied_scores(outside, seed + 1, steps)
    assert auroc(first, second) == slow_auroc(first.tolist(), second.tolist())
    assert auroc(second, first) == pytest.approx(1 - auroc(first, second))
    assert auroc(first.float() * 3 - 7, second * 3 - 7) == auroc(first, second)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 61), st.integers(1, 67), st.integers(0, 1000), st.sampled_from([3, 7, 1000]))
def test_fpr95_against_every_threshold(inside, outside, seed, steps):
    first, second = tied_scores(inside, seed, steps), tied_scores(outside, seed + 1, steps)
    negated = [[-value for value in part.tolist()] for part in (first, second)]
    assert fpr95(first, second) == slow_fpr95(negated[1], negated[0])
    assert fpr95(first, second, positive="id") == slow_fpr95(first.tolist(), second.tolist())


def test_hand_computed_conventions():
    # Twenty known at 11 ... 30, but two at 1 and 2; twenty unknown at 0 ... 9 and -10 ... -1.
    inside = torch.tensor([1.0, 2.0, *range(13, 31)])
    outside = torch.arange(-10.0, 10.0)
    # 19 of 20 unknown lie at or below 8, and so do two of the known.
    assert fpr95(inside, outside) == 2 / 20
    # 19 of 20 known lie at or above 2, and so do the unknown at 2 ... 9.
    assert fpr95(inside, outside, positive="id") == 8 / 20
    assert auroc(inside, outside) == (18 * 20 + 11.5 + 12.5) / 400


def test_separable_and_equal_scores():
    low, high = torch.arange(7.0), torch.arange(7.0, 20.0)
    assert (auroc(high, low), fpr95(high, low), fpr95(high, low, positive="id")) == (1.0, 0.0, 0.0)
    assert (auroc(low, high), fpr95(low, high), fpr95(low, high, positive="id")) == (0.0, 1.0, 1.0)
    same = torch.full((5,), 0.3)
    assert (auroc(same, same[:3]), fpr95(same, same[:3]), fpr95(same, same[:3], positive="id")) == (0.5, 1.0, 1.0)
    assert auroc(torch.tensor([math.inf]), torch.tensor([-math.inf, math.inf])) == 0.75


@pytest.mark.parametrize("names", [("audio",), ("audio", "image"), ("audio", "image", "text")])
def test_on_a_model(names):
    model = joint_model(names)
    known = [batch(names, seed=seed, missing=names[1:]) for seed in range(3)]
    unknown = [{**batch(names, seed=9, size=7), "target": torch.full((7,), 99)}]
    for score, confidence in CONFIDENCES.items():
        result = ood(model, known, unknown, score=score)
        model.eval()
        with torch.no_grad():
            inside, outside = (torch.cat([model(part).logits for part in parts]).float() for parts in (known, unknown))
        torch.testing.assert_close(result.inside, confidence(inside), **SINGLE)
        torch.testing.assert_close(result.outside, confidence(outside), **SINGLE)
        assert result.score == score
        assert result.auroc == slow_auroc(result.inside.tolist(), result.outside.tolist())
        assert result.fpr95 == fpr95(result.inside, result.outside, positive="ood")
        assert result.fpr95_id == fpr95(result.inside, result.outside, positive="id")
        right = inside.argmax(dim=1) == torch.cat([part["target"] for part in known])
        assert result.accuracy == pytest.approx(float(right.float().mean()))


def test_targets_are_needed_for_accuracy_only():
    model = joint_model()
    without = [{name: value for name, value in batch().items() if name != "target"}]
    result = ood(model, without, without, score=lambda logits: logits[:, 0])
    assert math.isnan(result.accuracy)
    assert (result.auroc, result.score) == (0.5, "<lambda>")
    torch.testing.assert_close(result.inside, collect_predictions(model, without).logits[:, 0], **SINGLE)
    assert ood(model, without, without, score=functools.partial(gen_score, top=2)).score == "partial"


@pytest.mark.parametrize("confidence", CONFIDENCES.values(), ids=CONFIDENCES)
def test_invalid_logits_raise(confidence):
    name = confidence.__name__
    for shape in ((0, 3), (5, 1), (5,), (2, 3, 5)):
        message = (
            rf"{name}: expected logits \(sample, class\) of one or more .* two or more classes, got shape \({shape[0]}"
        )
        with pytest.raises(ShapeError, match=message):
            confidence(torch.zeros(shape))
    for bad in (math.nan, math.inf):
        values = torch.zeros(5, 3)
        values[2, 1] = values[4, 0] = bad
        with pytest.raises(NonFiniteError, match=rf"{name}: .* for 2 of 5 samples, the first is number 2\. Check the"):
            confidence(values)
    with pytest.raises(NonFiniteError, match=f"{name}: expected finite logits"):
        confidence(torch.full((1, 3), -math.inf))


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": math.nan}, {"top": 0}, {"top": 4}])
def test_options_of_gen(options):
    with pytest.raises(ConfigError, match=r"gen_score: expected gamma > 0 and 1 <= top <= classes = 3, got gamma = "):
        gen_score(torch.zeros(2, 3), **options)


@pytest.mark.parametrize("figure", [auroc, fpr95])
def test_invalid_scores_raise(figure):
    row, name = torch.zeros(3), figure.__name__
    for bad in (torch.zeros(0), torch.zeros(3, 1), torch.tensor(1.0)):
        with pytest.raises(ShapeError, match=rf"{name} inside: expected scores \(sample,\) of one or more"):
            figure(bad, row)
        with pytest.raises(ShapeError, match=rf"{name} outside: expected scores \(sample,\) of one or more"):
            figure(row, bad)
    with pytest.raises(NonFiniteError, match=f"{name} outside: expected scores without NaN, got 1 NaN"):
        figure(row, torch.tensor([0.0, math.nan]))


def test_errors():
    model = joint_model()
    with pytest.raises(ConfigError, match=r"fpr95: expected positive 'ood' or 'id', got 'in'"):
        fpr95(torch.zeros(3), torch.zeros(3), positive="in")
    with pytest.raises(ConfigError, match=r"ood: expected a known score, got 'energie'. Did you mean 'energy'"):
        ood(model, [batch()], [batch()], score="energie")
    model.task = "regression"
    with pytest.raises(
        ConfigError, match="ood: expected a model for classification, got FusionModel with task = 'regr"
    ):
        ood(model, [batch()], [batch()])
    with pytest.raises(ConfigError, match="got Linear with task = None"):
        ood(torch.nn.Linear(2, 3), [batch()], [batch()])
    with pytest.raises(ShapeError, match="at least one batch, got none"):
        ood(joint_model(), [batch()], [])
    broken = batch()
    broken["audio"][1] = math.nan
    with pytest.raises(NonFiniteError, match=r"gen_score: .* for 1 of 5 samples, the first is number 1"):
        ood(joint_model(), [batch()], [broken])
