"""Runs methods x seeds x folds, in parallel or as cluster jobs, and writes the results after each run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, unknown_name
from ..integrations.loggers import check_loggers
from ..io.atomic_files import check_folder, make_folder
from ..io.folder_lock import locked_folder
from ..results import ComparisonResults, result_rows
from . import method_factory
from .recipes import Recipe
from .run import check_trainer, load_run_dataset
from .run_spec import RunSpec, is_finished
from .slurm_jobs import run_on_slurm
from .variant_factory import evaluation_metric, named_metrics
from .worker_processes import Listener, device, run_in_workers

MOST = 100_000
"""Largest number of runs of one comparison."""

EXECUTORS = ("local", "slurm")
"""Where runs are executed: in processes of this machine, or as Slurm jobs."""

Begin = Callable[[Sequence[RunSpec], Sequence[RunSpec]], None]
"""Called with all jobs and the finished ones."""


def plan_runs(recipe: Recipe, names: Sequence[str], seeds: int, folds: Sequence[str]) -> list[RunSpec]:
    """Returns the runs of a comparison, seed by seed, so that an interrupted comparison has complete pairs.

    Raises:
        ConfigError: unknown methods, no method, fewer than one seed, or a method that is its own reference.
    """
    if len(names) * seeds * max(len(folds), 1) > MOST:
        raise ConfigError("compare", expected=f"at most {MOST:,} runs", got=f"{seeds} seeds of {len(names)} methods")
    if not names or seeds < 1:
        got = f"{len(names)} methods and {seeds} seeds"
        raise ConfigError("compare", expected="at least one method and one seed", got=got)
    if recipe.reference is not None:
        method_factory.parse_method(recipe.reference, recipe)
    _references(recipe)
    parsed = list(dict.fromkeys(method_factory.parse_method(name, recipe).name for name in names))
    return [RunSpec(recipe, name, seed, fold) for seed in range(seeds) for fold in folds or [None] for name in parsed]


def _references(recipe: Recipe) -> dict[str, str]:
    """Returns {method: its control}, with the names used in results."""
    result = {}
    for method, reference in recipe.references.items():
        name, other = (
            method_factory.parse_method(method, recipe).name,
            method_factory.parse_method(reference, recipe).name,
        )
        if name == other:
            raise ConfigError(
                "recipe: references", expected="another method to compare with", got=f"{method}: {reference}",
                fix="Name its control, or remove the line.",
            )  # fmt: skip
        result[name] = other
    return result


def compare(
    recipe: Recipe,
    names: Sequence[str],
    *,
    seeds: int,
    folds: Sequence[str] = (),
    out: Path,
    title: str = "",
    workers: int | None = None,
    listener: Listener | None = None,
    begin: Begin | None = None,
    accelerator: str = "cpu",
    executor: str = "local",
    slurm_options: Mapping[str, Any] | None = None,
) -> ComparisonResults:
    """Runs every method with every seed on every fold, and writes ``results.json`` and ``results.csv`` after each run.

    Finished runs in ``out`` are not repeated, interrupted ones resume after their last complete epoch. Each run uses
    one thread, so that its result does not depend on the number of workers. A run that fails does not stop the others.

    Workers are spawned processes that import the calling script: call this function under
    ``if __name__ == "__main__":``, or with ``workers=0``.

    Args:
        recipe: recipe of all runs.
        names: methods, such as ``["concat", "joint", "joint+rollingq"]``.
        seeds: number of seeds, starting at 0.
        folds: folds of the data; empty for data without folds.
        out: output folder.
        title: name of the recipe in the protocol of ``results.json``.
        workers: number of parallel processes; all cores by default, 0 runs in this process.
        listener: called after every epoch.
        begin: called with all runs and the finished ones, before the others start.
        accelerator: accelerator of Lightning. The default makes results independent of the machine; with ``"gpu"`` each
            run uses one device, and runs are distributed over the available ones.
        executor: ``"local"`` for processes of this machine, ``"slurm"`` for one Slurm job per run, through submitit.
        slurm_options: options of ``submitit.AutoExecutor.update_parameters``, such as ``{"timeout_min": 120}``.

    Returns:
        ComparisonResults, the content of ``results.json``; ``failures`` lists the runs that failed, with their errors.

    Raises:
        ConfigError: unknown names or options, or a folder in use; raised before the first run.
        DataError: data cannot be loaded; raised before the first run.
    """
    plan = plan_runs(recipe, names, seeds, folds)
    if workers is not None and workers < 0:
        raise ConfigError("compare", expected="workers >= 0", got=f"workers = {workers}")
    if executor not in EXECUTORS:
        raise unknown_name("compare", "executor", executor, EXECUTORS)
    if slurm_options and executor != "slurm":
        raise ConfigError("compare", expected="options of Slurm only with executor slurm", got=f"executor {executor}")
    check_folder(out, "compare")
    check_runs(plan, accelerator)
    with exclusive_folder(out):
        protocol = run_protocol(recipe, plan, title)
        stored = [(job, is_finished(job, job.folder(out))) for job in plan]
        runs = [run for _, run in stored if run is not None]
        todo = [job for job, run in stored if run is None]
        failures: list[dict[str, Any]] = []

        def write() -> ComparisonResults:
            content = result_rows.build_results(runs, protocol)
            content["failures"] = failures
            content["complete"] = len(runs) == len(plan)
            result_rows.write_results(out / "results.json", content)
            content.write_csv(out / "results.csv")
            return content

        write()
        if begin is not None:
            begin(plan, [job for job, run in stored if run is not None])
        results: Generator[tuple[RunSpec, Any], None, None]
        if executor == "slurm":
            results = run_on_slurm(todo, out, listener, device(accelerator, 0), slurm_options=slurm_options)
        else:
            results = run_in_workers(todo, out, workers, listener, accelerator)
        # Closing the generator on an interrupt stops its workers; cluster jobs continue.
        with contextlib.closing(results):
            for job, result in results:
                if isinstance(result, BaseException):
                    failures.append(
                        {"method": job.method, "seed": job.seed, "fold": job.fold, "error": str(result),
                         "kind": type(result).__name__}
                    )  # fmt: skip
                else:
                    runs.append(result)
                write()
        return write()


def check_runs(plan: Sequence[RunSpec], accelerator: str) -> None:
    """Loads the data and builds every model once, so that a wrong option raises before hours of training.

    The runs have one recipe.
    """
    check_loggers(plan[0].recipe.logger)
    check_trainer({**device(accelerator, 0), "precision": plan[0].recipe.train.precision})
    with torch.random.fork_rng(devices=[]):
        for method, fold in dict.fromkeys((job.method, job.fold) for job in plan):
            recipe = plan[0].recipe
            method_factory.build_model(
                method_factory.parse_method(method, recipe), recipe, load_run_dataset(recipe, fold)
            )


def run_protocol(recipe: Recipe, plan: Sequence[RunSpec], title: str) -> dict[str, Any]:
    """Returns the protocol of ``results.json``."""
    fused = {
        "fusions": recipe.fusions, "balancers": recipe.balancers,
        "noise_modality": recipe.noise_modality or "the one attended most on validation data",
    }  # fmt: skip
    return {
        "recipe": title,
        "data": recipe.data_title,
        "methods": list(dict.fromkeys(job.method for job in plan)),
        "seeds": sorted({job.seed for job in plan}),
        "folds": sorted({job.fold for job in plan if job.fold is not None}),
        "train": asdict(recipe.train),
        **(evaluation_metric(recipe) or fused),
        **named_metrics(recipe),
        **{name: value for name in ("test_corruptions", "left_out") if (value := getattr(recipe, name))},
        **({"reference": recipe.reference} if recipe.reference else {}),
        **({"references": references} if (references := _references(recipe)) else {}),
        "selection": "none: the last epoch counts",
    }


@contextlib.contextmanager
def exclusive_folder(out: Path) -> Iterator[None]:
    """Context manager: locks the folder against other comparisons; the lock ends with the process."""
    make_folder(out, "compare")
    error = ConfigError(
        "compare", expected=f"'{out}' for this process alone", got="another process that writes to it",
        fix="Wait for it, stop it, or choose another --out.",
    )  # fmt: skip
    with locked_folder(out, error):
        yield
