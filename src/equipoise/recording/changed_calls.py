"""Passes attention calls that one session changes to the other sessions that record the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .attention_call import AttentionCall


class _Changes(threading.local):
    """Changes in the current thread.

    Attributes:
        collectors: lists of the sessions that are running an attention, the innermost last.
        shown: the call that replaces the one which an inner session intercepts.
        hidden: whether inner sessions ignore the functions that run.
    """

    def __init__(self) -> None:
        self.collectors: list[list[AttentionCall]] = []
        self.shown: AttentionCall | None = None
        self.hidden = False


_CHANGES = _Changes()


@contextmanager
def collect_changes() -> Iterator[list[AttentionCall]]:
    """Collects the changed calls that sessions inside the block report."""
    changes: list[AttentionCall] = []
    _CHANGES.collectors.append(changes)
    try:
        yield changes
    finally:
        _CHANGES.collectors.remove(changes)


def report_change(call: AttentionCall) -> None:
    """Reports a changed call to the sessions around this one."""
    for changes in _CHANGES.collectors:
        changes.append(call)


@contextmanager
def show_change(call: AttentionCall) -> Iterator[None]:
    """Context manager in which recording sessions record this call instead of the one that they intercept."""
    before, _CHANGES.shown = _CHANGES.shown, call
    try:
        yield
    finally:
        _CHANGES.shown = before


def current_change() -> AttentionCall | None:
    """Returns the call to record in place of the intercepted one, if there is one."""
    return _CHANGES.shown


@contextmanager
def hide_calls() -> Iterator[None]:
    """Sessions ignore the attention in the block, which runs once more."""
    before, _CHANGES.hidden = _CHANGES.hidden, True
    try:
        yield
    finally:
        _CHANGES.hidden = before


def calls_hidden() -> bool:
    """Whether sessions ignore the attention that runs now."""
    return _CHANGES.hidden
