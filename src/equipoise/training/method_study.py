"""Optuna study of one method, stored in a file that an interrupted search resumes from."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from ..diagnostics.task_scores import SCORES
from ..errors import ConfigError, NonFiniteError
from ..io.atomic_files import atomic_write
from ..results.task_metrics import find_metric
from . import method_factory
from .comparison import check_runs
from .recipes import Recipe
from .run import execute_run, load_run_dataset
from .run_spec import RunSpec
from .search_space import WHO, SearchedOption, with_values
from .worker_processes import device

STARTUP_TRIALS, WARMUP_EPOCHS = 5, 1
"""Complete trials before the first pruning, and epochs of a trial that are never pruned."""


@dataclass(frozen=True)
class SearchTrial:
    """One trial: its number, state (complete, pruned, failed), last validation value, epochs and options."""

    method: str
    number: int
    state: str
    value: float | None
    epochs: int
    options: dict[str, Any]


TrialListener = Callable[[SearchTrial, int], None]
"""Called with each trial that has ended, and the number of trials."""


class MethodStudy:
    """Study of one method.

    Args:
        recipe: recipe of all trials.
        name: method.
        options: options to search; those without effect on the method are left out.
        seed, fold: of all trials.
        accelerator: accelerator of Lightning.
        folder: folder of all studies; that of this one has the name of the method.

    Attributes:
        metric: name of the validation metric that is compared.
        best_options: options of the best trial, after ``run``.

    Raises:
        ConfigError: an unknown option or method, no option with an effect, or a method that needs teachers.
    """

    direction: Literal["maximize", "minimize"]

    def __init__(
        self, recipe: Recipe, name: str, options: Sequence[SearchedOption], seed: int, fold: str | None,
        accelerator: str, folder: Path,
    ) -> None:  # fmt: skip
        method = method_factory.parse_method(name, recipe)
        self.method, self.recipe, self.seed, self.fold = method.name, recipe, seed, fold
        self.device = device(accelerator, 0)
        if method_factory.needs_teachers(method, recipe):
            raise ConfigError(
                WHO, expected="a method that is trained in one run", got=f"{self.method}, which needs trained teachers",
                fix="Search the options of its fusion, and use them for it.",
            )  # fmt: skip
        self.options = [option for option in options if self._has_effect(option)]
        if not self.options:
            listed = ", ".join(option.name for option in options) or "none"
            raise ConfigError(WHO, expected=f"an option with an effect on {self.method}", got=listed)
        for option in self.options:
            for value in option.extremes:
                check_runs([self._job({option.name: value})], accelerator)
        self.metric, self.direction = _objective(recipe, fold)
        self.folder = folder / self.method
        self.best_options: dict[str, Any] = {}

    @property
    def best(self) -> RunSpec:
        """Run of the best trial."""
        return self._job(self.best_options)

    def _job(self, values: dict[str, Any]) -> RunSpec:
        return RunSpec(with_values(self.recipe, values), self.method, self.seed, self.fold)

    def _has_effect(self, option: SearchedOption) -> bool:
        seen = set()
        for value in option.extremes:
            # Options of a variant replace those of the recipe.
            job = self._job({option.name: value})
            effective = method_factory.method_recipe(method_factory.parse_method(self.method, job.recipe), job.recipe)
            seen.add(RunSpec(effective, self.method, self.seed, self.fold).fingerprint())
        return len(seen) == len(option.extremes)

    def run(self, trials: int, listener: TrialListener | None) -> Any:
        """Runs the trials that are left, and returns the evaluated run of the best one."""
        import optuna
        from optuna.trial import TrialState

        self.folder.mkdir(parents=True, exist_ok=True)
        study = self._open()
        while True:
            known = study.get_trials(deepcopy=False)
            running = [trial for trial in known if trial.state == TrialState.RUNNING]
            if running:
                # An interrupted trial has its options already; it continues.
                trial = optuna.trial.Trial(study, running[0]._trial_id)
            elif len(known) < trials:
                trial = study.ask()
            else:
                break
            self._execute(study, trial)
            ended = study.get_trials(deepcopy=False)
            self._write_table(ended)
            if listener is not None:
                listener(self._described(ended[trial.number]), trials)
        complete = [trial for trial in known if trial.state == TrialState.COMPLETE]
        if not complete:
            raise ConfigError(
                WHO, expected="one trial or more without error", got=f"{len(known)} trials of {self.method} with NaN",
                fix="Search smaller learning rates, or set train.clip.",
            )  # fmt: skip
        self._remove_others(study)
        self.best_options = dict(study.best_trial.params)
        return execute_run(self.best, self._trial_folder(study.best_trial.number), trainer_options=self.device)

    def _open(self) -> Any:
        """Opens the study, or creates it."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        class FolderLock(JournalFileOpenLock):
            """The folder is locked already; the lock of a killed process would remain in a file of its own."""

            def acquire(self) -> bool:
                return True

            def release(self) -> None:
                pass

        path = self.folder / "study.journal"
        if path.exists():
            # A killed process may have written half a line.
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                atomic_write(path, content[: content.rfind(b"\n") + 1])
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path), lock_obj=FolderLock(str(path)))),
            sampler=self._sampler(0, ""),
            pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS, WARMUP_EPOCHS),
            study_name=self.method, direction=self.direction, load_if_exists=True,
        )  # fmt: skip
        settings = json.dumps(
            {"job": self._job({}).fingerprint(), "options": [asdict(option) for option in self.options]}, sort_keys=True
        )
        stored = study.user_attrs.get("settings")
        if stored is None and not study.get_trials(deepcopy=False):
            study.set_user_attr("settings", settings)
        elif stored != settings:
            raise ConfigError(
                WHO, expected="the recipe, options and seed of the search in this folder",
                got=f"others for {self.method}", fix="Choose another --out.",
            )  # fmt: skip
        return study

    def _sampler(self, number: int, name: str) -> Any:
        import optuna

        key = zlib.crc32(f"{self.seed}/{number}/{name}".encode())
        return optuna.samplers.TPESampler(seed=key, multivariate=False, constant_liar=False)

    def _execute(self, study: Any, trial: Any) -> None:
        """Trains a trial, and tells the study its value."""
        import optuna
        from optuna.trial import TrialState

        values = {}
        for option in self.options:
            # A generator of its own for each choice, so that a resumed search makes the same ones.
            study.sampler = self._sampler(trial.number, option.name)
            values[option.name] = option.suggest(trial)
        folder, job = self._trial_folder(trial.number), self._job(values)
        settings = {**self.device, "callbacks": [_TrialCallback(trial, self.metric)]}
        state, value = TrialState.COMPLETE, None
        try:
            execute_run(job, folder, trainer_options=settings, evaluate=False)
            reported = study.get_trials(deepcopy=False)[trial.number].intermediate_values
            value = reported[max(reported)]
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except NonFiniteError:
            state = TrialState.FAIL
        if state == TrialState.COMPLETE and not math.isfinite(value or 0.0):
            state, value = TrialState.FAIL, None
        study.tell(trial, value, state=state)
        self._remove_others(study)

    def _remove_others(self, study: Any) -> None:
        """Removes the folders of ended trials other than the best one, which alone is evaluated."""
        from optuna.trial import TrialState

        ended = [one for one in study.get_trials(deepcopy=False) if one.state.is_finished()]
        kept = study.best_trial.number if any(one.state == TrialState.COMPLETE for one in ended) else None
        for one in ended:
            if one.number != kept:
                shutil.rmtree(self._trial_folder(one.number), ignore_errors=True)

    def _trial_folder(self, number: int) -> Path:
        return self.folder / f"trial{number}"

    def _described(self, trial: Any) -> SearchTrial:
        reported = trial.intermediate_values
        state = "failed" if trial.state.name == "FAIL" else trial.state.name.lower()
        last = reported[max(reported)] if reported else None
        return SearchTrial(self.method, trial.number, state, last, len(reported), dict(trial.params))

    def _write_table(self, trials: Sequence[Any]) -> None:
        names = [option.name for option in self.options]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["number", "state", self.metric, "epochs", *names])
        for one in map(self._described, trials):
            writer.writerow([one.number, one.state, one.value, one.epochs, *(one.options[name] for name in names)])
        atomic_write(self.folder / "trials.csv", text.getvalue())


def _objective(recipe: Recipe, fold: str | None) -> tuple[str, Literal["maximize", "minimize"]]:
    """Returns the name of the validation metric, and "maximize" or "minimize"."""
    if recipe.model:
        return "val_loss", "minimize"
    task = load_run_dataset(recipe, fold).task
    name = recipe.metrics[0] if recipe.metrics else SCORES[task]
    metric = None if name in SCORES.values() else find_metric(name, task, "compare --search")
    higher = metric is None or metric.higher
    return f"val_{name}", "maximize" if higher else "minimize"


class _TrialCallback(pl.Callback):
    """Reports the validation metric of every epoch to a trial, and ends it if it is worse than earlier ones."""

    def __init__(self, trial: Any, metric: str) -> None:
        self._trial, self._metric = trial, metric

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        import optuna

        epoch = trainer.current_epoch
        value = float(trainer.callback_metrics[self._metric])
        reported = self._trial.study.get_trials(deepcopy=False)[self._trial.number].intermediate_values
        # A resumed trial repeats the epoch in which it was interrupted.
        if epoch not in reported:
            self._trial.report(value, epoch)
        if epoch + 1 < int(trainer.max_epochs or 0) and self._trial.should_prune():
            raise optuna.TrialPruned
