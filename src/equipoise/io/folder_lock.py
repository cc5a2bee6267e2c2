"""Locks a folder against other processes that write to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked_folder(folder: Path, error: Exception) -> Iterator[None]:
    """Context manager: holds a lock on an existing folder; the lock ends with the process, however that ends.

    Without file locks, as on Windows, nothing is locked.

    Args:
        folder: the folder; the lock is its file ``.lock``.
        error: raised if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as held:
            raise error from held
        yield
