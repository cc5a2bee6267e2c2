"""Bookkeeping that torch.compile leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CompileDisabled:
    """A method that is called and never compiled; copied or pickled, it goes with the copy of its object.

    ``torch.compiler.disable`` makes a function that neither follows a copy nor can be pickled, and as a decorator it
    would import the compiler, which takes as long as torch itself, together with the package.

    Example:
        >>> seen = []
        >>> Untraced(seen.append)("batch")
        >>> seen
        ['batch']
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self._call: Any = torch.compiler.disable(method)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self):
        return type(self), (self.method,)
