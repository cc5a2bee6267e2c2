"""Tables and streams in two gloo processes: every sample once, and the validation metrics of one process."""

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import multiprocessing

from equipoise.training import RunSpec, execute_run
from equipoise.training.checkpoint import AtomicCheckpointIO
from equipoise.training.own_data import own_data_recipe
from helpers.processes import process_group
from helpers.stream_data import TRAIN, VAL, write_data

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORLD, EPOCHS, BATCH = 2, 2, 16
METRICS = ("val_accuracy", "val_f1_macro", "air")


class Started(LightningEnvironment):
    """Processes that were started and joined to a group before the Trainer is built."""

    def __init__(self, rank):
        super().__init__()
        self._rank = rank

    creates_processes_externally = True  # type: ignore[assignment]

    def world_size(self):
        return WORLD

    def global_rank(self):
        return self._rank

    def local_rank(self):
        return self._rank


class Samples(pl.Callback):
    """Notes the samples of each epoch."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.train.append([])

    def on_validation_epoch_start(self, trainer, pl_module):
        self.val.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train[-1] += batch["index"].tolist()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.val[-1] += batch["index"].tolist()


def run(folder, streaming, rank=None):
    """Trains a run; returns the samples of each epoch and the validation metrics."""
    recipe, _ = own_data_recipe(str(folder / "data"), options={"target": "label"}, streaming=streaming)
    # The weights do not change, so that the metrics are those of one model.
    options = {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 1e-12, "workers": int(streaming)}
    recipe = replace(recipe, metrics=["f1_macro"]).with_train(**options)
    samples = Samples()
    trainer = {"callbacks": [samples], "accelerator": "cpu"}
    if rank is not None:
        trainer |= {"devices": WORLD, "strategy": "ddp", "plugins": [AtomicCheckpointIO(), Started(rank)]}
    out = folder / f"{'stream' if streaming else 'table'}{'' if rank is None else WORLD}"
    found = execute_run(RunSpec(recipe, "joint", seed=0), out, trainer_options=trainer)
    history = [] if found is None else [{name: entry[name] for name in METRICS} for entry in found["history"]]
    test = None if found is None else found["metrics"]["accuracy"]
    return {"train": samples.train, "val": samples.val, "history": history, "test": test}


def worker(rank, folder):
    with process_group(rank, folder, WORLD):
        torch.save([run(Path(folder), streaming, rank) for streaming in (False, True)], f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on a table and on a stream: of two processes, and of one."""
    folder = tmp_path_factory.mktemp("processes")
    write_data(folder)
    multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    both = zip(*(torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)), strict=True)
    return {streaming: (*found, run(folder, streaming)) for streaming, found in zip((False, True), both, strict=True)}


@pytest.mark.parametrize("streaming", [False, True])
def test_every_sample_is_trained_on_once(runs, streaming):
    first, second, alone = runs[streaming]
    for epoch in range(EPOCHS):
        assert sorted(alone["train"][epoch]) == list(range(TRAIN))
        assert len(first["train"][epoch]) == len(second["train"][epoch])
        seen = first["train"][epoch] + second["train"][epoch]
        # The last batch is truncated to a multiple of the number of processes.
        assert len(seen) == len(set(seen)) == TRAIN - TRAIN % WORLD
        # Together they have the batches of one process.
        batches = [[one[start : start + BATCH // WORLD] for one in (first["train"][epoch], second["train"][epoch])]
                   for start in range(0, len(first["train"][epoch]), BATCH // WORLD)]  # fmt: skip
        interleaved = [index for a, b in batches for pair in zip(a, b, strict=True) for index in pair]
        assert interleaved == alone["train"][epoch][: len(interleaved)]
    assert first["train"][0] != first["train"][1]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_sample_is_validated_once_and_metrics_are_those_of_one_process(runs, streaming):
    first, second, alone = runs[streaming]
    for epoch in range(EPOCHS):
        assert sorted(first["val"][epoch] + second["val"][epoch]) == sorted(alone["val"][epoch]) == list(range(VAL))
        for name in METRICS:
            assert first["history"][epoch][name] == pytest.approx(alone["history"][epoch][name], abs=1e-6)
    assert first["test"] == alone["test"]
    assert second["history"] == []
