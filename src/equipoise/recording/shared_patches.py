"""Changes of shared state that several watches, also in several threads, make and take back in any order."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Wrapper = Callable[..., Any]
"""Called with the function below it, then with the arguments of the call."""

_LOCK = threading.RLock()
_CHAINS: dict[tuple[int, str], _Chain] = {}
_HELD: dict[str, tuple[int, Callable[[], None]]] = {}


class _Chain:
    """A function attribute of an object, with wrappers around it, the last one outermost."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.had, self.before = name in vars(owner), vars(owner).get(name)
        self.wrappers: tuple[Wrapper, ...] = ()
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            wrapped = inner
            for wrapper in self.wrappers:
                wrapped = functools.partial(wrapper, wrapped)
            return wrapped(*args, **kwargs)

        self.put(call)

    def put(self, function: Any) -> None:
        if inspect.isclass(self.owner):
            setattr(self.owner, self.name, function)
        else:
            # A module's own `__setattr__` would look for parameters, and may be overridden.
            vars(self.owner)[self.name] = function

    def restore(self) -> None:
        if self.had:
            self.put(self.before)
        elif inspect.isclass(self.owner):
            delattr(self.owner, self.name)
        else:
            del vars(self.owner)[self.name]


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Wrapper) -> Iterator[None]:
    """Puts ``wrapper(inner, *args, **kwargs)`` around a function of a class, a module or an instance.

    Saving and restoring the attribute in each block would lose wrappers when blocks of several threads overlap. Here
    the first block saves the attribute, and the last one restores it.
    """
    # The same function may be put around twice.
    key, replacement = (id(owner), name), functools.partial(wrapper)
    with _LOCK:
        chain = _CHAINS.get(key)
        if chain is None:
            chain = _CHAINS[key] = _Chain(owner, name)
        chain.wrappers = (*chain.wrappers, replacement)
    try:
        yield
    finally:
        with _LOCK:
            chain.wrappers = tuple(other for other in chain.wrappers if other is not replacement)
            if not chain.wrappers:
                del _CHAINS[key]
                chain.restore()


@contextmanager
def held(name: str, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Keeps a global setting changed as long as any block needs it; ``change`` returns what undoes it."""
    with _LOCK:
        count, undo = _HELD.get(name) or (0, change())
        _HELD[name] = (count + 1, undo)
    try:
        yield
    finally:
        with _LOCK:
            count, undo = _HELD.pop(name)
            if count > 1:
                _HELD[name] = (count - 1, undo)
            else:
                undo()
