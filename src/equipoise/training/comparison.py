"""Many runs: methods x seeds x folds on all cores, written down after each, so that any interruption costs little."""

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

from ..errors import ConfigError, EquipoiseError
from ..io.atomic_files import check_folder, file_error, make_folder
from ..results import result_rows
from . import method_factory
from .history import Progress
from .recipes import Recipe
from .run import check_trainer, execute_run, load_run_dataset, single_thread
from .run_spec import RunSpec, is_finished
from .variant_factory import evaluation_metric

MOST = 100_000
"""Runs of one comparison."""

Listener = Callable[[RunSpec, int, int], None]
"""Called with a job, its epochs done, and its epochs."""


def plan_runs(recipe: Recipe, names: Sequence[str], seeds: int, folds: Sequence[str]) -> list[RunSpec]:
    """Seeds outermost, so that an interrupted comparison has whole pairs.

    Raises:
        ConfigError: unknown methods, none at all, fewer than one seed, a method that is its own reference.
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
    """Method -> its fair control, with their names as results have them."""
    found = {}
    for method, reference in recipe.references.items():
        name, other = (
            method_factory.parse_method(method, recipe).name,
            method_factory.parse_method(reference, recipe).name,
        )
        if name == other:
            raise ConfigError(
                "recipe: references", expected="another method to compare with", got=f"{method}: {reference}",
                fix="Name its fair control, or leave the line out.",
            )  # fmt: skip
        found[name] = other
    return found


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
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """Runs every method with every seed on every fold, and writes ``results.json`` after each run.

    Finished runs in ``out`` are not run again, stopped ones go on after their last whole epoch. Each run uses one
    thread, so its figures do not depend on how many run side by side. A run that fails does not stop the others.

    Workers are fresh processes that import the script that started them: a script calls this function under
    ``if __name__ == "__main__":``, or with ``workers=0``.

    Args:
        recipe: data, encoders, training.
        names: methods, such as ``["concat", "joint", "joint+rollingq"]``.
        seeds: how many, counted from 0.
        folds: of the data; empty for data without folds.
        out: folder of everything.
        title: of the protocol in ``results.json``; the recipe's name.
        workers: processes side by side; all cores by default, 0 runs in this process.
        listener: hears of every epoch.
        accelerator: as Lightning names it. The default makes results independent of the machine; with ``"gpu"`` each
            run has one device, and the runs take turns on those there are.

    Returns:
        What ``results.json`` holds; ``failures`` lists the runs that failed, with their errors.

    Raises:
        ConfigError: before anything is run, for names and options that do not exist, or a folder in use.
        DataError: before anything is run, for data that cannot be read.
    """
    plan = plan_runs(recipe, names, seeds, folds)
    if workers is not None and workers < 0:
        raise ConfigError("compare", expected="workers >= 0", got=f"workers = {workers}")
    check_folder(out, "compare")
    _check(plan, accelerator)
    with _alone(out):
        protocol = _protocol(recipe, plan, title)
        runs = [run for job in plan if (run := is_finished(job, job.folder(out))) is not None]
        failures: list[dict[str, Any]] = []

        def write() -> dict[str, Any]:
            content = result_rows.build_results(runs, protocol)
            content["failures"] = failures
            content["complete"] = len(runs) == len(plan)
            result_rows.write_results(out / "results.json", content)
            return content

        write()
        todo = [job for job in plan if is_finished(job, job.folder(out)) is None]
        # Closed at once when this process is interrupted, and its workers with it.
        with contextlib.closing(_performed(todo, out, workers, listener, accelerator)) as ended:
            for job, result in ended:
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
    """Loads the data and builds every model once, so that a wrong option is told before hours of training."""
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
        "data": recipe.data["name"],
        "methods": list(dict.fromkeys(job.method for job in plan)),
        "seeds": sorted({job.seed for job in plan}),
        "folds": sorted({job.fold for job in plan if job.fold is not None}),
        "train": asdict(recipe.train),
        **(evaluation_metric(recipe) or fused),
        **({"reference": recipe.reference} if recipe.reference else {}),
        **({"references": references} if (references := _references(recipe)) else {}),
        "selection": "none: the last epoch counts",
    }


def _performed(
    todo: Sequence[RunSpec], out: Path, workers: int | None, listener: Listener | None, accelerator: str
) -> Generator[tuple[RunSpec, Any], None, None]:
    """(job, run or exception) as they end."""
    count = min(len(todo), cores()) if workers is None else workers
    if count == 0:
        yield from _here(todo, out, listener, accelerator)
        return
    context = multiprocessing.get_context("spawn")
    # Nothing is ever sent: it ends when it is closed here, or with this process, however that ends.
    lifeline, held = context.Pipe(duplex=False)
    news = context.Queue()
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_enter, initargs=(lifeline, news))
    done = threading.Event()
    reader = threading.Thread(target=_relay, args=(news, done, todo, listener), daemon=True)
    try:
        with _interrupts_held():
            reader.start()
            waiting: dict[Future, RunSpec] = {
                pool.submit(_work, number, job, job.folder(out), device(accelerator, number)): job
                for number, job in enumerate(todo)
            }
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            # What was finished before a worker died is handed on first.
            for future in sorted(ended, key=lambda future: future.exception() is not None):
                yield waiting.pop(future), _outcome(future)
        pool.shutdown()
    finally:
        # Workers that still live end themselves at once; the runs they were in go on next time.
        held.close()
        pool.shutdown(cancel_futures=True)
        done.set()
        reader.join(timeout=1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(future: Future) -> Any:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise ConfigError(
            "compare", expected="worker processes that live", got="one that was killed",
            fix="Was memory short? Start the same command again, with fewer --workers; what is finished is kept.",
        ) from error  # fmt: skip
    return error if error is not None else future.result()


def device(accelerator: str, number: int) -> dict[str, Any]:
    """The one device of a run, for Lightning: runs must neither share all of them nor start each other again."""
    several = accelerator in ("gpu", "cuda") and torch.cuda.device_count() > 1
    return {"accelerator": accelerator, "devices": [number % torch.cuda.device_count()] if several else 1}


def _here(
    todo: Sequence[RunSpec], out: Path, listener: Listener | None, accelerator: str
) -> Iterator[tuple[RunSpec, Any]]:
    with single_thread():
        for number, job in enumerate(todo):
            tell = None if listener is None else functools.partial(listener, job)
            yield job, _attempt(job, job.folder(out), tell, device(accelerator, number))


def _attempt(job: RunSpec, folder: Path, tell: Progress | None, options: dict[str, Any]) -> Any:
    """The run, or the exception that ended it."""
    try:
        return execute_run(job, folder, progress=tell, trainer_options=options)
    except EquipoiseError as error:
        return error
    except OSError as error:
        return file_error(error)
    except Exception as error:
        # Some exceptions cannot travel between processes; their text can.
        return RuntimeError("".join(traceback.format_exception(error)))


_news: Any = None


def _enter(lifeline: Any, news: Any) -> None:
    """Sets a worker up: one thread, deaf to Ctrl-C (its parent decides), gone when its parent is."""
    global _news
    _news = news
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, args=(lifeline,), daemon=True).start()


def _leave_with_parent(lifeline: Any) -> None:
    multiprocessing.connection.wait([lifeline])
    os._exit(1)


def _work(number: int, job: RunSpec, folder: Path, options: dict[str, Any]) -> Any:
    return _attempt(job, folder, lambda done, epochs: _news.put((number, done, epochs)), options)


def _relay(news: Any, done: threading.Event, todo: Sequence[RunSpec], listener: Listener | None) -> None:
    while True:
        try:
            number, epoch, epochs = news.get(timeout=0.2)
        except queue.Empty:
            if done.is_set():
                return
            continue
        if listener is not None:
            listener(todo[number], epoch, epochs)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits; processes that start meanwhile never hear of it, even before they can say so."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two comparisons must not write into one folder; the lock goes with the process, however it ends."""
    make_folder(out, "compare")
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                "compare",
                expected=f"'{out}' for this process alone",
                got="another process that writes there",
                fix="Wait for it, stop it, or choose another --out.",
            ) from error
        yield
