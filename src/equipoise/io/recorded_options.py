"""Remembers the arguments with which an object was created, so that it can be described and built again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


class RecordedOptions:
    """Base class whose objects remember the arguments of their constructor.

    Example:
        >>> class Layer(RecordedOptions):
        ...     def __init__(self, dim, heads=2, **options): ...
        >>> Layer(8, bias=False).recorded_options()
        {'dim': 8, 'bias': False}
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)

    def recorded_options(self) -> dict[str, Any]:
        """Returns the arguments of the constructor by name, without those that were not given."""
        args, kwargs = self.__dict__["_created_with"]
        signature = inspect.signature(type(self))
        given = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # The constructor of the class itself is called first, before those of its base classes.
        self.__dict__.setdefault("_created_with", (args, kwargs))
        init(self, *args, **kwargs)

    return __init__
