"""Metrics that a recipe names: from the recipe to results, table, page, verdict and diagnosis."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import equipoise as eq
from equipoise import data
from equipoise.cli import run as run_command
from equipoise.cli.results_table import show
from equipoise.errors import ConfigError
from equipoise.report.comparison_page import page
from equipoise.report.comparison_text import verdict
from equipoise.report.results_view import ResultsView
from equipoise.results.significance import unpack_outcomes
from equipoise.training import recipes
from equipoise.training.comparison import compare
from equipoise.training.run import load_run_dataset
from equipoise.training.run_evaluation import collect_test_predictions, evaluate_run
from equipoise.training.run_spec import RunSpec
from helpers.runs import recipe, run_spec
from helpers.tolerance import TOL

NAMES = ("audio", "image", "sensor")
NAMED = {"classification": ["f1_macro", "auroc"], "multilabel": ["map"], "regression": ["rmse", "concordance", "mae"]}


def tiny_recipe(task):
    config = recipes.load_recipe("generated").with_train(epochs=1, batch_size=20)
    small = {"dim": 8, "depth": 1, "heads": 1}
    encoders = {name: {**options, **small} for name, options in config.encoders.items()}
    return replace(config, data={**config.data, "task": task, "samples": 60}, encoders=encoders, metrics=NAMED[task])


@pytest.fixture(scope="module", params=NAMED)
def comparison(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    config = tiny_recipe(request.param)
    return request.param, config, out, compare(config, ["concat", "joint"], seeds=1, out=out, workers=0)


def test_results_contain_metrics_for_clean_and_noisy_input(comparison):
    task, _, _, content = comparison
    assert content["failures"] == []
    assert content["protocol"]["score"] == NAMED[task][0]
    for run in content["runs"]:
        expected = [f"{m}{c}" for m in NAMED[task] for c in ("", *(f"_noise/{name}" for name in NAMES))]
        assert all(math.isfinite(run["metrics"][name]) for name in expected)
        assert {f"val_{name}" for name in NAMED[task]} <= set(run["metrics"])
        for name in expected:
            low, high = run["intervals"][name]
            assert low <= run["metrics"][name] <= high or low == pytest.approx(high)
        assert (NAMED[task][0] in run["resamples"]) != (NAMED[task][0] in run["outcomes"])


def test_values_match_the_predictions(comparison):
    task, result, out, content = comparison
    spec = RunSpec(result, "joint", 0)
    model, source = eq.load(spec.folder(out)), load_run_dataset(result, None)
    seen = collect_test_predictions(model, source, "test")
    run = next(run for run in content["runs"] if run["method"] == "joint")
    if task == "regression":
        error = seen.logits.double() - seen.target.double().reshape(seen.logits.shape)
        right = {"rmse": float(error.square().mean().sqrt()), "mae": float(error.abs().mean())}
        assert run["metrics"]["mae"] == pytest.approx(-run["metrics"]["negative_error"], rel=TOL[torch.float32]["rtol"])
    else:
        right = {}
    for name, value in right.items():
        assert run["metrics"][name] == pytest.approx(value, rel=TOL[torch.float32]["rtol"])
    mine = evaluate_run(model, source, result, metrics={"largest": lambda scores, target: scores.max()})
    assert mine["metrics"]["largest"] == pytest.approx(
        float((seen.logits.double() if task == "regression" else probabilities(seen.logits, task)).max())
    )
    assert "largest_noise/audio" in mine["metrics"]


def probabilities(logits, task):
    return logits.double().sigmoid() if task == "multilabel" else logits.double().softmax(dim=1)


def test_first_metric_is_the_main_metric(comparison):
    task, _, _, content = comparison
    words = {
        "classification": "macro F1",
        "multilabel": "mean average precision",
        "regression": "root mean squared error",
    }
    console = Console(file=io.StringIO(), width=250)
    show(content, console)
    text = console.file.getvalue()
    assert words[task] in text
    assert "95 % intervals over the test samples" in text
    assert ("lower is better" in text) == (task == "regression")
    view = ResultsView(content)
    assert view.score == NAMED[task][0]
    assert words[task] in " ".join(verdict(view))
    assert "95 % over samples" in page(content)


def test_best_method_has_the_smallest_error(comparison):
    task, _, _, content = comparison
    view = ResultsView(content)
    means = {m: view.row(m, view.score)["mean"] for m in view.methods}
    best = (min if task == "regression" else max)(means, key=means.get)
    most = "lowest" if task == "regression" else "highest mean"
    assert any(sentence.startswith(f"{best} has the {most}") for sentence in verdict(view))


def test_one_seed_is_compared_by_the_paired_bootstrap(comparison):
    task, _, _, content = comparison
    from equipoise.report.effect_sizes import effect

    name = NAMED[task][0]
    result = effect(ResultsView(content), "joint", name)
    stored = {run["method"]: run for run in content["runs"]}
    rows = {m: unpack_outcomes(stored[m]["resamples"][name]) for m in ("joint", "concat")}
    difference = stored["joint"]["metrics"][name] - stored["concat"]["metrics"][name]
    extreme = np.abs(rows["joint"] - rows["concat"] - difference) >= abs(difference)
    assert result.p == pytest.approx((extreme.sum() + 1) / (len(extreme) + 1), abs=0.003)


def test_finished_run_is_reused(comparison):
    _, result, out, content = comparison
    again = compare(result, ["concat", "joint"], seeds=1, out=out, workers=0)
    assert json.dumps(again["runs"], sort_keys=True) == json.dumps(content["runs"], sort_keys=True)


def test_diagnosis_by_a_metric(comparison):
    task, result, out, _ = comparison
    model, source = eq.load(RunSpec(result, "joint", 0).folder(out)), load_run_dataset(result, None)
    loader = list(data.loader(source, "test", 64, seed=0, train=False))
    name = NAMED[task][0]
    actual = eq.diagnose(model, loader, metric=name, tests=["noise", "masking", "quag", "shapley", "corruption"])
    assert not actual.skipped
    assert actual.protocol["score"] == name
    for metric in (name, f"{name}_constant", f"{name}_noise/audio", f"{name}_mask/image", "quag/all", "area/audio"):
        assert math.isfinite(actual.metrics[metric])
    total = sum(actual.metrics[f"shapley/{one}"] for one in NAMES)
    assert total == pytest.approx(actual.metrics[name] - actual.metrics[f"{name}_constant"], abs=1e-5)
    assert actual.verdicts
    assert actual.details["noise"]["intervals"][f"{name}_noise/audio"]


def test_the_diagnose_command_uses_the_main_metric_or_the_given_one(comparison, tmp_path):
    task, result, out, _ = comparison
    folder, other = RunSpec(result, "concat", 0).folder(out), {"regression": "pearson"}.get(task, "accuracy")
    for name, more in ((NAMED[task][0], []), (other, ["--metric", other])):
        assert run_command(["diagnose", str(folder), "--tests", "noise", "--out", str(tmp_path / name), *more]) == 0
        content = json.loads((tmp_path / name / "diagnosis.json").read_text())
        assert content["protocol"]["score"] == name
        assert f"{name}_noise/audio" in content["metrics"]


def test_fingerprint_without_metrics_is_unchanged():
    spec = run_spec()
    assert "metrics" not in json.loads(spec.fingerprint())["recipe"]
    named = replace(spec, recipe=replace(spec.recipe, metrics=["auroc"]))
    assert named.fingerprint() != spec.fingerprint()


def test_recipes_round_trip_and_name_wrong_metrics():
    result = replace(recipe(), metrics=["auroc"])
    content = {"data": {"name": "digits"}, "encoders": {}, "metrics": ["auroc"]}
    assert recipes.recipe_from_dict(content).metrics == result.metrics
    with pytest.raises(
        ConfigError, match=r"recipe: metrics: expected a known metric, got 'aurok'\. Did you mean 'auroc'"
    ):
        recipes.recipe_from_dict({**content, "metrics": ["aurok"]})
    with pytest.raises(ConfigError, match=r"expected metrics of a fusion, got the model 'x'\. Leave out metrics"):
        recipes.recipe_from_dict({**content, "model": {"name": "x"}})


def test_metric_of_another_task_raises_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe: metrics: expected a metric for classification: .*, got 'rmse'"):
        compare(replace(recipe(), metrics=["rmse"]), ["concat"], seeds=1, out=tmp_path, workers=0)
