"""Names to classes: a name in a recipe is looked up in its family's package, and nowhere else."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from .errors import ConfigError, EquipoiseError, ShapeError, unknown_name
from .io.typed_values import matches_type, shorten_repr, type_description

T = TypeVar("T")

PLAIN = (int, float, str, bool)
"""Annotations that errors call by their own names."""


def available_classes(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """name -> every final class of ``base`` that the package exports; the name is ``cls.name`` or the class's own.

    Example:
        >>> from equipoise import fusion
        >>> "concat" in available_classes(fusion, fusion.Fusion)
        True
    """
    classes = [c for c in vars(package).values() if inspect.isclass(c) and issubclass(c, base) and c is not base]
    return {vars(c).get("name", c.__name__.lower()): c for c in classes if not inspect.isabstract(c)}


def get_class(package: ModuleType, base: type[T], name: str, *, kind: str) -> type[T]:
    """The class of that name.

    Raises:
        ConfigError: nobody in the family has the name; the closest is given.
    """
    known = available_classes(package, base)
    if not isinstance(name, str) or name not in known:
        raise unknown_name(package.__name__, kind, shorten_repr(name), known)
    return known[name]


def instantiate(
    cls: Callable[..., T],
    who: str,
    options: Mapping[str, Any],
    /,
    *,
    takes: Callable[..., Any] | None = None,
    **given: Any,
) -> T:
    """Calls a class with options that came from a recipe, where names and types may be wrong.

    Args:
        cls: what is called.
        who: begins the error's message.
        options: from the recipe.
        takes: whose options ``cls`` hands on when it takes any name itself.
        given: what else ``cls`` gets, which a recipe cannot change.

    Raises:
        ConfigError: an option that the class does not take, lacks, or cannot use; the closest name is given.
        ConfigError, ShapeError: of the class itself, with ``who`` before its own name.

    Example:
        >>> from equipoise.encoders import SequenceEncoder
        >>> instantiate(SequenceEncoder, "encoder 'audio'", {"dim": 8}, features=3, max_length=5).dim
        8
    """
    name = getattr(cls, "__name__", "it")
    known = {*inspect.signature(cls).parameters, *(inspect.signature(takes).parameters if takes else ())} - set(given)
    for option in options:
        if option not in known:
            raise unknown_name(who, f"option of {name}", shorten_repr(option), known - {"options"})
    hints = {**(_hints(takes) if takes else {}), **_hints(cls)}
    for option, value in options.items():
        wanted: Any = hints.get(option, Any)
        if not matches_type(value, wanted):
            if wanted not in PLAIN:
                raise ConfigError(
                    who, expected=f"options that {name} takes", got=f"{option} = {_quoted(value)}",
                    fix=f"It has to be {type_description(wanted)}.",
                )  # fmt: skip
            fix = "YAML takes 1e-3 for a text; write 1.0e-3." if wanted is float and isinstance(value, str) else ""
            raise ConfigError(who, expected=f"{option} of type {wanted.__name__}", got=_quoted(value), fix=fix)
    try:
        return cls(**options, **given)
    except (ConfigError, ShapeError) as error:
        # Several of one class may stand in a recipe; the class alone does not say which one it was.
        raise type(error)(f"{who}, {error.who}", expected=error.expected, got=error.got, fix=error.fix) from error
    except (EquipoiseError, OSError):
        raise
    except Exception as error:
        # Whatever a class of torch says about a size or a number that came from a file.
        got = f"{shorten_repr(dict(options))} ({shorten_repr(str(error) or type(error).__name__)})"
        raise ConfigError(who, expected=f"options that {name} takes", got=got) from error


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the parameters, without those whose types are imported for type checkers alone."""
    target: Any = vars(function).get("__init__", function.__init__) if inspect.isclass(function) else function
    found = {}
    for name, hint in getattr(target, "__annotations__", {}).items():
        with contextlib.suppress(NameError):
            one = type("One", (), {"__annotations__": {name: hint}})
            found |= typing.get_type_hints(one, globalns=getattr(target, "__globals__", {}))
    return found


def _quoted(value: Any) -> str:
    return repr(value) if isinstance(value, str) and value.isprintable() and len(value) < 200 else shorten_repr(value)
