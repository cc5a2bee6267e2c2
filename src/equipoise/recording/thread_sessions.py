"""Threads of a recording session: the one that opened the block, and those started inside the block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .shared_patches import wrapped


class Threads:
    """Threads of one recording session.

    Only one of them may run the model at a time, because labels and samples depend on the order of calls.

    Attributes:
        local: context managers to enter in each thread.
        unrecorded: name of a thread that ran the model without being recorded; empty if there is none.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._recorded: set[int] = set()
        self._owner: int | None = None
        self._lock = threading.Lock()
        self._concurrent = ""
        self.local: list[Callable[[], AbstractContextManager[Any]]] = []
        self.unrecorded = ""

    def is_recorded(self) -> bool:
        """Whether the current thread is recorded, and no other thread runs the model."""
        thread = threading.get_ident()
        return thread in self._recorded and self._owner in (None, thread)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Records the current thread and those started inside the block.

        Raises:
            ConfigError: when the block exits, if the model ran in two threads at a time or is still running in one.
        """
        with wrapped(threading.Thread, "start", self._start):
            _OPEN.append(self)
            self._recorded.add(threading.get_ident())
            try:
                yield
                late = self._session.running and self._owner not in (None, threading.get_ident())
            finally:
                self._recorded.clear()
                _OPEN.remove(self)
        if self._concurrent or late:
            raise ConfigError(
                "watch",
                expected="only one thread at a time that runs the model in the block",
                got=f"'{self._concurrent}' in parallel"
                if self._concurrent
                else "one that is still running after the block",
                fix="Open a block in each thread, or join each thread before the next one starts and the block ends.",
            )

    def opened_before(self) -> list[Any]:
        """Returns the open sessions that were opened earlier."""
        return [other._session for other in _OPEN[: _OPEN.index(self)]] if self in _OPEN else []

    def enter(self, module: nn.Module) -> None:
        """Called when the model starts running in the current thread."""
        thread = threading.get_ident()
        if thread == self._owner:
            return
        if thread in self._recorded:
            with self._lock:
                if self._owner not in (None, thread):
                    self._concurrent = threading.current_thread().name
                else:
                    self._owner = thread
        # Threads with a session of their own and threads of a backward pass are not reported.
        elif (
            not self.unrecorded
            and torch._C._current_graph_task_id() == -1
            and not any(thread in other._recorded and id(module) in other._session.names for other in tuple(_OPEN))
        ):
            self.unrecorded = threading.current_thread().name

    def leave(self) -> None:
        """Called when the model has returned."""
        if self._owner == threading.get_ident():
            self._owner = None

    def _start(self, inner: Callable[..., Any], thread: threading.Thread, *args: Any, **kwargs: Any) -> Any:
        # Same as the inheritance of context variables by new threads since Python 3.14.
        if threading.get_ident() in self._recorded:
            run = thread.run

            def recorded() -> None:
                with self._record_thread():
                    run()

            thread.run = recorded  # type: ignore[method-assign]
        return inner(thread, *args, **kwargs)

    @contextmanager
    def _record_thread(self) -> Iterator[None]:
        thread = threading.get_ident()
        with ExitStack() as stack:
            for enter in self.local:
                stack.enter_context(enter())
            self._recorded.add(thread)
            try:
                yield
            finally:
                self._recorded.discard(thread)


_OPEN: list[Threads] = []
"""Threads of all open sessions."""
