"""``eq.diagnose`` with a metric: the direction of errors, own functions, names that meet, undefined values."""

import math

import pytest
import torch

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.report.verdict_evidence import VerdictEvidence
from helpers.diagnosis import labeled_batches, weighted_model

TESTS = ["noise", "masking"]


@pytest.fixture(scope="module")
def classifier():
    model = weighted_model(audio=3.0, image=0.0)
    return model, labeled_batches(model, sizes=(150,), wrong=0.2, seed=5)


def test_verdicts_use_the_given_metric(classifier):
    model, batches = classifier
    for metric in ("f1_macro", "auroc", "balanced_accuracy"):
        result = eq.diagnose(model, batches, metric=metric, tests=TESTS)
        claims = {verdict.key: verdict for verdict in result.verdicts}
        assert claims["use/audio"].ok == "good"
        assert result.metrics[f"{metric}_mask/image"] == pytest.approx(result.metrics[metric])
        assert result.metrics[f"{metric}_mask/audio"] < result.metrics[metric] - 0.1
        assert set(result.details["masking"]["resamples"]) == {f"{metric}_mask/audio", f"{metric}_mask/image"}


def test_accuracy_metric_equals_the_default(classifier):
    model, batches = classifier
    plain, named = (eq.diagnose(model, batches, tests=TESTS, **more) for more in ({}, {"metric": "accuracy"}))
    assert [v.text for v in plain.verdicts] == [v.text for v in named.verdicts]
    assert "score" not in plain.protocol
    assert "resamples" not in plain.details["noise"]


def test_lower_errors_are_better():
    model = weighted_model(audio=1.0, image=0.0)
    model.task = "regression"
    batches = labeled_batches(model, sizes=(150,), seed=5)
    with torch.no_grad():
        for batch in batches:
            batch["target"] = model(batch).logits + 0.05 * torch.randn(
                150, 3, generator=torch.Generator().manual_seed(1)
            )
    for metric in ("mae", "rmse", "concordance"):
        result = eq.diagnose(model, batches, metric=metric, tests=TESTS)
        claims = {verdict.key: verdict.ok for verdict in result.verdicts}
        assert claims["use/audio"] == "good"
        assert "chance" not in claims
        worse = result.metrics[f"{metric}_noise/audio"] - result.metrics[metric]
        assert (worse > 0) == (metric != "concordance")
        evidence = VerdictEvidence(result.to_dict())
        compared = evidence.compare(f"{metric}_noise/audio", metric)
        assert compared.worse
        assert not compared.better


def test_undefined_metric_has_a_reason():
    model = weighted_model(audio=1.0, image=0.0)
    batches = labeled_batches(model, sizes=(40,), seed=5)
    for batch in batches:
        batch["target"] = torch.zeros(40, dtype=torch.long)
    result = eq.diagnose(model, batches, metric="auroc", tests=TESTS)
    assert math.isnan(result.metrics["auroc"])
    assert result.details["score"]["undefined"] == {"auroc": "all targets are of one class"}
    assert result.to_dict()["metrics"]["auroc"] is None


def test_user_defined_metric_functions(classifier):
    model, batches = classifier
    own = {"confidence": lambda scores, target: scores.gather(1, target[:, None]).mean()}
    result = eq.diagnose(model, batches, metrics=own, tests=["noise"])
    assert result.protocol["score"] == "confidence"
    assert result.metrics["confidence_noise/audio"] < result.metrics["confidence"]
    beside = eq.diagnose(model, batches, metric="f1_macro", metrics=own, tests=["noise"])
    assert beside.protocol["score"] == "f1_macro"
    assert beside.metrics["confidence_noise/audio"] == pytest.approx(result.metrics["confidence_noise/audio"])


def test_auroc_names_are_distinct(classifier, tmp_path):
    model, batches = classifier
    outside = [{name: 3 * torch.randn_like(batches[0][name]) for name in model.names}]
    plain = eq.diagnose(model, batches, outside=outside, tests=["ood"])
    named = eq.diagnose(model, batches, outside=outside, tests=["ood"], metric="auroc")
    assert named.metrics["ood_auroc"] == plain.metrics["auroc"]
    assert named.metrics["auroc"] != plain.metrics["auroc"]
    assert {v.key: v.text for v in named.verdicts}["ood"] == {v.key: v.text for v in plain.verdicts}["ood"]
    text = named.report(tmp_path / "report.html").read_text()
    assert "AUROC of the confidence" in text


def test_unknown_metric_names_raise(classifier):
    model, batches = classifier
    with pytest.raises(ConfigError, match=r"diagnose: expected a known metric, got 'f2'"):
        eq.diagnose(model, batches, metric="f2")
    with pytest.raises(ConfigError, match=r"diagnose: expected a metric for classification: .*, got 'rmse'"):
        eq.diagnose(model, batches, metric="rmse")
