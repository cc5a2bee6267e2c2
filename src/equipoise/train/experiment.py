"""One run: a method trained with one seed on one fold, evaluated, and written down. It resumes where it was stopped."""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from .. import data, recipes
from ..balance import Balancer
from ..errors import ConfigError
from ..files import check_folder, make_folder, plain, write_whole
from ..lightning import Balance
from ..lookup import made
from ..model import FusionModel
from ..objective import Objective
from ..recipes import Recipe
from ..record import Run
from . import methods
from .checkpoint import WholeFiles, check_state, load_weights, read_state, save_weights
from .evaluate import evaluate
from .folder import write_run
from .job import Job, finished
from .journal import Journal, Notes, Progress
from .module import ObjectiveTraining, Training

ADVICE = (
    "does not have many workers", "GPU available but not used", "Checkpoint directory", "tensorboardX", "LeafSpec",
)  # fmt: skip
"""Of Lightning, to people who wrote their own loaders and loggers."""


def perform(
    job: Job, folder: Path, *, progress: Progress | None = None, trainer_options: Mapping[str, Any] | None = None
) -> Run | None:
    """Trains, evaluates and writes a run; a finished one is read, a stopped one goes on after its last whole epoch.

    The run's folder then holds ``run.json``, ``model.safetensors``, ``recipe.yaml`` and ``checkpoints/last.ckpt``.

    Args:
        job: what.
        folder: of this run alone.
        progress: called with (epochs done, epochs) after every epoch.
        trainer_options: for ``lightning.pytorch.Trainer``, such as ``devices``; its callbacks are added.

    Returns:
        Run, as in ``results.json``; None in processes that only helped another to train.

    Raises:
        ConfigError: a method or option that does not exist. DataError: data or checkpoints that cannot be read.
        NonFiniteError: a loss that is NaN; the last whole checkpoint stays.
    """
    check_folder(folder, "train")
    stored = finished(job, folder)
    if stored is not None:
        return stored
    method = methods.parse(job.method, job.recipe)
    recipe = methods.recipe_for(method, job.recipe)
    source = dataset(recipe, job.fold)
    teachers = {}
    if methods.needs_teachers(method, recipe):
        # Teachers are trained as the variant that they teach.
        alike = replace(job, recipe=recipe)
        teachers = {name: _teacher(alike, name, folder, trainer_options) for name in source.names}
    torch.manual_seed(job.seed)
    model, balancers = methods.build(method, recipe, source, teachers=teachers)
    journal = Journal(source, recipe, job.fingerprint(), balancers, progress)
    make_folder(folder, "train")
    rank_zero_only(write_whole)(folder / "recipe.yaml", recipes.dump(job.recipe))
    with quiet():
        trainer = _fit(model, balancers, job, recipe, source, folder, journal, dict(trainer_options or {}))
        if not trainer.is_global_zero:
            return None
        run = _run(job, model.cpu(), source, recipe, journal)
    save_weights(model, folder / "model.safetensors")
    write_run(folder, job.fingerprint(), run)
    return run


def _teacher(job: Job, name: str, folder: Path, trainer_options: Mapping[str, Any] | None) -> nn.Module:
    """The encoder of a modality that was trained alone, with the same seed, on the same fold."""
    alone, here = replace(job, method=name), folder / "teachers" / name
    perform(alone, here, trainer_options=trainer_options)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    with torch.random.fork_rng(devices=[]):
        model, _ = methods.build(methods.parse(name, job.recipe), job.recipe, dataset(job.recipe, job.fold))
    load_weights(model, here / "model.safetensors")
    return model.encoders[name]  # type: ignore[index,return-value]


@functools.lru_cache(maxsize=4)
def _loaded(options: str) -> data.Dataset:
    content = json.loads(options)
    name, known = str(content.pop("name")), data.known()
    if name not in known:
        return data.load(name)  # which tells the closest name
    if "fold" in content and "fold" not in inspect.signature(known[name]).parameters:
        raise ConfigError(
            f"data set '{name}'", expected="no fold, since it has one split", got=f"fold '{content['fold']}'",
            fix="Leave out --folds, --fold and the recipe's folds.",
        )  # fmt: skip
    with one_thread():
        # Sums are rounded otherwise by several threads, and compare's workers have one: they must see the same data.
        return made(known[name], f"data set '{name}'", content)


def dataset(recipe: Recipe, fold: str | None) -> data.Dataset:
    """The recipe's data set, loaded once in a process."""
    options = {**recipe.data, **({} if fold is None else {"fold": fold})}
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError("recipe", expected=f"a finite number under data.{name}", got=str(value))
    return _loaded(json.dumps(plain(options, "recipe: data"), sort_keys=True))


def _fit(
    model: FusionModel | Objective, balancers: list[Balancer], job: Job, recipe: Recipe, source: data.Dataset,
    folder: Path, journal: Journal, given: dict[str, Any],
) -> pl.Trainer:  # fmt: skip
    options = recipe.train
    training = (
        ObjectiveTraining(model, options, seed=job.seed)
        if isinstance(model, Objective)
        else Training(model, options, balancers=balancers, seed=job.seed)
    )
    balancing = training.balancing
    train = data.loader(
        source, "train", options.batch_size, seed=job.seed, train=True, exposure=options.exposure,
        turns=balancing.turns, group=options.accumulate,
    )  # fmt: skip
    val = data.loader(source, "val", 256, seed=job.seed, train=False)
    balance = Balance(balancing, before_end=journal.look)
    keeper = ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="last", save_top_k=1, every_n_epochs=1, monitor=None,
        save_on_train_epoch_end=True, enable_version_counter=False,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "max_epochs": options.epochs, "precision": options.precision, "gradient_clip_val": options.clip,
        "accumulate_grad_batches": options.accumulate, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": folder,
        "use_distributed_sampler": False, "plugins": [WholeFiles()],
    } | given  # fmt: skip
    settings["callbacks"] = [journal, balance, Notes(journal, balance), keeper, *given.get("callbacks", ())]
    trainer = _trainer(settings)
    if (
        balancing.partial_graph
        and isinstance(trainer.strategy, DDPStrategy)
        and given.get("strategy", "auto") in ("auto", "ddp")
    ):
        # What a stage or turn leaves out gets no gradient, for which plain DDP waits in vain.
        trainer = _trainer({**settings, "strategy": "ddp_find_unused_parameters_true"})
    heard = signal.getsignal(signal.SIGINT)
    checkpoint = resumable(folder, job)
    if checkpoint is not None:
        check_state(training, Path(checkpoint))
    try:
        trainer.fit(training, train, val, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as left:
        # Lightning makes Ctrl-C the end of the process, and the process deaf to the next one.
        if not isinstance(left.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, heard)
        raise KeyboardInterrupt from left
    return trainer


def _trainer(settings: dict[str, Any]) -> pl.Trainer:
    try:
        return pl.Trainer(**settings)
    except (MisconfigurationException, ValueError, TypeError) as error:
        got = str(error).split(". ")[0].rstrip(".!")
        raise ConfigError("train", expected="options that Lightning's Trainer takes", got=got) from error


def check_trainer(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that Lightning's Trainer does not take on this machine."""
    with quiet():
        _trainer({**options, "logger": False, "enable_checkpointing": False})


def resumable(folder: Path, job: Job) -> str | None:
    """The checkpoint to go on from; None when there is none, or it is of another recipe."""
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        return None
    kept = read_state(path).get("callbacks", {}).get(Journal.state_key, {})
    return str(path) if kept.get("fingerprint") == job.fingerprint() else None


def _run(job: Job, model: FusionModel | Objective, source: data.Dataset, recipe: Recipe, journal: Journal) -> Run:
    found = evaluate(model, source, recipe)
    metrics = found["metrics"]
    # The first epoch warms caches up; it counts only where it is alone.
    seconds = journal.seconds[1:] or journal.seconds
    metrics["seconds_per_epoch"] = sum(seconds) / max(len(seconds), 1)
    last = journal.history[-1] if journal.history else {}
    metrics |= {name: value for name, value in last.items() if name.startswith("val_")}
    run: Run = {
        "method": job.method, "seed": job.seed, "fold": job.fold, "metrics": metrics, "history": journal.history,
    }  # fmt: skip
    run |= {name: value for name, value in found.items() if name not in run}  # type: ignore[typeddict-item]
    if "keys" in found:
        before = {"before": journal.keys_before} if journal.keys_before else {}
        run["keys"] = {**before, **found["keys"]}
    return run


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Computes with one thread, so that figures do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's greetings and its advice on loaders; errors and other warnings are heard."""
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
