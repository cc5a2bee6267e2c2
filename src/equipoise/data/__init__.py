"""Data sets by name, and batches of them that repeat exactly."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from ..errors import unknown_name
from . import sets
from .batch_loader import loader
from .dataset import Dataset, Split
from .ood_splits import ood_split

__all__ = ["Dataset", "Split", "available_datasets", "load_dataset", "loader", "ood_split"]


def available_datasets() -> dict[str, type[Dataset]]:
    """name -> class of every data set: the modules of this package that define one."""
    found = {}
    for module in pkgutil.iter_modules(sets.__path__):
        for value in vars(importlib.import_module(f".{module.name}", sets.__name__)).values():
            here = inspect.isclass(value) and value.__module__ == f"{sets.__name__}.{module.name}"
            if here and issubclass(value, Dataset) and not inspect.isabstract(value):
                found[module.name] = value
    return found


def load_dataset(name: str, **options: Any) -> Dataset:
    """The data set of that name.

    Args:
        name: of a module in this package, such as "digits" or "av_digits".
        **options: of the data set's class, such as ``fold="B"`` and ``root="data"``.

    Raises:
        ConfigError: a name that no data set has; the closest one is given.
        DataError: data that are missing or damaged; the file is named.

    Example:
        >>> load_dataset("digits").names
        ('audio', 'image')
    """
    datasets = available_datasets()
    if name not in datasets:
        raise unknown_name("load", "data set", name, datasets)
    return datasets[name](**options)
