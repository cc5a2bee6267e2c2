"""One family of exceptions; each message says who complains, what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EquipoiseError(ValueError):
    """Base of every error this library raises on purpose.

    Args:
        who: the function, class or file that complains, with the modality's name where there is one.
        expected: what would have been right; symbolic sizes with their numbers, as in ``"dim = 64"``.
        got: what came instead.
        fix: one sentence that tells what to do.
    """

    def __init__(self, who: str, *, expected: str, got: str, fix: str = "") -> None:
        self.who, self.expected, self.got, self.fix = who, expected, got, fix
        super().__init__(f"{who}: expected {expected}, got {got}." + (f" {fix}" if fix else ""))

    def __reduce__(self):
        """Survives pickling, so that an error in a worker process reaches its parent whole."""
        return _rebuild, (type(self), self.who, self.expected, self.got, self.fix)


class ShapeError(EquipoiseError):
    """A tensor of the wrong rank, size or type."""


class DataError(EquipoiseError):
    """Data on disk that are missing, truncated or not what they claim to be."""


class ConfigError(EquipoiseError):
    """A recipe, option or name that does not exist or does not fit."""


class NonFiniteError(EquipoiseError):
    """NaN or infinity where a finite number is needed."""


class SchemaError(EquipoiseError):
    """A results file or checkpoint written by another version."""


class MissingExtraError(EquipoiseError, ImportError):
    """An optional package that is not installed."""


MOST_LISTED = 100
"""Names that are listed whole; of the words of a data set the first few do."""


def unknown_name(who: str, kind: str, name: str, known: Iterable[str], *, like: str | None = None) -> ConfigError:
    """The error for a name that nobody has, with the closest names that somebody has; ``like`` is compared for it."""
    known = sorted(known)
    close = difflib.get_close_matches(name if like is None else like, known, n=3, cutoff=0.5)
    listed = ", ".join(known if len(known) <= MOST_LISTED else [*known[:20], f"... ({len(known)} in all)"])
    fix = f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else f"Choose one of: {listed}."
    return ConfigError(who, expected=f"a known {kind}", got=repr(name), fix=fix)


def _rebuild(cls, who, expected, got, fix):
    return cls(who, expected=expected, got=got, fix=fix)
