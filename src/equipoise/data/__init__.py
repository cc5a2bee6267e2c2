"""Data sets: built-in ones by name, tables, tensors, map-style data sets of torch; reproducible batches of them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from ..errors import ConfigError, unknown_name
from . import sets
from .batch_loader import loader
from .dataset import Dataset, Split
from .ood_splits import ood_split
from .sets.stream import StreamDataset
from .tables import Manifest
from .user_datasets import MapDataset, TensorDataset

__all__ = [
    "Dataset",
    "Manifest",
    "MapDataset",
    "Split",
    "StreamDataset",
    "TensorDataset",
    "available_datasets",
    "load_dataset",
    "loader",
    "ood_split",
]


def available_datasets() -> dict[str, type[Dataset]]:
    """Returns {name: class} of all built-in data sets; the name is that of the module in ``equipoise.data.sets``."""
    classes = {}
    for module in pkgutil.iter_modules(sets.__path__):
        for value in vars(importlib.import_module(f".{module.name}", sets.__name__)).values():
            is_local = inspect.isclass(value) and value.__module__ == f"{sets.__name__}.{module.name}"
            if is_local and issubclass(value, Dataset) and not inspect.isabstract(value):
                classes[module.name] = value
    return classes


def load_dataset(name: str, *, streaming: bool = False, **options: Any) -> Dataset:
    """Loads a built-in data set.

    Args:
        name: such as "digits" or "av_digits".
        streaming: read a table ("manifest") in order with bounded memory: the data set "stream".
        **options: arguments of the data set's class, such as ``fold="B"`` and ``root="data"``.

    Raises:
        ConfigError: unknown name; the message lists the closest ones.
        DataError: files are missing or damaged; the message names the file.

    Example:
        >>> load_dataset("digits").names
        ('audio', 'image')
    """
    datasets = available_datasets()
    if streaming and name not in ("manifest", "stream"):
        raise ConfigError("load", expected="streaming only for a table, 'manifest'", got=f"'{name}'")
    name = "stream" if streaming else name
    if name not in datasets:
        raise unknown_name("load", "data set", name, datasets)
    return datasets[name](**options)
