"""Exits without a traceback if Ctrl-C is pressed while the program is still importing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def is_program(words: Sequence[str]) -> bool:
    """Returns whether a process with these arguments runs the ``equipoise`` command.

    Example:
        >>> is_program(["python", "-m", "equipoise", "demo"]), is_program(["python", "mine.py", "equipoise"])
        (True, False)
    """
    # The arguments of the program follow -m, -c or the first file.
    for before, word in zip(words, words[1:]):  # noqa: B905, RUF007
        if word == "-c":
            return False
        if before == "-m":
            return word == "equipoise"
        if not word.startswith("-") and before not in ("-W", "-X"):
            return PurePath(word).stem == "equipoise"
    return False


def _exit_at_once(number: int, frame: Any) -> None:
    # Call only os functions: partially imported modules may fail.
    os.write(2, b"equipoise: Stopped before anything was begun.\n")
    os._exit(INTERRUPTED)


def ready() -> None:
    """Restores the default: Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_program(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _exit_at_once)
