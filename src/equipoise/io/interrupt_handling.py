"""Ends the program at once, without a traceback, on Ctrl-C while it is still importing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

INTERRUPTED = 130


def is_program(words: Sequence[str]) -> bool:
    """Whether a process with these arguments is the program ``equipoise``.

    Example:
        >>> is_program(["python", "-m", "equipoise", "demo"]), is_program(["python", "mine.py", "equipoise"])
        (True, False)
    """
    # After -m or -c, or the first file, come the program's own arguments.
    for before, word in zip(words, words[1:]):  # noqa: B905, RUF007
        if word == "-c":
            return False
        if before == "-m":
            return word == "equipoise"
        if not word.startswith("-") and before not in ("-W", "-X"):
            return PurePath(word).stem == "equipoise"
    return False


def _leave(number: int, frame: Any) -> None:
    # Modules that are half imported could make anything else fail.
    os.write(2, b"equipoise: Stopped before anything was begun.\n")
    os._exit(INTERRUPTED)


def ready() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt as usual."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_program(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
