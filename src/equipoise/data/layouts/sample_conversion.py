"""Converts the samples of a raw folder in worker processes, and resumes from the journal."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError, EquipoiseError
from ...io.atomic_files import open_atomic, to_jsonable
from . import prepared_files
from .prepared_files import JournalEntry
from .published_layout import Layout, RawSample, Settings

CHUNK = 16
"""Samples that a worker process converts before it reports back."""
VERSION = 1
"""Raised whenever the conversion changes, so that files of earlier versions are converted again."""


def convert_samples(
    layout: Layout, samples: Sequence[RawSample], settings: Settings, out: Path, copy: bool, workers: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, JournalEntry], int]:  # fmt: skip
    """Converts the samples that the journal does not contain, and returns all entries and the number of reused ones."""
    journal = out / prepared_files.JOURNAL
    before = prepared_files.read_journal(journal)
    entries: dict[str, JournalEntry] = {}
    todo = []
    for sample in samples:
        previous = before.get(sample.id)
        # A sample that was dropped is tried again: its files may have been replaced meanwhile.
        if (
            previous
            and not previous.dropped
            and previous.signature == _signature(sample, settings, copy)
            and _is_there(previous, out)
        ):
            entries[sample.id] = previous
        else:
            todo.append(sample)
    reused = len(entries)
    if progress is not None:
        progress(reused, len(samples))
    with open(journal, "a", encoding="utf-8") as file:
        # Ends a line that an interruption cut off.
        file.write("\n")
        for converted in _converted(layout, todo, settings, out, copy, workers):
            for entry in converted:
                entries[entry.id] = entry
                file.write(entry.line())
            file.flush()
            if progress is not None:
                progress(len(entries), len(samples))
    _remove_stale(before, entries, out)
    return entries, reused


def _converted(
    layout: Layout, todo: Sequence[RawSample], settings: Settings, out: Path, copy: bool, workers: int
) -> Iterator[list[JournalEntry]]:
    chunks = [list(todo[start : start + CHUNK]) for start in range(0, len(todo), CHUNK)]
    workers = min(workers, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield convert_chunk(layout, chunk, settings, out, copy)
        return
    # Forked processes could inherit locks of other threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts) as pool:
        waiting, left = set(), iter(chunks)
        try:
            for chunk in left:
                waiting.add(pool.submit(convert_chunk, layout, chunk, settings, out, copy))
                if len(waiting) >= 4 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"data prepare {layout.name}",
                expected="running worker processes",
                got="a worker process that was killed",
                fix="Is there enough memory? The same command goes on; try fewer --workers.",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def convert_chunk(
    layout: Layout, samples: Sequence[RawSample], settings: Settings, out: Path, copy: bool
) -> list[JournalEntry]:
    """Converts samples and writes their arrays, in a worker process."""
    return [_convert(layout, sample, settings, out, copy) for sample in samples]


def _convert(layout: Layout, sample: RawSample, settings: Settings, out: Path, copy: bool) -> JournalEntry:
    signature = _signature(sample, settings, copy)
    try:
        for names in sample.files.values():
            for name in names:
                settings.raw.inside(Path(name))
        values = layout.convert(sample, settings)
    except ConfigError:
        raise
    except EquipoiseError as error:
        return JournalEntry(sample.id, signature, dropped=str(error))
    cells: dict[str, Any] = {}
    files: dict[str, tuple[str, int]] = {}
    for column, value in values.items():
        if isinstance(value, np.ndarray):
            # A single frame is an image.
            value = value[0] if layout.kind(column, settings.options) == "image" and value.ndim == 4 else value
            problem = _array_problem(value)
            if problem:
                return JournalEntry(sample.id, signature, dropped=f"{column} of '{sample.id}': {problem}.")
            name = prepared_files.array_path(column, sample.id)
            with open_atomic(out / name) as file:
                np.save(file, value, allow_pickle=False)
            cells[column], files[name] = name, prepared_files.hash_file(out / name)
        elif isinstance(value, Path) and copy:
            name = prepared_files.array_path(column, sample.id, value.suffix.lower())
            with open_atomic(out / name) as file, open(value, "rb") as source:
                shutil.copyfileobj(source, file)
            cells[column], files[name] = name, prepared_files.hash_file(out / name)
        elif isinstance(value, Path):
            name = os.path.relpath(os.path.realpath(value), os.path.realpath(out))
            cells[column], files[name] = name, prepared_files.hash_file(value)
        else:
            cells[column] = value
    return JournalEntry(sample.id, signature, cells, files)


def _array_problem(values: np.ndarray) -> str:
    """Returns what is wrong with the values of a sample; "" if nothing is."""
    if values.dtype.kind not in "fiub":
        return f"expected numbers, got {values.dtype}"
    if not values.size:
        return f"expected values, got an empty array of shape {values.shape}"
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        kind = "NaN" if np.isnan(values).any() else "infinity"
        return f"expected finite values, got {kind}"
    return ""


def _signature(sample: RawSample, settings: Settings, copy: bool) -> str:
    """Returns a hash of everything that the converted files depend on, except the contents of the raw files."""
    digest = hashlib.sha256()
    content = asdict(replace(sample, split=""))
    options = {name: value for name, value in settings.options.items() if name != "split"}
    digest.update(json.dumps(to_jsonable([VERSION, content, options, copy]), sort_keys=True).encode())
    for names in sample.files.values():
        for name in names:
            with contextlib.suppress(OSError):
                state = os.stat(name)
                digest.update(f"{name} {state.st_size} {state.st_mtime_ns}".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _is_there(entry: JournalEntry, out: Path) -> bool:
    """Returns whether the files of an entry exist in the size that was written."""
    try:
        return all((out / name).stat().st_size == size for name, (_, size) in entry.files.items())
    except (OSError, ValueError):
        return False


def _remove_stale(before: Mapping[str, JournalEntry], entries: Mapping[str, JournalEntry], out: Path) -> None:
    """Removes arrays of samples that are no longer part of the data set, and temporary files of killed workers."""
    retained = {name for entry in entries.values() for name in entry.files}
    for entry in before.values():
        for name in set(entry.files) - retained:
            if not name.startswith("..") and not os.path.isabs(name):
                with contextlib.suppress(OSError):
                    (out / name).unlink()
    for left in out.glob("*/??/.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()
