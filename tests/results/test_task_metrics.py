"""Metrics against scikit-learn and against loops in float64; edge cases; the bootstrap against repeated samples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError
from equipoise.results.bootstrap import (
    mean_of_resamples,
    percentile_interval,
    resample_weights,
    resampled_values,
)
from equipoise.results.significance import pack_resamples, resampled_p, unpack_outcomes
from equipoise.results.task_metrics import METRICS, Metric, find_metric, own_metric, select_metrics
from helpers.tolerance import TOL

SINGLE = {"abs": TOL[torch.float32]["atol"], "rel": TOL[torch.float32]["rtol"]}
CASES = [("classification", 2), ("classification", 4), ("multilabel", 3), ("regression", 1), ("regression", 2)]


def random_predictions(task, outputs, samples=60, seed=0):
    """Outputs with ties, and targets that they tell something about."""
    random = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(samples, outputs, generator=random)).round(decimals=1)
    noisy = logits + 2 * torch.randn(samples, outputs, generator=random)
    if task == "classification":
        return logits, noisy.argmax(dim=1)
    return logits, (noisy > 0).float() if task == "multilabel" else noisy.clamp(-3, 3).round()


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def expected_metric(name, logits, target, task):
    """The metric by scikit-learn or by hand, in float64."""
    sk = pytest.importorskip("sklearn.metrics")
    x, y = logits.double().numpy(), target.double().numpy()
    if task == "classification":
        result, y, scores = x.argmax(axis=1), y.astype(int), softmax(x)
        binary = x.shape[1] == 2
        marked = y if binary else np.eye(x.shape[1])[y]
        return {
            "accuracy": lambda: sk.accuracy_score(y, result),
            "balanced_accuracy": lambda: sk.balanced_accuracy_score(y, result),
            "f1_macro": lambda: sk.f1_score(y, result, average="macro"),
            "auroc": lambda: sk.roc_auc_score(y, scores[:, 1] if binary else scores, multi_class="ovr"),
            "map": lambda: sk.average_precision_score(marked, scores[:, 1] if binary else scores, average="macro"),
        }[name]()
    if task == "multilabel":
        result, y, scores = (x > 0).astype(int), y.astype(int), 1 / (1 + np.exp(-x))
        return {
            "accuracy": lambda: (result == y).mean(),
            "f1_macro": lambda: sk.f1_score(y, result, average="macro", zero_division=0),
            "auroc": lambda: sk.roc_auc_score(y, scores, average="macro"),
            "map": lambda: sk.average_precision_score(y, scores, average="macro"),
        }[name]()
    if name.startswith(("acc", "f1")):
        x, y = x[:, 0], y[:, 0]
        if name.endswith("nonzero"):
            x, y = x[y != 0], y[y != 0]
            signs = x > 0, y > 0
        else:
            signs = x >= 0, y >= 0
        if name == "acc7":
            return np.mean(np.round(np.clip(x, -3, 3)) == np.round(np.clip(y, -3, 3)))
        if name.startswith("acc2"):
            return np.mean(signs[0] == signs[1])
        return sk.f1_score(signs[1], signs[0], average="weighted")
    return float(np.mean([hand_computed(name, x[:, k].tolist(), y[:, k].tolist()) for k in range(x.shape[1])]))


def hand_computed(name, x, y):
    n = len(x)
    if name == "mae":
        return sum(abs(a - b) for a, b in zip(x, y, strict=True)) / n
    mean_x, mean_y = sum(x) / n, sum(y) / n
    shared = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / n
    var_x, var_y = sum((a - mean_x) ** 2 for a in x) / n, sum((b - mean_y) ** 2 for b in y) / n
    if name == "pearson":
        return shared / math.sqrt(var_x * var_y)
    return 2 * shared / (var_x + var_y + (mean_x - mean_y) ** 2)


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_against_scikit_learn_and_loops(name, seed):
    pytest.importorskip("sklearn")
    metric = METRICS[name]
    for task, outputs in CASES:
        if task not in metric.tasks or (outputs > 1 and name.startswith(("acc2", "acc7", "f1_s"))):
            continue
        logits, target = random_predictions(task, outputs, seed=seed)
        if name == "accuracy" and task == "classification":
            # Ties of the largest logit have a test of their own.
            logits = logits + 1e-4 * torch.arange(outputs)
        if name == "balanced_accuracy":
            logits = logits + 1e-4 * torch.arange(outputs)
        if name == "rmse":
            right = math.sqrt(float(((logits.double() - target.double()) ** 2).mean()))
        else:
            right = expected_metric(name, logits, target, task)
        result = metric.evaluate(logits, target, task)
        assert result.reason == ""
        assert result.value == pytest.approx(right, **SINGLE)
        assert metric.bounds[0] <= result.value <= metric.bounds[1]


@pytest.mark.parametrize("name", METRICS)
def test_resamples_are_the_metric_of_repeated_samples(name):
    metric = METRICS[name]
    for task, outputs in CASES:
        if task not in metric.tasks or (outputs > 1 and name.startswith(("acc2", "acc7", "f1_s"))):
            continue
        logits, target = random_predictions(task, outputs, samples=23, seed=3)
        rows = resampled_values(metric, logits, target, task, count=12)
        for weights, result in zip(torch.cat(list(resample_weights(23, 12))), rows, strict=True):
            chosen = torch.arange(23).repeat_interleave(weights.long())
            assert result == pytest.approx(metric.evaluate(logits[chosen], target[chosen], task).value, **SINGLE)


@pytest.mark.parametrize(
    ("name", "logits", "target", "task", "reason"),
    [
        ("auroc", torch.randn(5, 3), torch.ones(5), "classification", "all targets are of one class"),
        ("auroc", torch.randn(5, 2), torch.ones(5, 2), "multilabel", "no label has positives and negatives"),
        ("map", torch.randn(5, 2), torch.zeros(5, 2), "multilabel", "no target is positive"),
        ("pearson", torch.full((5, 1), 0.3), torch.randn(5, 1), "regression", "the predictions are constant"),
        ("pearson", torch.randn(5, 1), torch.full((5, 1), 0.1), "regression", "the targets are constant"),
        ("concordance", torch.ones(4, 1), torch.ones(4, 1), "regression", "the same constant"),
        ("acc2_nonzero", torch.randn(4, 1), torch.zeros(4, 1), "regression", "all targets are 0"),
        ("f1_sentiment_nonzero", torch.randn(4, 1), torch.zeros(4, 1), "regression", "all targets are 0"),
        ("acc7", torch.randn(4, 1), torch.full((4, 1), 3.5), "regression", "some are outside"),
        ("acc2", torch.randn(4, 2), torch.zeros(4, 2), "regression", "one output, and there are 2"),
        ("f1_macro", torch.full((4, 2), math.nan), torch.zeros(4), "classification", "a prediction is NaN"),
        ("mae", torch.zeros(0, 1), torch.zeros(0, 1), "regression", "there are no samples"),
    ],
)
def test_undefined_metrics_are_nan_with_a_reason(name, logits, target, task, reason):
    result = METRICS[name].evaluate(logits, target, task)
    assert math.isnan(result.value)
    assert reason in result.reason
    if len(logits):
        rows = resampled_values(METRICS[name], logits, target, task, count=20)
        assert rows.shape == (20,)
        assert np.isnan(rows).all()
        assert percentile_interval(rows) is None


def test_constant_predictions():
    target = torch.tensor([[0.0], [1.0], [2.0]])
    assert METRICS["concordance"].evaluate(torch.ones(3, 1), target, "regression").value == 0
    classes = torch.tensor([0, 1, 1, 2])
    assert METRICS["auroc"].evaluate(torch.zeros(4, 3), classes, "classification").value == pytest.approx(0.5)
    assert METRICS["balanced_accuracy"].evaluate(torch.zeros(4, 3), classes, "classification").value == pytest.approx(
        1 / 3
    )
    assert METRICS["accuracy"].evaluate(torch.zeros(4, 3), classes, "classification").value == pytest.approx(1 / 3)


def test_classes_without_targets_are_excluded():
    logits, target = random_predictions("classification", 3, seed=5)
    kept = target != 2
    logits, target = logits[kept], target[kept]
    scores = softmax(logits.double().numpy())
    sk = pytest.importorskip("sklearn.metrics")
    right = np.mean([sk.roc_auc_score(target.numpy() == label, scores[:, label]) for label in (0, 1)])
    assert METRICS["auroc"].evaluate(logits, target, "classification").value == pytest.approx(right, **SINGLE)


def test_binary_and_multiclass_conventions():
    values, target = torch.tensor([[0.2], [-0.1], [0.0], [-2.0]]), torch.tensor([[1.0], [0.0], [0.0], [-1.0]])
    assert METRICS["acc2"].evaluate(values, target, "regression").value == 0.75
    assert METRICS["acc2_nonzero"].evaluate(values, target, "regression").value == 1.0
    assert METRICS["acc2_nonzero"].each(values, target, "regression").isnan().tolist() == [False, True, True, False]
    assert METRICS["acc7"].evaluate(values, target, "regression").value == 0.5


def test_concordance_uses_biased_moments():
    values, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    # cov = var = 1/4 and the means differ by 1: 2 / 4 / (1/4 + 1/4 + 1).
    assert METRICS["concordance"].evaluate(values, target, "regression").value == pytest.approx(1 / 3)


def test_correlation_is_stable_for_large_offsets():
    x = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None] + 1e6
    assert METRICS["pearson"].evaluate(x, 1 - x, "regression").value == pytest.approx(-1.0)


def test_interval_coverage():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        rows = mean_of_resamples(random.random(80) < 0.7)
        low, high = percentile_interval(rows)
        inside += low <= 0.7 <= high
    # 95 % of 60 in the mean; fewer than 49 has a probability below 0.1 %.
    assert inside >= 49


def test_paired_bootstrap():
    logits, target = random_predictions("classification", 3, samples=200, seed=1)
    worse = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    metric = METRICS["f1_macro"]
    values = [metric.evaluate(one, target, "classification").value for one in (logits, worse)]
    rows = [resampled_values(metric, one, target, "classification") for one in (logits, worse)]
    packed = [unpack_outcomes(pack_resamples(one)) for one in rows]
    np.testing.assert_allclose(packed[0], rows[0], rtol=1e-4)
    assert resampled_p(values[0] - values[1], *packed) < 0.01
    assert resampled_p(0.0, packed[0], packed[0]) == 1.0
    assert resampled_p(0.1, np.full(9, np.nan), packed[0][:9]) is None


def test_false_positive_rate_of_equal_models():
    metric, called = METRICS["balanced_accuracy"], 0
    for seed in range(30):
        random = torch.Generator().manual_seed(seed)
        target = torch.randint(3, (80,), generator=random)
        one, other = torch.randn(2, 80, 3, generator=random)
        rows = [resampled_values(metric, part, target, "classification", count=199) for part in (one, other)]
        values = [metric.evaluate(part, target, "classification").value for part in (one, other)]
        called += resampled_p(values[0] - values[1], *rows) < 0.05
    # 5 % of 30 in the mean; more than 6 has a probability below 0.1 %.
    assert called <= 6


def test_user_defined_metric_functions():
    logits, target = random_predictions("classification", 3)
    mine = own_metric("mine", lambda scores, known: scores.gather(1, known[:, None]).mean())
    right = float(logits.double().softmax(dim=1).gather(1, target[:, None]).mean())
    assert mine.evaluate(logits, target, "classification").value == pytest.approx(right)
    rows = resampled_values(mine, logits, target, "classification", count=5)
    assert rows.std() > 0
    assert [m.name for m in select_metrics(["auroc"], "classification", "me", {"mine": mine.function})] == [
        "auroc",
        "mine",
    ]


def test_errors():
    with pytest.raises(ConfigError, match=r"recipe: expected a known metric, got 'f1_makro'\. Did you mean 'f1_macro'"):
        select_metrics(["f1_makro"], None, "recipe")
    with pytest.raises(ConfigError, match=r"expected a metric for regression: mae, rmse, .*, got 'auroc'"):
        select_metrics(["auroc"], "regression", "recipe")
    with pytest.raises(ConfigError, match=r"metric 'accuracy': expected a new name .*, got a name that is in use"):
        own_metric("accuracy", len)
    with pytest.raises(ConfigError, match=r"metric 'my/metric': expected a new name of letters"):
        own_metric("my/metric", len)
    with pytest.raises(ConfigError, match=r"metric 'mine': expected a function of predictions and targets, got int"):
        own_metric("mine", 3)
    with pytest.raises(ConfigError, match=r"metric 'mine': expected a function that returns a number, got str"):
        own_metric("mine", lambda scores, known: "high").evaluate(torch.zeros(2, 2), torch.zeros(2), "classification")
    with pytest.raises(ConfigError, match=r"diagnose: expected the name of a metric for regression, got function"):
        find_metric(lambda a, b: 0, "regression", "diagnose")
    assert isinstance(find_metric("mae", "regression", "diagnose"), Metric)
