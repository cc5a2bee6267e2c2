"""Trains and evaluates one method with one seed on one fold; resumes after an interruption."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import math
import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from .. import data
from ..balance import Balancer
from ..data.user_code import dataset_from_code
from ..errors import ConfigError
from ..integrations.lightning_callbacks import BalancerCallback, check_strategy
from ..integrations.loggers import log_final, open_loggers
from ..io.atomic_files import atomic_write, check_folder, make_folder, to_jsonable
from ..io.class_registry import instantiate
from ..models.fusion_model import FusionModel
from ..models.self_contained import SelfContainedModel
from ..nn.distributed import is_distributed
from ..nn.gradient_checkpointing import enable_gradient_checkpointing
from ..reliability import Reliability
from ..results.result_rows import RunResult
from . import method_factory, recipes
from .checkpoint import AtomicCheckpointIO, check_state, load_weights, next_batch, read_state_dict, save_weights
from .history import HistoryCallback, Progress, RunHistory
from .loss_module import BalancedTraining, SelfContainedTraining
from .recipes import Recipe
from .run_evaluation import BATCH, evaluate_run
from .run_folder import write_run
from .run_spec import RunSpec, is_finished

CODE = "python"
"""Name of the data set of a recipe whose data a Python file makes; "source" names the function."""

ADVICE = (
    "does not have many workers", "dataloader is not resumable", "GPU available but not used", "Checkpoint directory",
    "tensorboardX", "LeafSpec", "in eval mode at the start of training", "smaller than the logging interval",
    "`srun` command is available",
)  # fmt: skip
"""Lightning warnings to suppress: advice on user-defined loaders and loggers, and on frozen encoders."""


def execute_run(
    job: RunSpec, folder: Path, *, progress: Progress | None = None, trainer_options: Mapping[str, Any] | None = None,
    dataset: data.Dataset | None = None,
    evaluate: bool = True,
) -> RunResult | None:  # fmt: skip
    """Trains and evaluates a run; loads a finished one, resumes an interrupted one after its last complete epoch.

    The folder of the run then contains ``run.json``, ``model.safetensors``, ``recipe.yaml`` and
    ``checkpoints/last.ckpt``.

    Args:
        job: run to execute.
        folder: folder of this run.
        progress: called with (epochs done, epochs) after every epoch.
        trainer_options: arguments of ``lightning.pytorch.Trainer``, such as ``devices``; callbacks are added.
        dataset: data to use in place of the recipe's, such as a ``TensorDataset``; ``data.name`` of the recipe is then
            any name, and ``load`` needs the data set as well.
        evaluate: False only trains: the test split is not read. A later call evaluates the run.

    Returns:
        Run, as in ``results.json``; None in all processes but rank 0, and without evaluation.

    Raises:
        ConfigError: unknown method or option. DataError: data or checkpoint cannot be read.
        NonFiniteError: the loss is NaN; the last complete checkpoint is kept.
    """
    check_strategy((trainer_options or {}).get("strategy"), "train")
    check_folder(folder, "train")
    stored = is_finished(job, folder)
    if stored is not None:
        return stored
    method = method_factory.parse_method(job.method, job.recipe)
    recipe = method_factory.method_recipe(method, job.recipe)
    source = load_run_dataset(recipe, job.fold) if dataset is None else dataset
    teachers = {}
    if method_factory.needs_teachers(method, recipe):
        # Teachers are trained with the training options of the variant.
        teacher_job = replace(job, recipe=recipe)
        teachers = {name: _teacher(teacher_job, name, folder, trainer_options, source) for name in source.names}
    options = dict(trainer_options or {})
    torch.manual_seed(job.seed)
    model, balancers = method_factory.build_model(method, recipe, source, teachers=teachers)
    journal = HistoryCallback(source, recipe, job.fingerprint(), balancers, progress)
    make_folder(folder, "train")
    rank_zero_only(atomic_write)(folder / "recipe.yaml", recipes.dump_recipe(job.recipe))
    with quiet_lightning(), _loggers(job, recipe, folder, options) as loggers:
        trainer = fit_model(
            model, balancers, job, recipe, source, folder, journal, {"logger": loggers or False, **options}
        )
        if not evaluate or not trainer.is_global_zero:
            return None
        trained: Any = model.cpu()
        if method.reliable:
            trained = _fit_reliability(trained, method, recipe, source, job.seed)
        run = _run(job, trained, source, recipe, journal)
        log_final(loggers, run["metrics"], trainer.global_step)
    save_weights(trained, folder / "model.safetensors")
    write_run(folder, job.fingerprint(), run)
    return run


def _loggers(
    job: RunSpec, recipe: Recipe, folder: Path, options: Mapping[str, Any]
) -> contextlib.AbstractContextManager[list[Any]]:
    """Opens the loggers of the recipe; none if the user passes a logger to the Trainer."""
    name = "-".join([job.method, f"seed{job.seed}", *([str(job.fold)] if job.fold else [])])
    config = {
        "method": job.method,
        "seed": job.seed,
        "fold": job.fold,
        "data": recipe.data_title,
        **asdict(recipe.train),
    }
    names = () if "logger" in options else job.recipe.logger
    return open_loggers(names, folder, project=recipe.data_title, group=job.method, name=name, config=config)


def _fit_reliability(
    model: FusionModel, method: method_factory.Method, recipe: Recipe, source: data.Dataset, seed: int
) -> Reliability:
    """Fits the reliability of the modalities on the training and validation splits, without augmentation."""
    train, val = (
        data.loader(source, split, BATCH, seed=seed, train=False, rank=0, world=1) for split in ("train", "val")
    )
    return method_factory.fit_reliability(model, method, recipe, train, val, seed)


def _teacher(
    job: RunSpec, name: str, folder: Path, trainer_options: Mapping[str, Any] | None, source: data.Dataset
) -> nn.Module:
    """Returns the encoder of a modality trained alone, with the same seed and fold."""
    alone, teacher_folder = replace(job, method=name), folder / "teachers" / name
    execute_run(alone, teacher_folder, trainer_options=trainer_options, dataset=source)
    if is_distributed():
        torch.distributed.barrier()
    with torch.random.fork_rng(devices=[]):
        model, _ = method_factory.build_model(method_factory.parse_method(name, job.recipe), job.recipe, source)
    load_weights(model, teacher_folder / "model.safetensors")
    return model.encoders[name]  # type: ignore[index,return-value]


@functools.lru_cache(maxsize=4)
def _load_dataset_cached(options: str) -> data.Dataset:
    content = json.loads(options)
    name, names = str(content.pop("name")), data.available_datasets()
    if name == CODE:
        with single_thread():
            return dataset_from_code(str(content.get("source")), content.get("fold"))
    if name not in names:
        return data.load_dataset(name)  # raises with the closest name
    if "fold" in content and "fold" not in inspect.signature(names[name]).parameters:
        raise ConfigError(
            f"data set '{name}'", expected="no fold, since it has one split", got=f"fold '{content['fold']}'",
            fix="Leave out --folds, --fold and the recipe's folds.",
        )  # fmt: skip
    with single_thread():
        # Reductions round differently with several threads; load on one thread so that compare's workers see the same
        # data.
        return instantiate(names[name], f"data set '{name}'", content)


def load_run_dataset(recipe: Recipe, fold: str | None) -> data.Dataset:
    """Loads the data set of a recipe, once per process."""
    options = {**recipe.data, **({} if fold is None else {"fold": fold})}
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError("recipe", expected=f"a finite number under data.{name}", got=str(value))
    # Unsorted: the order of modalities is that of the recipe.
    return _load_dataset_cached(json.dumps(to_jsonable(options, "recipe: data")))


def fit_model(
    model: FusionModel | SelfContainedModel,
    balancers: list[Balancer],
    job: RunSpec,
    recipe: Recipe,
    source: data.Dataset,
    folder: Path,
    journal: HistoryCallback,
    trainer_options: dict[str, Any],
    *,
    limits: Mapping[str, int] | None = None,
) -> pl.Trainer:
    """Trains a model as ``execute_run`` does, and returns the Trainer.

    Args:
        model, balancers: as ``build_model`` returns them.
        job, recipe: run, and its recipe with the options of the variant.
        source: data set.
        folder: folder of the run, for checkpoints.
        journal: history of the run.
        trainer_options: arguments of ``lightning.pytorch.Trainer``.
        limits: split -> number of batches of an epoch to use, for "train" and "val"; all by default.
    """
    limits = limits or {}
    options = recipe.train
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    training = (
        SelfContainedTraining(model, options, seed=job.seed)
        if isinstance(model, SelfContainedModel)
        else BalancedTraining(model, options, balancers=balancers, seed=job.seed, metrics=recipe.metrics)
    )
    balancing = training.balancing
    train = data.loader(
        source, "train", options.batch_size, seed=job.seed, train=True,
        steps_per_batch=balancing.steps_per_batch, group=options.accumulate, workers=options.workers,
        limit=limits.get("train"),
    )  # fmt: skip
    val = data.loader(source, "val", BATCH, seed=job.seed, train=False, limit=limits.get("val"))
    balance = BalancerCallback(balancing, before_end=journal.look)
    checkpointing = ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="last", save_top_k=1, every_n_epochs=1, monitor=None,
        save_on_train_epoch_end=True, enable_version_counter=False,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "max_epochs": options.epochs, "precision": options.precision, "gradient_clip_val": options.clip,
        "accumulate_grad_batches": options.accumulate, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": folder,
        "use_distributed_sampler": False, "plugins": [AtomicCheckpointIO()],
    } | trainer_options  # fmt: skip
    settings["callbacks"] = [
        journal,
        balance,
        RunHistory(journal, balance),
        checkpointing,
        *trainer_options.get("callbacks", ()),
    ]
    trainer = _trainer(settings)
    if (
        balancing.partial_graph
        and isinstance(trainer.strategy, DDPStrategy)
        and trainer_options.get("strategy", "auto") in ("auto", "ddp")
    ):
        # Parameters that a stage does not use get no gradient; plain DDP would wait for them forever.
        trainer = _trainer({**settings, "strategy": "ddp_find_unused_parameters_true"})
    handler = signal.getsignal(signal.SIGINT)
    checkpoint = is_resumable(folder, job)
    if checkpoint is not None:
        check_state(training, Path(checkpoint))
        epoch, batches = next_batch(Path(checkpoint))
        # Worker processes start to read before Lightning sets the epoch.
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        train.sampler.resume_at(epoch, batches)  # type: ignore[attr-defined]
    try:
        trainer.fit(training, train, val, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as exit_:
        # Lightning turns Ctrl-C into SystemExit and leaves SIGINT ignored; restore the handler.
        if not isinstance(exit_.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from exit_
    return trainer


def _trainer(settings: dict[str, Any]) -> pl.Trainer:
    try:
        return pl.Trainer(**settings)
    except (MisconfigurationException, ValueError, TypeError) as error:
        got = str(error).split(". ")[0].rstrip(".!")
        raise ConfigError("train", expected="options that Lightning's Trainer takes", got=got) from error


def check_trainer(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that Lightning's Trainer does not take on this machine."""
    with quiet_lightning():
        _trainer({**options, "logger": False, "enable_checkpointing": False})


def is_resumable(folder: Path, job: RunSpec) -> str | None:
    """Returns the checkpoint to resume from; None if there is none or it belongs to another recipe."""
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        return None
    history = read_state_dict(path).get("callbacks", {}).get(HistoryCallback.state_key, {})
    return str(path) if history.get("fingerprint") == job.fingerprint() else None


def _run(
    job: RunSpec,
    model: FusionModel | SelfContainedModel,
    source: data.Dataset,
    recipe: Recipe,
    journal: HistoryCallback,
) -> RunResult:
    evaluation = evaluate_run(model, source, recipe)
    metrics = evaluation["metrics"]
    # Skip the first (warm-up) epoch unless it is the only one.
    seconds = journal.seconds[1:] or journal.seconds
    metrics["seconds_per_epoch"] = sum(seconds) / max(len(seconds), 1)
    last = journal.history[-1] if journal.history else {}
    metrics |= {name: value for name, value in last.items() if name.startswith("val_")}
    run: RunResult = {
        "method": job.method, "seed": job.seed, "fold": job.fold, "metrics": metrics, "history": journal.history,
    }  # fmt: skip
    run |= {name: value for name, value in evaluation.items() if name not in run}  # type: ignore[typeddict-item]
    if "keys" in evaluation:
        before = {"before": journal.keys_before} if journal.keys_before else {}
        run["keys"] = {**before, **evaluation["keys"]}
    return run


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Context manager: uses one thread, so that results do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Context manager: suppresses Lightning's log messages and its advice on loaders, but no other warnings."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for message in ADVICE:
                warnings.filterwarnings("ignore", message=f".*{message}.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
