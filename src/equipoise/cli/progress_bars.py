"""Progress bars for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..training.run_spec import RunSpec


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip


@contextmanager
def progress_iterator(what: str, console: Console) -> Iterator[Callable[[], None]]:
    """Progress bar of unknown length; yields a function to call after every step."""
    with _bar(console, "steps") as bar:
        task = bar.add_task(what, total=None)
        yield lambda: bar.advance(task)


@contextmanager
def counted_progress(what: str, unit: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Progress bar of known length; yields a function to call with the steps done and the total."""
    with _bar(console, unit) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class ComparisonProgress:
    """Progress bar over the epochs of all runs; without a terminal, one line per finished run."""

    def __init__(self, console: Console) -> None:
        self._epochs: dict[tuple[str, int, str | None], int] = {}
        self._reached: dict[tuple[str, int, str | None], int] = {}
        self._console, self._bar = console, _bar(console, "epochs")

    def __enter__(self) -> ComparisonProgress:
        return self

    def begin(self, jobs: Sequence[RunSpec], done: Sequence[RunSpec]) -> None:
        """Starts the bar, with all runs and those that are finished already."""
        from ..training import method_factory

        recipes = {
            job.method: method_factory.method_recipe(method_factory.parse_method(job.method, job.recipe), job.recipe)
            for job in jobs
        }
        self._epochs = {self._key(job): recipes[job.method].train.epochs for job in jobs}
        self._reached = {self._key(job): self._epochs[self._key(job)] for job in done}
        if done:
            self._console.print(f"{len(done)} of {len(jobs)} runs are already finished.", highlight=False)
        self._bar.start()
        self._task = self._bar.add_task("training", total=sum(self._epochs.values()), completed=self._total())

    def __exit__(self, *exception: object) -> None:
        if self._epochs:
            self._bar.stop()

    def __call__(self, job: RunSpec, done: int, epochs: int) -> None:
        self._reached[self._key(job)] = done
        self._bar.update(self._task, completed=self._total())
        if done == epochs:
            finished = sum(self._reached.get(key, 0) == total for key, total in self._epochs.items())
            fold = "" if job.fold is None else f", fold {job.fold}"
            text = f"[dim]{finished}/{len(self._epochs)}[/dim] {job.method}, seed {job.seed}{fold} trained"
            self._bar.console.print(text, highlight=False)

    def _total(self) -> int:
        return sum(self._reached.values())

    @staticmethod
    def _key(job: RunSpec) -> tuple[str, int, str | None]:
        return job.method, job.seed, job.fold


class TrainingProgress(pl.Callback):
    """Progress bar over all steps of a training, with the validation score."""

    def __init__(self, console: Console) -> None:
        self._bar = _bar(console, "steps")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._bar.start()
            total = int(trainer.estimated_stepping_batches)
            self._task = self._bar.add_task("epoch 1", total=total, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        if trainer.is_global_zero:
            self._bar.update(self._task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            from ..report.text_format import as_read, method_title

            figures = trainer.callback_metrics
            score = "".join(
                f", {method_title(n).lower()} {as_read(n, float(v)):.3f}"
                for n, v in figures.items()
                if n.startswith("val_")
            )
            text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}{score}"
            self._bar.update(self._task, description=text)
            if not self._bar.console.is_terminal:
                self._bar.console.print(text, highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._bar.stop()


class DiagnosisProgress:
    """Progress bar over the tests of all runs; without a terminal, one line per run.

    Args:
        runs: number of runs.
        console: output.
    """

    def __init__(self, runs: int, console: Console) -> None:
        self._runs, self._begun, self._console, self._bar = runs, 0, console, _bar(console, "tests")

    def __enter__(self) -> DiagnosisProgress:
        self._bar.start()
        self._task = self._bar.add_task("diagnosing", total=None)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """Starts the next run."""
        self._begun, self._name = self._begun + 1, name
        if not self._console.is_terminal:
            self._console.print(f"diagnosing {name}", highlight=False, markup=False)

    def __call__(self, test: str, done: int, tests: int) -> None:
        description = f"{self._name}: {test}" if test else self._name
        self._bar.update(
            self._task, description=description, total=tests * self._runs, completed=tests * (self._begun - 1) + done
        )
