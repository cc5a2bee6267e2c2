"""significance.py: tests against an enumeration of everything that could have happened, and verdicts that obey them."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.diagnostics.suite import diagnose
from equipoise.errors import ShapeError
from equipoise.report.verdict_evidence import VerdictEvidence
from equipoise.report.verdict_list import headline, verdicts
from equipoise.results.significance import (
    RESAMPLES,
    SURE,
    bootstrap_p,
    grouped_p,
    mcnemar,
    pack_outcomes,
    pack_text,
    paired_p,
    unpack_outcomes,
    unpaired_p,
)
from helpers.diagnosis import labeled_batches, weighted_model

TASKS = ("classification", "multilabel", "regression")


@given(st.integers(0, 7), st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_mcnemar_against_enumeration(b, c):
    total, seen = b + c, abs(b - c)
    ways = [abs(2 * sum(way) - total) for way in itertools.product((0, 1), repeat=total)] if total < 12 else None
    if ways is None:
        ways = [abs(2 * k - total) for k in range(total + 1) for _ in range(math.comb(total, k))]
    more, same = sum(way > seen for way in ways) / len(ways), sum(way == seen for way in ways) / len(ways)
    # Of the two sides together, half of what was seen: mid-p.
    expected = 1.0 if b == c else more + same / 2
    assert mcnemar(b, c) == pytest.approx(expected)
    assert mcnemar(b, c) == pytest.approx(mcnemar(c, b))


def enumerated_p(values):
    """p of the bootstrap-t over all n^n resamples, in plain loops."""
    n, mean = len(values), sum(values) / len(values)

    def spread(part):
        middle = sum(part) / n
        return math.sqrt(sum((value - middle) ** 2 for value in part) / n)

    statistic, extreme = abs(mean) / spread(values), 0
    for part in itertools.product(values, repeat=n):
        extreme += abs(sum(part) / n - mean) >= statistic * spread(part) - 1e-9
    return extreme / n**n


@given(st.lists(st.sampled_from([-1.0, -0.4, -0.2, 0.0, 0.2, 0.6, 1.0]), min_size=2, max_size=5))
@settings(max_examples=25, deadline=None)
def test_bootstrap_against_all_resamples(values):
    assume(len(set(values)) > 1)
    assume(abs(sum(values)) > 1e-9)
    expected = enumerated_p(values)
    error = math.sqrt(expected * (1 - expected) / RESAMPLES) + 1 / RESAMPLES
    assert bootstrap_p(values) == pytest.approx(expected, abs=5 * error)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=30), st.randoms())
@settings(max_examples=40, deadline=None)
def test_symmetry_and_identical_models(pairs, luck):
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    p = paired_p(first, second)
    assert 0 < p <= 1
    mixed = luck.sample(pairs, len(pairs))
    assert paired_p(*(np.array(side) for side in zip(*mixed, strict=True))) == p
    assert paired_p(first[::-1], second[::-1]) == p
    assert paired_p(second, first) == pytest.approx(p, abs=0.05)
    assert paired_p(first, first) == 1.0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_binary_outcomes_use_mcnemar(pairs):
    first, second = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    b, c = pairs.count((1, 0)), pairs.count((0, 1))
    assert paired_p(first, second) == mcnemar(b, c)
    assert paired_p(second, first) == paired_p(first, second)


@pytest.mark.parametrize(
    "draw", [lambda r: r.gauss(0, 1), lambda r: r.choice([-0.2, 0, 0, 0.2]), lambda r: r.expovariate(1) - 1]
)
def test_false_positive_rate(draw):
    luck = random.Random(3)
    result = sum(bootstrap_p([draw(luck) for _ in range(15)]) < SURE for _ in range(200))
    # Binomial(200, 0.05) is 21 or more once in a thousand times.
    assert result <= 20


def test_many_samples_and_closed_forms():
    luck = np.random.default_rng(0)
    values = luck.normal(0.02, 1, 25_000)
    t = values.mean() / values.std() * math.sqrt(len(values))
    assert bootstrap_p(values) == pytest.approx(math.erfc(abs(t) / math.sqrt(2)), abs=1e-9)
    assert bootstrap_p(values[:20_000]) == pytest.approx(bootstrap_p(values), abs=0.1)
    assert bootstrap_p([0.25] * 5) == 2**-4
    assert bootstrap_p([]) == 1.0
    assert unpaired_p(0.5, 0.4, math.nan, 0.1) is None
    assert unpaired_p(0.5, 0.4, 0.0, 0.0) == 0.0


@given(st.lists(st.one_of(st.just(math.nan), st.floats(-100, 100).map(lambda x: round(x, 3)))))
def test_outcomes_round_trip(values):
    np.testing.assert_allclose(unpack_outcomes(pack_outcomes(values)), np.array(values))


# -- verdicts on drawn outcomes ------------------------------------------------------------------------------------


def random_outcomes(task, samples, level, luck):
    """Outcomes of a task around a level in [0, 1]."""
    if task == "classification":
        return (luck.random(samples) < level).astype(float)
    if task == "multilabel":
        return (luck.random((samples, 4)) < level).mean(axis=1)
    return luck.normal(level - 2, 0.3, samples)


def content(task, samples, levels, seed, same=()):
    """A diagnosis whose outcomes are drawn around known levels; metrics in ``same`` have those of another one."""
    luck = np.random.default_rng(seed)
    score = "negative_error" if task == "regression" else "accuracy"
    each = {}
    for kind, level in levels.items():
        each[score + kind] = random_outcomes(task, samples, level, luck)
    for kind, other in dict(same).items():
        each[score + kind] = each[score + other]
    details = {"score": {"outcomes": {metric: pack_outcomes(values) for metric, values in each.items()}}}
    metrics = {metric: float(unpack_outcomes(pack_outcomes(values)).mean()) for metric, values in each.items()}
    return {
        "names": ["audio", "image"],
        "task": task,
        "samples": samples,
        "metrics": metrics,
        "details": details,
    }, score


LEVELS = st.fixed_dictionaries(
    {kind: st.sampled_from([0.2, 0.5, 0.55, 0.6, 0.9]) for kind in (
        "", "_constant", "_mask/audio", "_mask/image", "_noise/audio", "_noise/image", "_alone/audio", "_alone/image"
    )}
)  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@given(st.integers(2, 120), LEVELS, st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_verdicts_follow_the_significance_tests(task, samples, levels, seed):
    result, score = content(task, samples, levels, seed)
    actual = VerdictEvidence(result)
    message = {verdict.key: verdict for verdict in verdicts(result)}
    above = actual.compare(score, f"{score}_constant")
    assert above.paired
    assert ("chance" in message) == (not (above.p < SURE and above.difference > 0))
    for name in actual.names:
        falls = [
            one.p < SURE and one.difference < 0
            for kind in ("mask", "noise")
            if (one := actual.compare(f"{score}_{kind}/{name}", score))
        ]
        assert (message[f"use/{name}"].ok == "good") == (any(falls) and "chance" not in message)
        assert (message[f"use/{name}"].claim == f"uses {name}") == (message[f"use/{name}"].ok == "good")
        left = actual.compare(f"{score}_noise/{name}", f"{score}_constant")
        other = {"audio": "image", "image": "audio"}[name]
        gap = actual.compare(f"{score}_noise/{name}", f"{score}_alone/{other}")
        verdict = message[f"robustness/{name}"]
        if verdict.ok == "good":
            assert left.p < SURE
            assert left.difference > 0
        if verdict.ok == "bad":
            assert gap.p < SURE
            assert gap.difference < 0
    best = max(actual.names, key=lambda name: result["metrics"][f"{score}_alone/{name}"])
    gap = actual.compare(score, f"{score}_alone/{best}")
    assert (message["unimodal_baseline"].ok == "good") == (gap.better and "chance" not in message)
    assert (message["unimodal_baseline"].ok == "bad") == gap.worse
    turned = {**result["details"]["score"]["outcomes"]}
    turned = {metric: pack_outcomes(unpack_outcomes(packed)[::-1]) for metric, packed in turned.items()}
    again = verdicts({**result, "details": {"score": {"outcomes": turned}}})
    assert [(v.key, v.ok, v.text) for v in again] == [(v.key, v.ok, v.text) for v in message.values()]


@pytest.mark.parametrize("task", TASKS)
@given(st.integers(2, 100), LEVELS, st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_constant_prediction_score_is_not_a_success(task, samples, levels, seed):
    result, _ = content(task, samples, levels, seed, {"": "_constant", "_noise/image": "_constant"})
    actual = verdicts(result)
    assert actual[0].key == "chance"
    assert headline("mine", actual) == "mine is no better than a constant prediction"
    assert all(verdict.ok != "good" for verdict in actual if verdict.key != "robustness/audio")
    assert not any("uses" in verdict.claim for verdict in actual)


@pytest.mark.parametrize("task", TASKS)
def test_fallback_to_constant_prediction_is_not_a_success(task):
    levels = dict.fromkeys(("_constant", "_noise/audio", "_alone/image"), 0.5) | {"": 0.9, "_alone/audio": 0.9}
    result, _ = content(task, 500, levels, 0, {"_noise/audio": "_constant", "_alone/image": "_constant"})
    verdict = {verdict.key: verdict for verdict in verdicts(result)}["robustness/audio"]
    assert (verdict.claim, verdict.ok) == ("has no informative alternative to audio", "neutral")
    assert "constant prediction" in verdict.text


# -- whole diagnoses -----------------------------------------------------------------------------------------------


class ConstantModel(nn.Module):
    """Always gives the same answer."""

    def __init__(self, answer):
        super().__init__()
        self.names, self.answer = ("audio", "image"), torch.tensor(answer)

    def forward(self, batch):
        logits = self.answer.expand(len(batch["audio"]), -1)
        return eq.Output(features=logits, logits=logits)


@pytest.mark.parametrize("task", TASKS)
def test_constant_model_uses_no_modality(task):
    luck = torch.Generator().manual_seed(0)
    sizes = (120, 40)
    loader = [{name: torch.randn(size, 4, 3, generator=luck) for name in ("audio", "image")} for size in sizes]
    for batch, size in zip(loader, sizes, strict=True):
        batch["target"] = {
            "classification": (torch.rand(size, generator=luck) < 0.3).long(),
            "multilabel": (torch.rand(size, 2, generator=luck) < 0.3).float(),
            "regression": torch.randn(size, 2, generator=luck).exp(),
        }[task]
    target = torch.cat([batch["target"] for batch in loader])
    answer = {"classification": [1.0, 0.0], "multilabel": [-1.0, -1.0]}.get(task)
    model = ConstantModel(target.median(dim=0).values.tolist() if answer is None else answer)
    model.task = task
    result = diagnose(model, loader)
    assert result.verdicts[0].key == "chance"
    assert not any("uses" in verdict.claim or verdict.ok == "good" for verdict in result.verdicts)


def test_unimodal_scores_use_samples_with_the_modality():
    model = weighted_model(audio=1.0, image=1.0)
    loader = labeled_batches(model)
    samples = sum(len(batch["target"]) for batch in loader)
    # The model is always right, and so is audio alone on the half of the samples that has it.
    half = torch.ones(samples, dtype=torch.double)
    half[::2] = torch.nan
    alone = {"audio": half, "image": torch.zeros(samples)}
    result = diagnose(model, loader, tests=["noise"], alone=alone)
    assert result.metrics["accuracy_alone/audio"] == 1.0
    assert result.metrics["accuracy_with/audio"] == 1.0
    golden = {verdict.key: verdict for verdict in result.verdicts}["unimodal_baseline"]
    assert golden.claim == "is no better than its best unimodal baseline"
    assert f"on the {samples // 2} samples with both" in golden.text
    compared = VerdictEvidence(result.to_dict()).compare("accuracy_alone/audio", "accuracy_noise/image")
    kept = unpack_outcomes(result.details["noise"]["outcomes"]["accuracy_noise/image"])[1::2]
    assert (compared.samples, compared.paired) == (samples // 2, True)
    assert compared.base == pytest.approx(kept.mean())


def test_outcomes_of_different_length_raise():
    model = weighted_model(audio=1.0, image=1.0)
    with pytest.raises(ShapeError, match=r"diagnose alone 'audio': expected a score, or the outcomes of 308"):
        diagnose(model, labeled_batches(model), alone={"audio": torch.ones(3), "image": 0.5})


def test_models_are_paired_on_common_samples():
    result, _ = content("classification", 200, {"": 0.6, "_constant": 0.3}, 0)
    other = {**result, "metrics": {**result["metrics"]}}
    one, two = VerdictEvidence(result), VerdictEvidence(other)
    assert one.compare("accuracy", "accuracy", two).p == 1.0
    assert one.compare("accuracy", "accuracy", two).paired
    elsewhere, _ = content("classification", 200, {"": 0.6, "_constant": 0.3}, 1)
    assert not one.compare("accuracy", "accuracy", VerdictEvidence(elsewhere)).paired


@pytest.mark.parametrize(
    "values", [[1, 0, math.nan], [0.5], [10.0], [-1.0], [0.25, math.nan, -3.5e-7], [math.nan], [1.0], []]
)
def test_outcomes_as_a_string(values):
    text = pack_text(values)
    assert isinstance(text, str)
    np.testing.assert_allclose(unpack_outcomes(text), np.array(values, dtype=float))


def test_grouped_p_against_the_means_of_equal_groups():
    """For groups of one size the test is the t-test of their means."""
    from scipy import stats

    random_numbers = np.random.default_rng(0)
    for count, size in ((2, 5), (4, 7), (9, 1)):
        values = random_numbers.normal(0.3, 1, (count, size))
        order = random_numbers.permutation(count * size)
        groups = np.repeat(np.arange(count), size)
        expected = float(stats.ttest_1samp(values.mean(axis=1), 0).pvalue)
        assert grouped_p(values.reshape(-1)[order], groups[order]) == pytest.approx(expected)
    assert grouped_p(np.array([1.0, 0.0, 1.0]), np.array([0, 0, 0])) is None
    assert grouped_p(np.array([1.0, 1.0]), np.array([0, 1])) is None
    assert grouped_p(np.zeros(4), np.array([0, 0, 1, 1])) == 1.0


@pytest.mark.parametrize("scale", [1e-14, 1e-6, 1e6, 1e12])
def test_grouped_p_does_not_depend_on_the_scale(scale):
    """The rounding error of equal differences is no evidence, and small differences are not equal."""
    groups = np.array([0, 0, 1, 1, 2, 2, 2])
    values = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    assert grouped_p(scale * values, groups) == pytest.approx(grouped_p(values, groups))
    assert grouped_p(np.full(7, 1.1 * scale + 0.1), groups) is None


def test_grouped_p_rejects_a_true_hypothesis_at_its_level():
    """With a common effect of the samples of a group, the test over samples rejects far too often."""
    random_numbers = np.random.default_rng(1)
    groups, trials = np.repeat(np.arange(8), 25), 400
    rejected = {"samples": 0, "groups": 0}
    for _ in range(trials):
        values = random_numbers.normal(size=8)[groups] + random_numbers.normal(size=200)
        rejected["samples"] += bootstrap_p(values) < SURE
        rejected["groups"] += (grouped_p(values, groups) or 1.0) < SURE
    assert rejected["samples"] > 0.4 * trials
    assert rejected["groups"] / trials == pytest.approx(SURE, abs=3 * math.sqrt(SURE * (1 - SURE) / trials))
