"""Registry of classes: finds and instantiates the classes that recipes refer to by name."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from ..errors import ConfigError, EquipoiseError, ShapeError, unknown_name
from .typed_values import matches_type, shorten_repr, type_description

T = TypeVar("T")

PLAIN = (int, float, str, bool)
"""Types that error messages mention by name."""


def available_classes(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """Returns name -> class for every concrete subclass of ``base`` that a package exports.

    The name is ``cls.name`` or, by default, the lower-case class name.

    Example:
        >>> from equipoise import fusion
        >>> "concat" in available_classes(fusion, fusion.Fusion)
        True
    """
    classes = [c for c in vars(package).values() if inspect.isclass(c) and issubclass(c, base) and c is not base]
    return {vars(c).get("name", c.__name__.lower()): c for c in classes if not inspect.isabstract(c)}


def get_class(package: ModuleType, base: type[T], name: str, *, kind: str) -> type[T]:
    """Returns the class with the given name.

    Raises:
        ConfigError: the name is unknown; the message lists the closest names.
    """
    classes = available_classes(package, base)
    if not isinstance(name, str) or name not in classes:
        raise unknown_name(package.__name__, kind, shorten_repr(name), classes)
    return classes[name]


def instantiate(
    cls: Callable[..., T],
    who: str,
    options: Mapping[str, Any],
    /,
    *,
    takes: Callable[..., Any] | None = None,
    **given: Any,
) -> T:
    """Instantiates a class with options from a recipe, after checking their names and types.

    Args:
        cls: the class or function to call.
        who: first part of the error messages.
        options: options of the recipe.
        takes: the class or function that receives the keyword arguments which ``cls`` passes on.
        given: further keyword arguments of ``cls``, which a recipe cannot set.

    Raises:
        ConfigError: an option is unknown, missing or invalid; the message lists the closest names.
        ConfigError, ShapeError: raised by the class; ``who`` is prepended to the message.

    Example:
        >>> from equipoise.encoders import SequenceEncoder
        >>> instantiate(SequenceEncoder, "encoder 'audio'", {"dim": 8}, features=3, max_length=5).dim
        8
    """
    name = getattr(cls, "__name__", "it")
    parameters = {*inspect.signature(cls).parameters, *(inspect.signature(takes).parameters if takes else ())} - set(
        given
    )
    for option in options:
        if option not in parameters:
            raise unknown_name(who, f"option of {name}", shorten_repr(option), parameters - {"options"})
    hints = {**(_hints(takes) if takes else {}), **_hints(cls)}
    for option, value in options.items():
        expected_type: Any = hints.get(option, Any)
        if not matches_type(value, expected_type):
            if expected_type not in PLAIN:
                raise ConfigError(
                    who, expected=f"options that {name} takes", got=f"{option} = {_quoted(value)}",
                    fix=f"It has to be {type_description(expected_type)}.",
                )  # fmt: skip
            fix = (
                "YAML parses 1e-3 as a string; write 1.0e-3."
                if expected_type is float and isinstance(value, str)
                else ""
            )
            raise ConfigError(who, expected=f"{option} of type {expected_type.__name__}", got=_quoted(value), fix=fix)
    try:
        return cls(**options, **given)
    except (ConfigError, ShapeError) as error:
        # A recipe may contain several instances of a class, so the class name alone does not identify the entry.
        raise type(error)(f"{who}, {error.who}", expected=error.expected, got=error.got, fix=error.fix) from error
    except (EquipoiseError, OSError):
        raise
    except Exception as error:
        # Classes of torch raise various exceptions for invalid sizes and numbers.
        got = f"{shorten_repr(dict(options))} ({shorten_repr(str(error) or type(error).__name__)})"
        raise ConfigError(who, expected=f"options that {name} takes", got=got) from error


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the type hints of the parameters, except types that are imported for type checking only."""
    target: Any = vars(function).get("__init__", function.__init__) if inspect.isclass(function) else function
    target = inspect.unwrap(target)
    classes = {}
    for name, hint in getattr(target, "__annotations__", {}).items():
        with contextlib.suppress(NameError):
            one = type("One", (), {"__annotations__": {name: hint}})
            classes |= typing.get_type_hints(one, globalns=getattr(target, "__globals__", {}))
    return classes


def _quoted(value: Any) -> str:
    return repr(value) if isinstance(value, str) and value.isprintable() and len(value) < 200 else shorten_repr(value)
