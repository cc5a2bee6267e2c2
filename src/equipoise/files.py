"""Files that are whole or not there, and values as JSON knows them."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import SchemaError

STALE = 600.0
"""Seconds after which nobody writes an unfinished file any more."""


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file so that at every moment the old or the new one is there, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _clear(path: Path) -> None:
    """Removes what writers of this file left behind that were killed in the act."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        # By age, since a process of that number may live on this computer or on another that shares the folder.
        with contextlib.suppress(FileNotFoundError):
            if number.isdecimal() and time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def plain(value: Any, where: str = "results") -> Any:
    """The value in JSON's own types: NaN becomes null, a tensor a list; ``where`` names it in the error."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part, f"{where}: {key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, where) for part in value]
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return plain(value.tolist(), where)
    fix = "Convert it first, for example a path with str(path.name)."
    raise SchemaError(where, expected="numbers, texts, lists, mappings or None", got=type(value).__name__, fix=fix)


def without_sharing(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which no two tensors share memory, as safetensors require; repeated ones are copied.

    Example:
        >>> weight = torch.ones(2)
        >>> state = without_sharing({"a": weight, "b": weight})
        >>> state["a"] is weight, state["b"] is weight
        (True, False)
    """
    seen: set[int] = set()
    found = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen and tensor.numel() else tensor
        seen.add(memory)
    return found
