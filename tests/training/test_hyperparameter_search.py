"""Search of options: a killed search resumes without a trace, and the test split is evaluated once."""

import csv
import os
from dataclasses import replace

import pytest

from equipoise.errors import ConfigError
from equipoise.results import result_rows
from equipoise.training import recipes, run
from equipoise.training.hyperparameter_search import search
from equipoise.training.method_study import MethodStudy
from equipoise.training.search_space import SearchedOption, parse_searched_option
from helpers.runs import Forked, metrics_by_run, recipe, write_recipe
from helpers.waiting import wait_until

pytest.importorskip("optuna")
TRIALS, EPOCHS = 7, 3
TEXTS = ("train.learning_rate=1e-4..3e-1:log", "fusions.still.dropout=0..0.5", "train.batch_size=200..300")
OPTIONS = [parse_searched_option(text) for text in TEXTS]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of one method: its folder, result, reported trials, and the methods that were evaluated."""
    folder, reported, evaluated = tmp_path_factory.mktemp("search"), [], []
    original = run.evaluate_run
    run.evaluate_run = lambda *args, **options: evaluated.append(args) or original(*args, **options)
    try:
        content = search(
            recipe(epochs=EPOCHS), ["joint"], OPTIONS, trials=TRIALS, out=folder, title="r",
            listener=lambda trial, count: reported.append(trial),
        )  # fmt: skip
    finally:
        run.evaluate_run = original
    return folder, content, reported, evaluated


def table(folder):
    with open(folder / "search" / "joint" / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_best_trial_on_validation_is_evaluated_once(searched):
    folder, content, reported, evaluated = searched
    rows, (done,) = table(folder), content["runs"]
    assert len(evaluated) == 1
    assert [trial.number for trial in reported] == list(range(TRIALS)) == [int(row["number"]) for row in rows]
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    complete = [row for row in rows if row["state"] == "complete"]
    assert all(int(row["epochs"]) == EPOCHS for row in complete)
    best = max(complete, key=lambda row: float(row["val_accuracy"]))
    assert done["metrics"]["val_accuracy"] == float(best["val_accuracy"])
    values = content["protocol"]["best"]["joint"]
    # The dropout of another fusion has no effect.
    assert list(values) == ["train.learning_rate", "train.batch_size"]
    assert float(best["train.learning_rate"]) == values["train.learning_rate"]
    chosen = recipes.load_recipe(folder / "best" / "joint.yaml")
    assert (chosen.train.learning_rate, chosen.train.batch_size) == tuple(values.values())
    assert result_rows.load_results(folder)["protocol"]["selection"].startswith(
        f"best of {TRIALS} trials by val_accuracy"
    )
    assert [path.name for path in (folder / "search" / "joint").glob("trial*[0-9]")] == [f"trial{best['number']}"]


def test_finished_search_is_not_repeated(searched):
    folder, content, _, _ = searched
    again = search(recipe(epochs=EPOCHS), ["joint"], OPTIONS, trials=TRIALS, out=folder, title="r")
    assert again["runs"] == content["runs"]


@pytest.mark.slow
def test_killed_search_gives_the_undisturbed_result(searched, tmp_path):
    folder, content, _, _ = searched
    config, out = write_recipe(tmp_path / "r.yaml", recipe(epochs=EPOCHS)), tmp_path / "out"
    command = ["compare", "--config", config, "--methods", "joint", "--out", out, "--trials", TRIALS]
    command += [word for text in TEXTS for word in ("--search", text)]
    trials = out / "search" / "joint"
    # Killed in the first trial between two epochs, after a later trial has begun, and behind the last one.
    moments = (
        lambda: (trials / "trial0" / "checkpoints" / "last.ckpt").exists(),
        lambda: (trials / "trial3").exists(),
        lambda: (trials / "trials.csv").exists() and len(table(out)) >= TRIALS - 1,
    )
    for moment in moments:
        process = Forked(*command, said=tmp_path / "said")
        assert wait_until(moment, process), process.communicate()
        process.kill()
        process.communicate()
    process = Forked(*command, said=tmp_path / "said")
    message = process.communicate()
    assert process.returncode == 0, message
    assert "test split was evaluated once" in message
    assert table(out) == table(folder)
    assert metrics_by_run(result_rows.load_results(out)) == metrics_by_run(content)


def test_other_settings_in_the_folder(searched):
    with pytest.raises(ConfigError, match="the recipe, options and seed of the search in this folder"):
        search(recipe(epochs=EPOCHS + 1), ["joint"], OPTIONS, trials=TRIALS, out=searched[0])


@pytest.mark.parametrize(
    ("method", "texts", "got"),
    [
        ("joint", ["fusions.still.dropout=0..0.5"], "option with an effect on joint"),
        ("joint", ["train.learning_rat=0.1..1"], "learning_rat"),
        ("joint+ogm", ["balancers.ogm.alpa=0.1..1"], "alpa"),
        ("concat+umt", ["train.learning_rate=0.1..1"], "trained teachers"),
    ],
)
def test_errors_before_the_first_trial(method, texts, got, tmp_path):
    options = [parse_searched_option(text) for text in texts]
    with pytest.raises(ConfigError, match=got):
        search(recipe(), [method], options, trials=2, out=tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("task", "metrics", "objective"),
    [
        ("classification", [], ("val_accuracy", "maximize")),
        ("classification", ["f1_macro"], ("val_f1_macro", "maximize")),
        ("regression", [], ("val_negative_error", "maximize")), ("regression", ["mae"], ("val_mae", "minimize")),
    ],
)  # fmt: skip
def test_errors_are_minimized(task, metrics, objective, tmp_path):
    chosen = replace(recipes.load_recipe("generated"), metrics=metrics)
    chosen = replace(chosen, data={**chosen.data, "task": task})
    study = MethodStudy(chosen, "concat", OPTIONS[:1], 0, None, "cpu", tmp_path)
    assert (study.metric, study.direction) == objective


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=2..9", SearchedOption("train.epochs", low=2, high=9)),
        ("train.batch_size=16..64:log", SearchedOption("train.batch_size", low=16, high=64, log=True)),
        ("train.clip=0.5..2", SearchedOption("train.clip", low=0.5, high=2.0)),
        ("train.clip=null,1.0", SearchedOption("train.clip", choices=(None, 1.0))),
    ],
)
def test_ranges(text, expected):
    assert parse_searched_option(text) == expected


@pytest.mark.parametrize(
    "text", ["train.clip", "train.clip=", "clip=1..2", "data.fold=A,B", "train.clip=2..1", "train.clip=0..1:log",
             "train.clip=1..2:exp", "train.clip=1", "train.clip=1,1", "train.clip=a..b", "train.clip=[1],[2]"],
)  # fmt: skip
def test_invalid_ranges(text):
    with pytest.raises(ConfigError, match="compare --search"):
        parse_searched_option(text)


@pytest.mark.parametrize(
    "arguments", [["--trials", "3"], ["--search", TEXTS[0], "--seeds", "2"], ["--search", TEXTS[0], "--trials", "0"]]
)
def test_options_that_do_not_go_together(arguments, tmp_path, capsys):
    from equipoise.cli import run

    assert run(["compare", "--config", "generated", "--methods", "concat", "--out", str(tmp_path), *arguments]) == 1
    assert "compare" in capsys.readouterr().err
