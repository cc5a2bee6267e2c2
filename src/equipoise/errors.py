"""Exceptions of the library. Each message names the source, the expected and actual values, and the fix.

An import error of an optional package becomes a ``MissingExtraError`` that names the extra to install.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class EquipoiseError(ValueError):
    """Base class of the errors that this library raises.

    Args:
        who: the function, class or file that raises the error, with the modality's name if there is one.
        expected: description of a valid value; sizes are given by symbol and number, as in ``"dim = 64"``.
        got: the actual value.
        fix: one sentence that describes how to fix the error.
    """

    def __init__(self, who: str, *, expected: str, got: str, fix: str = "") -> None:
        self.who, self.expected, self.got, self.fix = who, expected, got, fix
        super().__init__(f"{who}: expected {expected}, got {got}." + (f" {fix}" if fix else ""))

    def __reduce__(self):
        """Supports pickling, so that errors of worker processes can be raised in the parent process."""
        return _rebuild, (type(self), self.who, self.expected, self.got, self.fix)


class ShapeError(EquipoiseError):
    """A tensor has the wrong rank, size or type."""


class DataError(EquipoiseError):
    """Data on disk are missing, truncated or of the wrong format."""


class ConfigError(EquipoiseError):
    """A recipe, option or name does not exist or is invalid."""


class NonFiniteError(EquipoiseError):
    """A value is NaN or infinite where a finite number is required."""


class SchemaError(EquipoiseError):
    """A results file or checkpoint has an invalid or unsupported format."""


class MissingExtraError(EquipoiseError, ImportError):
    """An optional package that is not installed."""


MOST_LISTED = 100
"""Maximum number of known names that an error lists completely."""


def unknown_name(who: str, kind: str, name: str, names: Iterable[str], *, like: str | None = None) -> ConfigError:
    """Creates the error for an unknown name, listing the closest known names.

    If ``like`` is given, it is matched instead of ``name``.
    """
    names = sorted(names)
    close = difflib.get_close_matches(name if like is None else like, names, n=3, cutoff=0.5)
    listed = ", ".join(names if len(names) <= MOST_LISTED else [*names[:20], f"... ({len(names)} in all)"])
    fix = f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else f"Choose one of: {listed}."
    return ConfigError(who, expected=f"a known {kind}", got=repr(name), fix=fix)


EXTRAS = {
    "train": (
        "lightning",
        "torchmetrics",
        "sklearn",
        "scipy",
        "soundfile",
        "PIL",
        "rich",
        "yaml",
        "datasets",
    ),
    "report": ("matplotlib", "jinja2"),
    "hf": ("transformers", "accelerate", "huggingface_hub"),
    "lora": ("peft",),
    "cluster": ("submitit",),
    "search": ("optuna",),
}
"""Extra -> names of the modules that it provides, as they are imported."""

DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
"""Module -> name of its package on PyPI where the two differ."""


@contextmanager
def require_extra(who: str) -> Iterator[None]:
    """Turns the import error of an optional package into one that names the extra to install.

    Args:
        who: feature that needs the package; begins the error's message.

    Raises:
        MissingExtraError: an import in the ``with`` block fails because an optional package is not installed.

    Example:
        >>> with require_extra("eq.lightning"):
        ...     raise ModuleNotFoundError("No module named 'lightning'", name="lightning")
        Traceback (most recent call last):
        equipoise.errors.MissingExtraError: eq.lightning: expected the package 'lightning', got none installed. \
Install it: pip install 'equipoise[train]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        for extra, modules in EXTRAS.items():
            if module in modules:
                raise MissingExtraError(
                    who, expected=f"the package '{DISTRIBUTIONS.get(module, module)}'", got="none installed",
                    fix=f"Install it: pip install 'equipoise[{extra}]'",
                ) from error  # fmt: skip
        raise


def _rebuild(cls, who, expected, got, fix):
    return cls(who, expected=expected, got=got, fix=fix)
