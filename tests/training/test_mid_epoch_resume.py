"""A run interrupted in the middle of an epoch continues as if it had not been interrupted, with worker processes
too.
"""

from dataclasses import replace

import lightning.pytorch as pl
import pytest

from equipoise.data.resumable_sampler import ResumableBatchSampler
from equipoise.errors import ConfigError
from equipoise.training import RunSpec, execute_run
from equipoise.training.recipes import TrainOptions
from helpers.runs import assert_same_weights, recipe, weights


class Stop(pl.Callback):
    """Raises an error in one batch, after its optimizer step."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = epoch, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise RuntimeError("interrupted")


def test_mid_epoch_resume_is_exact(tmp_path):
    method = "joint+rollingq+corruption"
    base = recipe()
    encoders = {name: {**options, "dropout": 0.2} for name, options in base.encoders.items()}
    options = {"epochs": 2, "batch_size": 100, "accumulate": 2}
    plain = replace(base, encoders=encoders).with_train(**options)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run = execute_run(RunSpec(plain, method, seed=0), straight)
    job = RunSpec(plain.with_train(checkpoint_steps=2, workers=2), method, seed=0)
    assert job.fingerprint() == RunSpec(plain, method, seed=0).fingerprint()
    for epoch, batch in ((0, 5), (1, 4)):
        with pytest.raises(RuntimeError, match="interrupted"):
            execute_run(job, resumed, trainer_options={"callbacks": [Stop(epoch, batch)]})
    again = execute_run(job, resumed)
    assert_same_weights(weights(straight), weights(resumed))
    assert run is not None
    assert again is not None
    for name in ("history", "outcomes", "keys"):
        assert again.get(name) == run.get(name), name


def test_gradient_checkpointing_does_not_change_the_result(tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "checkpointed"
    small = recipe().with_train(epochs=1, batch_size=100)
    job, same = (
        RunSpec(one, "joint+rollingq", seed=0) for one in (small, small.with_train(gradient_checkpointing=True))
    )
    assert job.fingerprint() == same.fingerprint()
    assert execute_run(job, plain)["history"] == execute_run(same, other)["history"]
    assert_same_weights(weights(plain), weights(other))


def test_sampler_skips_the_used_batches_of_one_epoch():
    sampler = ResumableBatchSampler(10, 3, seed=0, shuffle=True)
    sampler.set_epoch(1)
    full = [index.tolist() for _, index in sampler]
    sampler.resume_at(1, 2)
    assert [index.tolist() for _, index in sampler] == full[2:]
    sampler.set_epoch(2)
    assert len(list(sampler)) == 4
    assert len(sampler) == 4


def test_invalid_checkpoint_steps():
    with pytest.raises(ConfigError, match="expected checkpoint_steps >= 1, or None, got checkpoint_steps = 0"):
        TrainOptions(checkpoint_steps=0)
