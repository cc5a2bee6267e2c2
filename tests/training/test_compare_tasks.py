"""compare with three modalities, on every task: from the recipe to the page."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from equipoise import balance
from equipoise.balance import Balancer
from equipoise.cli.results_table import show
from equipoise.io.class_registry import available_classes
from equipoise.report import comparison_figures
from equipoise.report.comparison_text import verdict
from equipoise.report.results_view import ResultsView
from equipoise.report.text_format import method_title
from equipoise.training import recipes
from equipoise.training.comparison import compare
from helpers.tasks import TASKS

NAMES = ("audio", "image", "sensor")
METHODS = ("sensor", "concat", "concat_sgd+ogm", "joint", "joint+rollingq")


def tiny_recipe(task):
    config = recipes.load_recipe("generated").with_train(epochs=2, batch_size=20)
    small = {"dim": 8, "depth": 1, "heads": 1}
    encoders = {name: {**options, **small} for name, options in config.encoders.items()}
    rolling = {"rollingq": {"beta": 0.0, "warmup_epochs": 0}}
    return replace(config, data={**config.data, "task": task, "samples": 40}, encoders=encoders, balancers=rolling)


@pytest.fixture(scope="module", params=TASKS)
def comparison(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return request.param, compare(tiny_recipe(request.param), METHODS, seeds=1, out=out, workers=0)


def test_every_method_trains(comparison):
    _, content = comparison
    assert content["failures"] == []
    assert [run["method"] for run in content["runs"]] == list(METHODS)
    for run in content["runs"]:
        assert all(math.isfinite(entry["loss"]) for entry in run["history"])


def test_scores_are_named_after_the_task_metric(comparison):
    task, content = comparison
    score, other = ("negative_error", "accuracy") if task == "regression" else ("accuracy", "negative_error")
    for run in content["runs"]:
        metrics = run["metrics"]
        assert {score, f"val_{score}", *(f"{score}_noise/{name}" for name in NAMES)} <= set(metrics)
        assert not any(other in metric for metric in metrics)
        assert metrics[f"val_{score}"] == run["history"][-1][f"val_{score}"]
        assert -1.5 < metrics[score] < -0.3 if task == "regression" else 0 <= metrics[score] <= 1
        if run["method"].startswith("joint"):
            shares = [metrics[f"share/{name}"] for name in NAMES]
            assert all(share > 0 for share in shares)
            assert sum(shares) < 1


def test_page_and_table_name_the_task_metric(comparison):
    task, content = comparison
    words = ("accuracy", "mean absolute error")
    message, unsaid = reversed(words) if task == "regression" else words
    readings = ResultsView(content)
    text = " ".join([*verdict(readings), method_title(readings.score), comparison_figures.scores(readings)])
    console = Console(record=True, width=200, file=io.StringIO())
    show(content, console)
    printed = console.export_text()
    assert f"has the {'lowest' if task == 'regression' else 'highest mean'} {message}" in text
    assert "\N{MINUS SIGN}0." not in printed.partition("against")[0]
    assert message in printed
    assert unsaid not in (text + printed).lower()
    assert ("%" in printed) is (task != "regression")


def test_every_balancer_trains_from_a_recipe(tmp_path):
    """From the recipe's options to the checkpoint, in Lightning's loop; checkpoints, reviews and teachers included."""
    config = tiny_recipe("classification").with_train(epochs=2, optimizer="sgd", learning_rate=0.05)
    names = [("joint+" if "rollingq" in name else "concat+") + name for name in available_classes(balance, Balancer)]
    content = compare(config, names, seeds=1, out=tmp_path, workers=0)
    assert [failure["error"] for failure in content["failures"]] == []
    message = {run["method"]: set(run["history"][-1].get("balance", {})) for run in content["runs"]}
    assert set(message) == set(names)
    assert {"weight/audio", "weight/image", "weight/sensor"} <= message["concat+pmr"]
