"""Executes the runs of a comparison in worker processes of this machine, each on one thread."""

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
from pathlib import Path
from typing import Any

import torch

from ..data.user_code import allow_code, allowed_code
from ..errors import ConfigError, EquipoiseError
from ..io.atomic_files import file_error
from .history import Progress
from .run import execute_run, single_thread
from .run_spec import RunSpec

Listener = Callable[[RunSpec, int, int], None]
"""Called with (job, epochs done, epochs)."""


def run_in_workers(
    todo: Sequence[RunSpec], out: Path, workers: int | None, listener: Listener | None, accelerator: str
) -> Generator[tuple[RunSpec, Any], None, None]:
    """Yields (job, run or exception) in order of completion."""
    count = min(len(todo), cores()) if workers is None else workers
    if count == 0:
        yield from _run_in_process(todo, out, listener, accelerator)
        return
    context = multiprocessing.get_context("spawn")
    # This pipe carries no data; it closes when the parent exits, which signals the workers to stop.
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
            "compare", expected="running worker processes", got="a worker process that was killed",
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
            yield job, execute(job, job.folder(out), progress, device(accelerator, number))


def execute(job: RunSpec, folder: Path, progress: Progress | None, options: dict[str, Any]) -> Any:
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
    return execute(job, folder, lambda done, epochs: _queue.put((number, done, epochs)), options)


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
    """Context manager: blocks SIGINT; processes that are started in the block inherit this."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
