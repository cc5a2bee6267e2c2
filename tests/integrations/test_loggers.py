"""Loggers of runs: the files are read back, results do not change, missing packages are named before training."""

import csv
import json
import sqlite3
import warnings
from dataclasses import replace

import pytest

from equipoise.cli import run
from equipoise.errors import ConfigError, MissingExtraError
from equipoise.integrations import loggers
from equipoise.training import recipes
from equipoise.training.comparison import compare
from equipoise.training.run import execute_run
from equipoise.training.run_spec import RunSpec
from helpers.runs import Interruption, recipe, reproducible_metrics, write_recipe


def job(*names, **train):
    return RunSpec(replace(recipe(**{"epochs": 2, **train}), logger=list(names)), "joint+rollingq", 0)


def csv_rows(folder, version=0):
    with open(folder / "logs" / "csv" / f"version_{version}" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return [float(row[name]) for row in rows if row.get(name)]


def scalars(folder):
    """tag -> values of all event files of TensorBoard in a folder."""
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder / "logs" / "tensorboard"))
        accumulator.Reload()
        return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_csv_and_tensorboard_files_have_the_history_and_the_test_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    logged = execute_run(job("csv", "tensorboard"), tmp_path / "logged")
    plain = execute_run(job(), tmp_path / "plain")
    assert reproducible_metrics(logged) == reproducible_metrics(plain)
    rows, tags = csv_rows(tmp_path / "logged"), scalars(tmp_path / "logged")
    for name in ("loss", "val_accuracy", "air"):
        expected = [entry[name] for entry in logged["history"]]
        assert column(rows, name) == pytest.approx(expected)
        assert tags[name] == pytest.approx(expected)
    for name in ("audio", "image"):
        assert column(rows, f"share/{name}") == pytest.approx([entry["share"][name] for entry in logged["history"]])
    assert column(rows, "balance/rotations") == [entry["rotations"] for entry in logged["history"]]
    for name in ("accuracy", "accuracy_noise/audio"):
        assert column(rows, f"test/{name}") == pytest.approx([logged["metrics"][name]])
        assert tags[f"test/{name}"] == pytest.approx([logged["metrics"][name]])
    assert not (tmp_path / "plain" / "logs").exists()


def test_a_resumed_run_keeps_the_rows_before_the_interruption(tmp_path):
    def crash(done, epochs):
        if done == 2:
            raise Interruption

    this = job("csv", epochs=3)
    with pytest.raises(Interruption):
        execute_run(this, tmp_path, progress=crash)
    before = csv_rows(tmp_path)
    finished = execute_run(this, tmp_path)
    assert csv_rows(tmp_path) == before
    assert column(csv_rows(tmp_path, 1), "loss")[-1] == pytest.approx(finished["history"][-1]["loss"])


def test_a_run_is_finished_with_other_loggers(tmp_path):
    first = execute_run(job(epochs=1), tmp_path)
    assert execute_run(job("csv", epochs=1), tmp_path) == first


def test_compare_logs_every_run(tmp_path):
    result = replace(recipe(epochs=1), logger=["csv"])
    content = compare(result, ["concat", "joint"], seeds=1, out=tmp_path, workers=0)
    for one in content["runs"]:
        rows = csv_rows(tmp_path / "runs" / "all" / one["method"] / "seed0")
        assert column(rows, "test/accuracy") == pytest.approx([one["metrics"]["accuracy"]])


@pytest.mark.parametrize(
    "words",
    [["--logger", "csv", "--logger", "tensorboard"], ["--logger", "csv,tensorboard"], ["--logger=tensorboard, csv"]],
)
def test_the_option_is_repeatable_and_takes_a_list(words, tmp_path):
    pytest.importorskip("tensorboard")
    written = write_recipe(tmp_path / "mine.yaml", recipe(epochs=1), logger=["csv"])
    out = tmp_path / "out"
    assert run(["train", "--config", written, "--method", "concat", "--out", str(out), *words]) == 0
    assert column(csv_rows(out), "loss")
    assert "loss" in scalars(out)


def test_a_recipe_names_loggers(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    for text in ("logger: csv", "logger: [csv]", "logger:\n- csv"):
        body = recipes.dump_recipe(recipe(epochs=1)).replace("logger: []", text)
        path.write_text(body)
        assert recipes.load_recipe(path).logger == ["csv"]
    out = tmp_path / "out"
    assert run(["train", "--config", str(path), "--method", "concat", "--out", str(out)]) == 0
    assert column(csv_rows(out), "loss")
    assert recipes.load_recipe(out / "recipe.yaml").logger == ["csv"]


def test_unknown_loggers_raise(tmp_path, capsys):
    assert run(["train", "--logger", "tensorbord", "--out", str(tmp_path / "out")]) == 1
    assert "Did you mean 'tensorboard'?" in capsys.readouterr().err
    for value in ("mlflow", 3, ["csv", 3], {"csv": 1}):
        with pytest.raises(ConfigError, match="logger"):
            recipes.recipe_from_dict({"data": {"name": "digits"}, "encoders": {}, "logger": value})


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_told_before_training(name, tmp_path, monkeypatch, capsys):
    real = loggers.importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda p, *a: None if p == name else real(p, *a))
    for command in ("train", "compare"):
        assert run([command, "--logger", name, "--out", str(tmp_path / "out")]) == 2
        assert f"Install it: pip install {name}" in capsys.readouterr().err
    with pytest.raises(MissingExtraError, match=f"pip install {name}"):
        compare(replace(recipe(), logger=[name]), ["concat"], seeds=1, out=tmp_path / "out", workers=0)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_users_own_logger_replaces_those_of_the_recipe(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    own = CSVLogger(tmp_path / "own", name="", version="")
    execute_run(job("csv", epochs=1), tmp_path / "run", trainer_options={"logger": own})
    assert (tmp_path / "own" / "metrics.csv").is_file()
    assert not (tmp_path / "run" / "logs").exists()


def test_wandb_writes_an_offline_run_for_each_training(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [execute_run(job("wandb", epochs=1), tmp_path / str(number)) for number in range(2)]
    for number in range(2):
        (written,) = (tmp_path / str(number) / "logs" / "wandb").glob("offline-run-*/*.wandb")
        content = written.read_bytes()
        assert b"val_accuracy" in content
        assert b"test/accuracy" in content
        # The folder can be used again, although wandb creates links to its own files.
        assert reproducible_metrics(
            execute_run(job("wandb", epochs=1), tmp_path / str(number))
        ) == reproducible_metrics(runs[number])
    (tmp_path / "0" / "logs" / "csv").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="no links"):
        execute_run(job("csv", epochs=1), tmp_path / "0")


def test_trackio_writes_its_local_database(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trackio")
        done = [execute_run(job("trackio", epochs=1), tmp_path / str(number)) for number in range(2)]
    assert "Trackio" not in capsys.readouterr().out
    with sqlite3.connect(tmp_path / "trackio" / "digits.db") as database:
        stored = database.execute("select run_id, metrics from metrics order by id").fetchall()
    result = {}
    for key, text in stored:
        result.setdefault(key, {}).update(json.loads(text))
    assert [run["test/accuracy"] for run in result.values()] == pytest.approx(
        [run["metrics"]["accuracy"] for run in done]
    )
    assert all("val_accuracy" in run for run in result.values())
