"""Which threads a watch follows: the one that opened the block, and those that it starts in the block, in turn."""

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
    """The threads of one session. Only one of them may run the model at a time, since labels and samples follow it.

    Attributes:
        local: what has to be entered in every thread.
        elsewhere: name of a thread that ran the model unwatched; empty where none did.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._watched: set[int] = set()
        self._owner: int | None = None
        self._lock = threading.Lock()
        self._clash = ""
        self.local: list[Callable[[], AbstractContextManager[Any]]] = []
        self.elsewhere = ""

    def watched(self) -> bool:
        """Whether the thread that runs is watched, and no other one runs the model."""
        thread = threading.get_ident()
        return thread in self._watched and self._owner in (None, thread)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Watches this thread, and those that it starts.

        Raises:
            ConfigError: at the end, the model ran in two threads at a time, or still runs in one.
        """
        with wrapped(threading.Thread, "start", self._start):
            _OPEN.append(self)
            self._watched.add(threading.get_ident())
            try:
                yield
                late = self._session.running and self._owner not in (None, threading.get_ident())
            finally:
                self._watched.clear()
                _OPEN.remove(self)
        if self._clash or late:
            raise ConfigError(
                "watch", expected="one thread at a time that runs the model in the block",
                got=f"'{self._clash}' beside another" if self._clash else "one that still runs it after the block",
                fix="Open a block in each thread, or join the threads before the next one starts and the block ends.",
            )  # fmt: skip

    def enter(self, module: nn.Module) -> None:
        """The model begins to run in this thread."""
        thread = threading.get_ident()
        if thread == self._owner:
            return
        if thread in self._watched:
            with self._lock:
                if self._owner not in (None, thread):
                    self._clash = threading.current_thread().name
                else:
                    self._owner = thread
        # A thread that watches the model itself is not lost; nor are threads of a backward pass.
        elif (
            not self.elsewhere
            and torch._C._current_graph_task_id() == -1
            and not any(thread in other._watched and id(module) in other._session.names for other in tuple(_OPEN))
        ):
            self.elsewhere = threading.current_thread().name

    def leave(self) -> None:
        """The model has returned."""
        if self._owner == threading.get_ident():
            self._owner = None

    def _start(self, inner: Callable[..., Any], thread: threading.Thread, *args: Any, **kwargs: Any) -> Any:
        # As new threads inherit context variables from Python 3.14 on.
        if threading.get_ident() in self._watched:
            run = thread.run

            def watched() -> None:
                with self._inside():
                    run()

            thread.run = watched  # type: ignore[method-assign]
        return inner(thread, *args, **kwargs)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        thread = threading.get_ident()
        with ExitStack() as stack:
            for enter in self.local:
                stack.enter_context(enter())
            self._watched.add(thread)
            try:
                yield
            finally:
                self._watched.discard(thread)


_OPEN: list[Threads] = []
"""Those of all sessions that are open."""
