"""Methods that torch.compile does not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CompileDisabled:
    """A method that is called but never compiled; a copy or pickle of it is bound to the copied object.

    ``torch.compiler.disable`` returns a function that stays bound to the original object and cannot be pickled. As a
    decorator it would also import the compiler together with the package, which takes as long as importing torch.

    Example:
        >>> batches = []
        >>> CompileDisabled(batches.append)("batch")
        >>> batches
        ['batch']
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self._call: Any = torch.compiler.disable(method)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self):
        return type(self), (self.method,)
