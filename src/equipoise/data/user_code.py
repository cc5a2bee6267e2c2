"""Data sets that a Python file named on the command line makes."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import ConfigError, DataError, EquipoiseError
from .dataset import Dataset
from .user_datasets import MapDataset

_allowed: set[str] = set()


def allow_code(sources: Iterable[str]) -> None:
    """Allows this process to run these functions, "file.py:function", which the user named on the command line."""
    _allowed.update(sources)


def allowed_code() -> tuple[str, ...]:
    """Returns the functions that this process may run, so that they can be passed to its worker processes."""
    return tuple(sorted(_allowed))


def is_code(source: str) -> bool:
    """Returns whether the text names a function in a Python file: "file.py:function"."""
    return ".py:" in source


def dataset_from_code(source: str, fold: str | None = None) -> Dataset:
    """Calls the function that makes a data set.

    It returns a ``Dataset``, or the three map-style data sets train, val and test, as a tuple or dict; see
    ``MapDataset``. A parameter ``fold`` receives the fold. It is called once per process.

    Args:
        source: "file.py:function". Only functions that ``allow_code`` allowed are run: a recipe or run folder that
            names one is data, and must not run code by itself.
        fold: name of the fold, or None.

    Raises:
        ConfigError: code that was not named on the command line. DataError: the file or function does not exist, fails,
            or returns something else.
    """
    if source not in _allowed:
        raise ConfigError(
            "data", expected="the Python file of the data set on the command line", got="a recipe that names it alone",
            fix=f"Files do not run code by themselves. If you trust it, add --data '{source}'.",
        )  # fmt: skip
    file, _, name = source.rpartition(":")
    if not Path(file).is_file():
        raise DataError(f"--data '{source}'", expected=f"a Python file '{file}'", got="none")
    function = _function(Path(file), name)
    takes_fold = "fold" in inspect.signature(function).parameters
    if fold is not None and not takes_fold:
        raise ConfigError(f"--data '{source}'", expected="no fold, since the function has no parameter fold",
                          got=f"fold '{fold}'")  # fmt: skip
    try:
        dataset = function(fold=fold) if takes_fold and fold is not None else function()
    except EquipoiseError:
        raise
    except Exception as error:
        raise DataError(f"--data '{source}'", expected="a function that returns a data set",
                        got=f"{type(error).__name__}: {error}") from error  # fmt: skip
    if isinstance(dataset, Dataset):
        return dataset
    parts = [dataset.get(key) for key in ("train", "val", "test")] if isinstance(dataset, Mapping) else dataset
    if isinstance(parts, (tuple, list)) and len(parts) == 3 and all(hasattr(one, "__getitem__") for one in parts):
        train, val, test = parts
        return MapDataset(train, val, test)  # type: ignore[arg-type]
    raise DataError(
        f"--data '{source}'", expected="a Dataset, or three map-style data sets: train, val, test",
        got=type(dataset).__name__,
    )  # fmt: skip


def _function(file: Path, name: str):
    module = sys.modules.get(f"_equipoise_data_{file.stem}")
    if module is None or getattr(module, "__file__", None) != str(file):
        spec = importlib.util.spec_from_file_location(f"_equipoise_data_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Registered, so that DataLoader workers can unpickle its classes.
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[spec.name]
            raise DataError(f"--data '{file}'", expected="a Python file that can be imported",
                            got=f"{type(error).__name__}: {error}") from error  # fmt: skip
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise DataError(f"--data '{file}:{name}'", expected=f"a function '{name}' in the file",
                        got=f"functions {', '.join(functions)}" if functions else "no function")  # fmt: skip
    return function
