"""Streams in the commands train, compare, diagnose, report and load; a run interrupted in the middle of an epoch."""

import datasets
import lightning.pytorch as pl
import pytest
import torch

import equipoise as eq
from equipoise.cli import main
from equipoise.errors import DataError
from equipoise.training import RunSpec, execute_run
from equipoise.training.own_data import own_data_recipe
from equipoise.training.run import _load_dataset_cached
from helpers.runs import assert_same_weights, weights
from helpers.stream_data import write_data


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 3):
            raise RuntimeError("interrupted")


def call(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0


@pytest.fixture
def data(tmp_path):
    write_data(tmp_path)
    return str(tmp_path / "data")


@pytest.mark.slow
def test_all_commands_read_streams(data, tmp_path, capsys):
    options = ["--data", data, "--target", "label", "--stream", "--train.epochs", "1"]
    alone = tmp_path / "alone"
    call(["train", *options, "--method", "joint", "--out", str(alone)])
    assert "rows: train 61, val 13, test 10 (split by column 'split')" in capsys.readouterr().out
    assert "name: stream" in (alone / "recipe.yaml").read_text()
    call(["diagnose", str(alone), "--tests", "noise,masking", "--out", str(tmp_path / "again")])
    both = tmp_path / "both"
    methods = ["--methods", "vector,joint", "--seeds", "1", "--workers", "0"]
    call(["compare", *options, *methods, "--out", str(both)])
    call(["report", str(both)])
    assert (both / "report.html").is_file()
    model = eq.load(alone)
    source = eq.data.StreamDataset(data, target="label")
    assert model(source.batch("test", torch.arange(3), seed=0, epoch=0, train=False)).logits.shape == (3, 3)


def test_moved_and_changed_data(data, tmp_path):
    recipe, _ = own_data_recipe(data, options={"target": "label"}, streaming=True)
    execute_run(RunSpec(recipe.with_train(epochs=1), "vector", seed=0), tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "moved")
    _load_dataset_cached.cache_clear()
    with pytest.raises(DataError, match="expected an existing file or folder"):
        eq.load(tmp_path / "run")
    assert eq.load(tmp_path / "run", data=tmp_path / "moved").names == ("vector",)
    (tmp_path / "other").mkdir()
    datasets.load_from_disk(str(tmp_path / "moved")).select(range(10, 84)).save_to_disk(
        str(tmp_path / "other" / "data")
    )
    with pytest.raises(DataError, match="expected the data that the model was trained with, got other rows"):
        eq.load(tmp_path / "run", data=tmp_path / "other" / "data")


def test_a_stream_resumes_in_the_middle_of_an_epoch(data, tmp_path):
    recipe, _ = own_data_recipe(data, options={"target": "label"}, streaming=True)
    recipe = recipe.with_train(epochs=2, batch_size=8, checkpoint_steps=1)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run = execute_run(RunSpec(recipe, "joint", seed=0), straight)
    job = RunSpec(recipe.with_train(workers=2), "joint", seed=0)
    with pytest.raises(RuntimeError, match="interrupted"):
        execute_run(job, resumed, trainer_options={"callbacks": [Stop()]})
    again = execute_run(job, resumed)
    assert_same_weights(weights(straight), weights(resumed))
    assert run is not None
    assert again is not None
    assert again["history"] == run["history"]
