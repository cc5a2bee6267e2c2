"""Verdicts from metrics: every rule on both sides of its threshold, and no claim beyond the evidence."""

import math
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.diagnostics.suite import diagnose
from equipoise.report.verdict_attention import BLIND, FLAT, FOLLOWS, GUESSES, KNOWS, STILL
from equipoise.report.verdict_evidence import Verdict, VerdictEvidence
from equipoise.report.verdict_list import headline, verdicts
from equipoise.report.verdict_use import GRACE, SMALL, dominant_modality
from equipoise.results.significance import SURE
from helpers.diagnosis import labeled_batches, quality_attention, quality_batches, weighted_model

MANY = 10_000


def content(samples=MANY, names=("audio", "image"), task="classification", details=None, **metrics):
    """``mask__audio=0.5`` is the metric mask/audio of the score."""
    known = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"names": list(names), "task": task, "samples": samples, "metrics": known, "details": details or {}}


def verdicts_of(**given):
    return {verdict.key: verdict for verdict in verdicts(content(**given))}


def slow_unpaired(samples, a, b):
    """Two-sided p of a normal test of two fractions, each with one success and one failure more."""
    a, b = ((samples * part + 1) / (samples + 2) for part in (a, b))
    error = math.sqrt((a * (1 - a) + b * (1 - b)) / (samples + 2))
    return 2 * NormalDist().cdf(-abs(a - b) / error)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5000), st.floats(0, 1), st.floats(0, 1))
def test_scores_without_outcomes_are_compared_unpaired(samples, a, b):
    result = VerdictEvidence(content(samples, accuracy=a, accuracy_mask__audio=b))
    compared = result.compare("accuracy_mask/audio", "accuracy")
    assert compared.p == pytest.approx(slow_unpaired(samples, a, b), abs=1e-12)
    assert compared.sure == (compared.p < SURE)
    assert not compared.paired
    back = result.compare("accuracy", "accuracy_mask/audio")
    assert (back.p, back.difference) == (pytest.approx(compared.p), pytest.approx(-compared.difference))


@settings(max_examples=40, deadline=None)
@given(st.integers(10, 3000), st.floats(0.2, 0.95), st.floats(-0.1, 0.1))
def test_use_requires_significance(samples, full, effect):
    left = min(max(full + effect, 0.0), 1.0)
    result = verdicts_of(samples=samples, accuracy=full, accuracy_mask__audio=left)["use/audio"]
    big = slow_unpaired(samples, full, left) < SURE
    assert (result.claim in ("uses audio", "is better without audio")) == big
    if not big:
        assert "p = " in result.text
        assert result.ok != "good"


def test_significance_level_boundaries():
    # sqrt(2 * 0.25 / 800) = 0.025, so 1.96 of them are 4.9 points.
    inside = verdicts_of(samples=800, accuracy=0.5, accuracy_mask__audio=0.452)["use/audio"]
    outside = verdicts_of(samples=800, accuracy=0.5, accuracy_mask__audio=0.449)["use/audio"]
    assert (inside.claim, inside.ok) == ("shows no significant effect of audio", "neutral")
    assert (outside.claim, outside.ok) == ("uses audio", "good")
    assert inside.text == (
        "No significant effect of audio: 50.0 % unmodified, 45.2 % without it (−4.8 points, p = 0.055, unpaired)."
    )
    assert outside.figures == {"accuracy": 0.5, "accuracy_mask/audio": 0.449}
    assert outside.test == "masking"


def test_ignored_modality_requires_enough_samples():
    many = verdicts_of(accuracy=0.5, accuracy_mask__audio=0.5)["use/audio"]
    assert (many.claim, many.ok) == ("ignores audio", "bad")
    assert 1.96 * math.sqrt(2 * 0.25 / MANY) <= SMALL
    few = verdicts_of(samples=800, accuracy=0.5, accuracy_mask__audio=0.5)["use/audio"]
    assert few.ok == "neutral"
    # Where no answer changes at all, even a few samples say so.
    same = verdicts_of(samples=7, accuracy=0.5, accuracy_noise__audio=0.5, changed_noise__audio=0.0)["use/audio"]
    assert same.text == "Ignores audio: none of 7 predictions changes when it is replaced by noise."
    assert (same.ok, same.test) == ("bad", "noise")


def test_use_of_all_modalities_is_one_sentence():
    metrics = {"accuracy": 0.8, "accuracy_mask__audio": 0.5, "accuracy_mask__image": 0.6}
    assert (verdicts_of(**metrics)["use"].claim, verdicts_of(**metrics)["use"].ok) == ("uses both modalities", "good")
    three = {**metrics, "accuracy_mask__text": 0.7, "names": ("audio", "image", "text")}
    assert verdicts_of(**three)["use"].claim == "uses all 3 modalities"
    ignoring = verdicts_of(**{**three, "accuracy_mask__image": 0.8})["use"]
    assert (ignoring.claim, ignoring.ok) == ("uses audio and text and ignores image", "bad")
    assert (
        verdicts_of(**{**metrics, "accuracy_mask__image": 0.9})["use"].claim == "uses audio and is better without image"
    )
    open_ = verdicts_of(**{**metrics, "accuracy_mask__image": 0.79, "samples": 100})["use"]
    assert (open_.claim, open_.ok) == ("uses audio and shows no significant effect of image", "neutral")
    # Of one that was not measured nothing is said for all.
    assert "use" not in verdicts_of(accuracy=0.8, accuracy_mask__audio=0.5)
    assert not verdicts(content(names=("audio",), accuracy=0.8, accuracy_noise__audio=0.1))


def test_dominance_threshold():
    metrics = {"accuracy": 0.8, "accuracy_mask__audio": 0.7, "accuracy_mask__image": 0.4}
    at = {"shapley__audio": 0.25, "shapley__image": 0.75}
    result = verdicts_of(**metrics, **at)["use"]
    assert (result.claim, result.test) == ("relies mostly on image", "shapley")
    assert "accounts for 75 %" in result.text
    assert verdicts_of(**metrics, shapley__audio=0.26, shapley__image=0.74)["use"].claim == "uses both modalities"
    # The same parts of a difference that may be luck.
    luck = {**metrics, "accuracy_mask__image": 0.69}
    assert verdicts_of(**luck, **at)["use"].claim == "uses both modalities"
    assert [dominant_modality(n) for n in (2, 4)] == [0.75, 0.625]
    harmful = verdicts_of(**metrics, shapley__audio=-0.2, shapley__image=-0.1)["use"]
    assert harmful.claim == "uses both modalities"


@pytest.mark.parametrize(
    ("r", "p", "claim", "ok"),
    [
        (FOLLOWS, 0.0, "responds to input quality", "good"),
        (FOLLOWS - 0.01, 0.0, "responds weakly to input quality", "neutral"),
        (BLIND, 0.0, "responds weakly to input quality", "neutral"),
        (BLIND - 0.01, 0.0, "does not respond to input quality", "bad"),
        (-BLIND + 0.01, 0.0, "does not respond to input quality", "bad"),
        (-BLIND, 0.0, "attends more to noise", "bad"),
        (0.01, 0.4, "does not respond to input quality", "bad"),
        (math.nan, math.nan, "does not respond to input quality", "bad"),
    ],
)
def test_attention_quality_claims(r, p, claim, ok):
    result = verdicts_of(noise_attention_r=r, noise_attention_p=p, details={"response": {"modality": "audio"}})[
        "quality"
    ]
    assert (result.claim, result.ok, result.test) == (claim, ok, "response")
    assert "audio" in result.text
    assert "nan" not in result.text


def test_different_signs_depend_on_the_noise_level():
    result = verdicts_of(noise_attention_r=-0.39, noise_attention_p=0.0, noise_attention_r_own=0.03)["level"]
    assert (result.claim, result.ok, result.test) == ("responds to the level of the noise", "bad", "response")
    assert "r = \N{MINUS SIGN}0.39; with those of each sample r = +0.03. The signs differ" in result.text
    assert "level" not in verdicts_of(noise_attention_r=-0.39, noise_attention_p=0.0, noise_attention_r_own=-0.03)
    assert "level" not in verdicts_of(noise_attention_r=-0.39, noise_attention_p=0.0, noise_attention_r_own=math.nan)


def test_constant_attention_claim_requires_enough_samples():
    result = verdicts_of(samples=12, noise_attention_r=0.2, noise_attention_p=0.3)["quality"]
    assert (result.claim, result.ok) == ("shows no significant response of attention to noise", "neutral")
    assert "r = +0.20, p = 0.30" in result.text


@pytest.mark.parametrize(
    ("left", "samples", "ok"),
    [(0.65 - GRACE + 1e-6, MANY, "good"), (0.65 - GRACE - 0.001, MANY, "bad"), (0.60, 50, "neutral"), (0.7, 9, "good")],
)
def test_fallback_compared_with_the_other_modality_alone(left, samples, ok):
    metrics = {"accuracy": 0.8, "accuracy_noise__audio": left, "accuracy_alone__image": 0.65}
    result = verdicts_of(samples=samples, **metrics, accuracy_alone__audio=0.4, accuracy_mask__audio=0.1)[
        "robustness/audio"
    ]
    assert result.ok == ok
    assert "image alone reaches 65.0 %" in result.text
    assert result.figures == {"accuracy_noise/audio": left, "accuracy_alone/image": 0.65}


def test_fallback_compared_with_the_masked_score():
    result = verdicts_of(accuracy=0.8, accuracy_noise__audio=0.3, accuracy_mask__audio=0.6)["robustness/audio"]
    assert result.text == (
        "Not robust to noise: with audio replaced by noise the accuracy is 30.0 %, masking audio gives 60.0 % "
        "(−30.0 points, p < 0.001, unpaired)."
    )
    assert "robustness/audio" not in verdicts_of(accuracy=0.8, accuracy_noise__audio=0.3)


def test_unimodal_baseline():
    worse = verdicts_of(accuracy=0.6, accuracy_alone__image=0.7, accuracy_alone__audio=0.4)["unimodal_baseline"]
    assert (worse.claim, worse.ok) == ("is worse than its best unimodal baseline", "bad")
    assert "60.0 % compared with 70.0 % of image alone (unimodal head, a lower bound" in worse.text
    models = verdicts_of(accuracy=0.8, accuracy_alone__image=0.7, details={"score": {"alone_from": "models"}})[
        "unimodal_baseline"
    ]
    assert models.ok == "good"
    assert "(separate unimodal model; " in models.text
    same = verdicts_of(samples=100, accuracy=0.72, accuracy_alone__image=0.7)["unimodal_baseline"]
    assert (same.ok, same.claim) == ("neutral", "is no better than its best unimodal baseline")
    assert "unimodal_baseline" not in verdicts_of(accuracy=0.6)


def test_chance_level_model_is_reported_first():
    result = verdicts(content(samples=200, accuracy=0.35, accuracy_constant=0.3, accuracy_mask__audio=0.3))
    assert result[0].key == "chance"
    assert headline("mine", result) == "mine is no better than a constant prediction"
    assert "chance" not in verdicts_of(accuracy=0.35, accuracy_constant=0.3)
    assert "chance" in verdicts_of(accuracy=0.2, accuracy_constant=0.3)


def test_attention_and_confidence_thresholds():
    assert "constant_attention" in verdicts_of(share_spread__audio=STILL - 1e-6, share_spread__image=0.0)
    assert "constant_attention" not in verdicts_of(share_spread__audio=STILL, share_spread__image=0.0)
    assert verdicts_of(residual_last=FLAT - 1e-6)["collapse"].ok == "bad"
    assert "collapse" not in verdicts_of(residual_last=FLAT)
    details = {"ood": {"outside": MANY}}
    given = [KNOWS, KNOWS - 1e-6, GUESSES, GUESSES - 1e-6, 0.5, 0.2]
    result = [verdicts_of(auroc=value, details=details)["ood"] for value in given]
    assert [verdict.ok for verdict in result] == ["good", "neutral", "neutral", "bad", "bad", "bad"]
    assert "does not significantly separate" in result[4].text
    # As far from chance as 30 samples of both kinds may be by luck: sqrt(61 / (12 * 900)) = 0.0752.
    few = {"samples": 30, "details": {"ood": {"outside": 30}}}
    assert verdicts_of(auroc=0.64, **few)["ood"].claim == "does not detect out-of-distribution inputs"
    assert verdicts_of(auroc=0.66, **few)["ood"].claim == "detects out-of-distribution inputs partly"


def test_quag_verdict_requires_averaged_attention():
    crossed = {"accuracy": 0.8, "quag__crossmodal": 0.6}
    assert verdicts_of(**crossed)["quag"].ok == "good"
    assert verdicts_of(**{**crossed, "quag__crossmodal": 0.8})["quag"].ok == "neutral"
    assert "quag" not in verdicts_of(**crossed, details={"quag": {"changed": {"crossmodal": []}}})


def test_regression_uses_per_sample_errors():
    details = {"score": {"deviation": 0.5}}
    regression = {"task": "regression", "samples": 200, "details": details, "negative_error": -1.0}
    # sqrt(2 * 0.25 / 200) = 0.05
    assert verdicts_of(**regression, negative_error_mask__audio=-1.09)["use/audio"].ok == "neutral"
    result = verdicts_of(**regression, negative_error_mask__audio=-1.11)["use/audio"]
    # An error grows; it is no negative number that falls.
    assert result.text == "Uses audio: 1.00 unmodified, 1.11 without it (+0.11, p = 0.028, unpaired)."
    # Without the samples' errors nothing is measurable, and nothing is ignored either.
    blank = verdicts_of(**{**regression, "details": {}}, negative_error_mask__audio=-9.0)["use/audio"]
    assert blank.ok == "neutral"


@settings(max_examples=25, deadline=None)
@given(st.permutations(["audio", "image", "text"]), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_verdicts_do_not_depend_on_modality_order(order, left):
    metrics = {f"accuracy_mask/{name}": value for name, value in zip(("audio", "image", "text"), left, strict=True)}
    base = {**content(samples=300, names=order, accuracy=0.7), "metrics": {"accuracy": 0.7, **metrics}}
    result = {verdict.key: (verdict.ok, verdict.text) for verdict in verdicts(base)}
    for name in order:
        again = {**base, "names": ["audio", "image", "text"]}
        assert result[f"use/{name}"] == {v.key: (v.ok, v.text) for v in verdicts(again)}[f"use/{name}"]


def test_no_measurements_give_no_verdicts():
    assert verdicts(content()) == []
    assert verdicts(content(accuracy=None, accuracy_mask__audio=None)) == []
    assert headline("mine", []) == "Diagnosis of mine"
    assert headline("mine", [Verdict("use", "ignores audio", "")]) == "mine ignores audio"


def test_model_with_zero_weights_ignores_the_modality():
    model = weighted_model(audio=1.0, image=0.0)
    result = diagnose(model, labeled_batches(model))
    by_key = {verdict.key: verdict for verdict in result.verdicts}
    assert by_key["use"].claim == "uses audio and ignores image"
    assert by_key["use/image"].figures["changed_noise/image"] == 0.0
    assert by_key["use/image"].ok == "bad"
    # It has nothing to lose by noise in what it ignores.
    assert by_key["robustness/image"].ok == "good"


def test_model_with_both_weights_uses_both():
    model = weighted_model(audio=1.0, image=1.0)
    result = diagnose(model, labeled_batches(model))
    assert {v.key: v.claim for v in result.verdicts}["use"] == "uses both modalities"
    # A static model has no attention to look at quality with.
    assert "quality" not in {verdict.key for verdict in result.verdicts}
    assert "attention" in result.skipped["response"]


@pytest.mark.parametrize(
    ("sharpness", "mean", "claim"),
    [
        (6.0, -1.0, "responds to input quality"),
        (6.0, 3.0, "attends more to noise"),
        (0.0, -1.0, "does not respond to input quality"),
    ],
)
def test_attention_that_follows_or_ignores_noise(sharpness, mean, claim):
    model = quality_attention(sharpness)
    result = diagnose(
        model, quality_batches(model), noise={"audio": (mean, 0.1), "image": (mean, 0.1)}, modality="audio"
    )
    by_key = {verdict.key: verdict for verdict in result.verdicts}
    assert by_key["quality"].claim == claim
    # With even attention every sample is divided alike.
    assert ("constant_attention" in by_key) == (sharpness == 0.0)
