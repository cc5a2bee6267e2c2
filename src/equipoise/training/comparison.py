"""Runs methods x seeds x folds in parallel and writes the results after each run."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data.user_code import allow_code, allowed_code
from ..errors import ConfigError, EquipoiseError
from ..integrations.loggers import check_loggers
from ..io.atomic_files import check_folder, file_error, make_folder
from ..io.folder_lock import locked_folder
from ..results import ComparisonResults, result_rows
from . import method_factory
from .history import Progress
from .recipes import Recipe
from .run import check_trainer, execute_run, load_run_dataset, single_thread
from .run_spec import RunSpec, is_finished
from .variant_factory import evaluation_metric, named_metrics

MOST = 100_000
"""Largest number of runs of one comparison."""

Listener = Callable[[RunSpec, int, int], None]
"""Called with (job, epochs done, epochs)."""

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

    Returns:
        ComparisonResults, the content of ``results.json``; ``failures`` lists the runs that failed, with their errors.

    Raises:
        ConfigError: unknown names or options, or a folder in use; raised before the first run.
        DataError: data cannot be loaded; raised before the first run.
    """
    plan = plan_runs(recipe, names, seeds, folds)
    if workers is not None and workers < 0:
        raise ConfigError("compare", expected="workers >= 0", got=f"workers = {workers}")
    check_folder(out, "compare")
    _check(plan, accelerator)
    with _exclusive_folder(out):
        protocol = _protocol(recipe, plan, title)
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
        # Closing the generator on an interrupt stops its workers.
        with contextlib.closing(_run_all(todo, out, workers, listener, accelerator)) as results:
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


def _check(plan: Sequence[RunSpec], accelerator: str) -> None:
    """Loads the data and builds every model once, so that a wrong option raises before hours of training."""
    check_loggers(plan[0].recipe.logger)
    check_trainer({**device(accelerator, 0), "precision": plan[0].recipe.train.precision})
    with torch.random.fork_rng(devices=[]):
        for method, fold in dict.fromkeys((job.method, job.fold) for job in plan):
            recipe = plan[0].recipe
            method_factory.build_model(
                method_factory.parse_method(method, recipe), recipe, load_run_dataset(recipe, fold)
            )


def _protocol(recipe: Recipe, plan: Sequence[RunSpec], title: str) -> dict[str, Any]:
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
        **({"reference": recipe.reference} if recipe.reference else {}),
        **({"references": references} if (references := _references(recipe)) else {}),
        "selection": "none: the last epoch counts",
    }


def _run_all(
    todo: Sequence[RunSpec], out: Path, workers: int | None, listener: Listener | None, accelerator: str
) -> Generator[tuple[RunSpec, Any], None, None]:
    """Yields (job, run or exception) in order of completion."""
    count = min(len(todo), cores()) if workers is None else workers
    if count == 0:
        yield from _run_in_process(todo, out, listener, accelerator)
        return
    context = multiprocessing.get_context("spawn")
    # This pipe carries no data; it closes when the parent exits, which tells the workers to stop.
    lifeline, parent_end = context.Pipe(duplex=False)
    queue_ = context.Queue()
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_initialize_worker, initargs=(lifeline, queue_, allowed_code())
    )
    done = threading.Event()
    reader = threading.Thread(target=_forward_progress, args=(queue_, done, todo, listener), daemon=True)
    try:
        with _interrupts_blocked():
            reader.start()
            waiting: dict[Future, RunSpec] = {
                pool.submit(_execute_in_worker, number, job, job.folder(out), device(accelerator, number)): job
                for number, job in enumerate(todo)
            }
        while waiting:
            completed, _ = wait(waiting, return_when=FIRST_COMPLETED)
            # Yield results that finished before a worker died first.
            for future in sorted(completed, key=lambda future: future.exception() is not None):
                yield waiting.pop(future), _outcome(future)
        pool.shutdown()
    finally:
        # Remaining workers exit at once; their runs resume on the next call.
        parent_end.close()
        pool.shutdown(cancel_futures=True)
        done.set()
        reader.join(timeout=1)


def cores() -> int:
    """Returns the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(future: Future) -> Any:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise ConfigError(
            "compare", expected="running worker processes", got="one that was killed",
            fix="It may have run out of memory. Repeat the command with fewer --workers; finished runs are kept.",
        ) from error  # fmt: skip
    return error if error is not None else future.result()


def device(accelerator: str, number: int) -> dict[str, Any]:
    """Returns the Trainer options that select one device for a run, in turn among the available ones."""
    several = accelerator in ("gpu", "cuda") and torch.cuda.device_count() > 1
    return {"accelerator": accelerator, "devices": [number % torch.cuda.device_count()] if several else 1}


def _run_in_process(
    todo: Sequence[RunSpec], out: Path, listener: Listener | None, accelerator: str
) -> Iterator[tuple[RunSpec, Any]]:
    with single_thread():
        for number, job in enumerate(todo):
            progress = None if listener is None else functools.partial(listener, job)
            yield job, _execute(job, job.folder(out), progress, device(accelerator, number))


def _execute(job: RunSpec, folder: Path, progress: Progress | None, options: dict[str, Any]) -> Any:
    """Executes a run; returns it, or the exception that it raised."""
    try:
        return execute_run(job, folder, progress=progress, trainer_options=options)
    except EquipoiseError as error:
        return error
    except OSError as error:
        return file_error(error)
    except Exception as error:
        # Some exceptions cannot be pickled; send their text.
        return RuntimeError("".join(traceback.format_exception(error)))


_queue: Any = None


def _initialize_worker(lifeline: Any, queue_: Any, code: tuple[str, ...]) -> None:
    """Initializes a worker: uses one thread, ignores Ctrl-C (the parent handles it), exits with its parent."""
    global _queue
    _queue = queue_
    allow_code(code)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, args=(lifeline,), daemon=True).start()


def _exit_with_parent(lifeline: Any) -> None:
    multiprocessing.connection.wait([lifeline])
    os._exit(1)


def _execute_in_worker(number: int, job: RunSpec, folder: Path, options: dict[str, Any]) -> Any:
    return _execute(job, folder, lambda done, epochs: _queue.put((number, done, epochs)), options)


def _forward_progress(queue_: Any, done: threading.Event, todo: Sequence[RunSpec], listener: Listener | None) -> None:
    while True:
        try:
            number, epoch, epochs = queue_.get(timeout=0.2)
        except queue.Empty:
            if done.is_set():
                return
            continue
        if listener is not None:
            listener(todo[number], epoch, epochs)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Context manager: blocks SIGINT; processes that start meanwhile inherit the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _exclusive_folder(out: Path) -> Iterator[None]:
    """Context manager: locks the folder against other comparisons; the lock ends with the process."""
    make_folder(out, "compare")
    error = ConfigError(
        "compare", expected=f"'{out}' for this process alone", got="another process that writes to it",
        fix="Wait for it, stop it, or choose another --out.",
    )  # fmt: skip
    with locked_folder(out, error):
        yield
