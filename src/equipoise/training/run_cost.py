"""Predicts the cost of a run from its first steps: parameters, FLOPs, memory and time."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from .. import data
from ..balance import statistics_by_full_pass
from ..diagnostics.flop_count import FlopCount
from ..diagnostics.prediction_collection import collect_predictions
from ..errors import ConfigError
from ..models.fusion_model import FusionModel
from . import method_factory
from .history import HistoryCallback
from .peak_memory import PeakMemory
from .run import fit_model, load_run_dataset, quiet_lightning
from .run_evaluation import BATCH
from .run_spec import RunSpec

WARM_UP = 3
"""Batches before the measured ones: the first ones allocate memory and initialize the optimizer."""
EVALUATED = 2
"""Batches of the validation and of the test split that are measured."""


@dataclass(frozen=True)
class RunCost:
    """Predicted cost of a run.

    Attributes:
        method: method of the run.
        device: type of the device that trains it.
        parameters, trained_parameters: of the model, and those that require a gradient.
        samples: samples of an epoch: those of the training split, times the steps that a method takes on each.
        batch_size: samples of an optimizer step, over accumulated batches.
        epochs, steps: epochs and optimizer steps of the run.
        flops_per_step: of an optimizer step: forward and backward passes, and what balancers add.
        measured_steps, measured_seconds: optimizer steps that were timed, and their time.
        training_seconds, validation_seconds, evaluation_seconds: of the whole run. The training includes what balancers
            do once per epoch; the evaluation is that of the test split.
        process_bytes: peak of the resident memory of the process, libraries and data included.
        device_bytes: peak of the memory that torch allocates on a CUDA device; None without one.
        teachers: cost of the trainings of single modalities that the method needs before.
    """

    method: str
    device: str
    parameters: int
    trained_parameters: int
    samples: int
    batch_size: int
    epochs: int
    steps: int
    flops_per_step: float
    measured_steps: int
    measured_seconds: float
    training_seconds: float
    validation_seconds: float
    evaluation_seconds: float
    process_bytes: int
    device_bytes: int | None
    teachers: tuple[RunCost, ...] = ()

    @property
    def flops(self) -> float:
        """FLOPs of the training, that of the teachers included."""
        own = self.flops_per_step / self.batch_size * self.samples * self.epochs
        return own + sum(teacher.flops for teacher in self.teachers)

    @property
    def seconds(self) -> float:
        """Time of the run without loading of libraries and data, that of the teachers included."""
        own = self.training_seconds + self.validation_seconds + self.evaluation_seconds
        return own + sum(teacher.seconds for teacher in self.teachers)

    def to_dict(self) -> dict[str, Any]:
        """Returns all attributes and totals as plain values."""
        teachers = [teacher.to_dict() for teacher in self.teachers]
        return {**asdict(self), "teachers": teachers, "flops": self.flops, "seconds": self.seconds}


def predict_cost(
    job: RunSpec,
    *,
    steps: int = 20,
    trainer_options: Mapping[str, Any] | None = None,
    dataset: data.Dataset | None = None,
) -> RunCost:
    """Trains the first steps of a run with the code that ``execute_run`` uses, and extrapolates.

    FLOPs are counted in one further step, since counting slows it down, and scaled with the number of samples. Times
    are means over ``steps`` steps after three batches, so that methods whose steps differ between epochs, such as
    ``ReconBoost``, cost more or less than predicted. Memory is the measured peak of training, validation and test
    batches; that of processes of ``train.workers`` is not included. The time to fit ``+reliability`` and to evaluate
    self-contained models is not included.

    Args:
        job: run to predict.
        steps: optimizer steps to time.
        trainer_options: arguments of ``lightning.pytorch.Trainer``, such as ``accelerator``; one device is used.
        dataset: data to use in place of the recipe's.

    Raises:
        ConfigError: steps below 1, unknown method or option. DataError: data cannot be read.

    Example:
        >>> from equipoise.training import RunSpec
        >>> from equipoise.training.recipes import load_recipe
        >>> job = RunSpec(load_recipe("generated"), "concat", seed=0)
        >>> cost = predict_cost(job, steps=2, trainer_options={"accelerator": "cpu"})
        >>> cost.epochs * math.ceil(cost.samples / cost.batch_size) == cost.steps
        True
    """
    if steps < 1:
        raise ConfigError("bench", expected="steps >= 1", got=f"{steps}")
    memory = PeakMemory()
    method = method_factory.parse_method(job.method, job.recipe)
    recipe = method_factory.method_recipe(method, job.recipe)
    source = load_run_dataset(recipe, job.fold) if dataset is None else dataset
    teachers, costs = {}, []
    if method_factory.needs_teachers(method, recipe):
        for name in source.names:
            alone = replace(job, recipe=recipe, method=name)
            costs.append(predict_cost(alone, steps=steps, trainer_options=trainer_options, dataset=source))
            untrained, _ = method_factory.build_model(method_factory.parse_method(name, recipe), recipe, source)
            teachers[name] = untrained.encoders[name]  # type: ignore[index]
    torch.manual_seed(job.seed)
    model, balancers = method_factory.build_model(method, recipe, source, teachers=teachers)
    options = recipe.train
    repeats = max((balancer.steps_per_batch for balancer in balancers), default=1)
    loader = data.loader(
        source, "train", options.batch_size, seed=job.seed, train=True,
        steps_per_batch=repeats, group=options.accumulate,
    )  # fmt: skip
    val_batches, test_batches = (math.ceil(len(source.split(split)) / BATCH) for split in ("val", "test"))
    meter = _StepMeter(steps * options.accumulate, options.accumulate * repeats)
    epochs = math.ceil(meter.batches / len(loader))
    journal = HistoryCallback(source, recipe, job.fingerprint(), balancers)
    settings = {"devices": 1, **(trainer_options or {}), "max_epochs": epochs, "logger": False, "callbacks": [meter]}
    with quiet_lightning(), tempfile.TemporaryDirectory() as folder:
        trainer = fit_model(
            model, balancers, job, recipe, source, Path(folder), journal, settings,
            limits={"train": meter.batches, "val": EVALUATED},
        )  # fmt: skip
        device = trainer.strategy.root_device.type
    optimizer_steps = math.ceil(len(loader) / options.accumulate)
    # Balancers that read the data once per epoch read only the limited part of it here.
    reads = any(balancer.reviews for balancer in balancers) or any(True for _ in statistics_by_full_pass(balancers))
    epoch_end = meter.epoch_end * (max(len(loader) / meter.batches, 1) if reads else 1)
    evaluation = _evaluation_seconds(model.cpu(), source, test_batches)
    parameters = list(model.parameters())
    return RunCost(
        method=method.name,
        device=device,
        parameters=sum(p.numel() for p in parameters),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        samples=len(source.split("train")) * repeats,
        batch_size=options.batch_size * options.accumulate,
        epochs=options.epochs,
        steps=optimizer_steps * options.epochs,
        flops_per_step=meter.flops_per_sample * options.batch_size * options.accumulate,
        measured_steps=steps,
        measured_seconds=meter.seconds,
        training_seconds=options.epochs * (meter.seconds / meter.timed * len(loader) + epoch_end),
        validation_seconds=options.epochs * meter.validation * val_batches,
        evaluation_seconds=evaluation,
        process_bytes=memory.process(),
        device_bytes=memory.device(),
        teachers=tuple(costs),
    )


def _evaluation_seconds(model: Any, source: data.Dataset, batches: int) -> float:
    """Predicts the time to evaluate the test split as it is and with each modality replaced by noise."""
    if not isinstance(model, FusionModel):
        return 0.0
    started = time.perf_counter()
    test = data.loader(source, "test", BATCH, seed=0, train=False, rank=0, world=1, limit=EVALUATED)
    attends = collect_predictions(model, test).share is not None
    each = (time.perf_counter() - started) / min(EVALUATED, batches)
    # Models with attention are also evaluated on validation data and with noise at the level of each sample.
    return each * batches * (1 + len(model.names) + 2 * attends)


class _StepMeter(pl.Callback):
    """Times batches after a warm-up, and counts the FLOPs of the batches that follow them."""

    def __init__(self, timed: int, counted: int) -> None:
        self.timed, self.batches = timed, WARM_UP + timed + counted
        self.seconds = self.validation = self.epoch_end = 0.0
        self._epochs = self._done = self._samples = self._flops = 0
        self._count: FlopCount | None = None
        self._mark = self._started = 0.0

    @property
    def flops_per_sample(self) -> float:
        return self._flops / self._samples

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if WARM_UP + self.timed <= self._done < self.batches:
            self._samples += len(batch["target"])
            self._count = FlopCount()
            self._count.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._count is not None:
            self._count.__exit__(None, None, None)
            self._flops, self._count = self._flops + self._count.flops, None
        now = self._now()
        # The time from the end of one batch to that of the next includes the loading of data.
        if WARM_UP <= self._done < WARM_UP + self.timed:
            self.seconds += now - self._mark
        self._mark, self._done = now, self._done + 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = sum(int(count) for count in trainer.num_val_batches)
        self.validation = (self._now() - self._started) / max(batches, 1)
        self._mark = self._now()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epochs += 1
        self.epoch_end += (self._now() - self._mark - self.epoch_end) / self._epochs

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._count is not None:
            self._count.__exit__(None, None, None)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
