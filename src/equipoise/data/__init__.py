"""Data sets by name, and batches of them that repeat exactly."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from ..errors import unknown_name
from .base import Dataset, Split
from .loader import loader
from .outside import outside

__all__ = ["Dataset", "Split", "known", "load", "loader", "outside"]


def known() -> dict[str, type[Dataset]]:
    """name -> class of every data set: the modules of this package that define one."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f".{module.name}", __name__)).values():
            here = inspect.isclass(value) and value.__module__ == f"{__name__}.{module.name}"
            if here and issubclass(value, Dataset) and not inspect.isabstract(value):
                found[module.name] = value
    return found


def load(name: str, **options: Any) -> Dataset:
    """The data set of that name.

    Args:
        name: of a module in this package, such as "digits" or "av_digits".
        **options: of the data set's class, such as ``fold="B"`` and ``root="data"``.

    Raises:
        ConfigError: a name that no data set has; the closest one is given.
        DataError: data that are missing or damaged; the file is named.

    Example:
        >>> load("digits").names
        ('audio', 'image')
    """
    datasets = known()
    if name not in datasets:
        raise unknown_name("load", "data set", name, datasets)
    return datasets[name](**options)
