"""Checks plain values from YAML and JSON files against type annotations, without importing or converting anything."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

NAMES = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "nothing",
    dict: "a mapping", list: "a list", Any: "a number, a text, a list or a mapping",
}  # fmt: skip

LARGEST = 2**63 - 1
"""Largest integer that fits into a tensor."""


def is_plain(value: Any) -> bool:
    """Returns whether the value consists of numbers, strings, booleans, None, lists, and mappings with string keys."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(key) and is_plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(part) for part in value)
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in value)
    if isinstance(value, int):
        return abs(value) <= LARGEST
    return value is None or (isinstance(value, float) and not math.isnan(value))


def matches_type(value: Any, hint: Any) -> bool:
    """Returns whether a plain value is valid for a parameter with this annotation.

    Integers match ``float``; booleans match ``bool`` only. No value matches an annotation that a file cannot express,
    such as a module or a function.

    Example:
        >>> matches_type(3, float), matches_type(True, int)
        (True, False)
        >>> matches_type([1, 2], tuple[int, int]), matches_type(None, str | None)
        (True, True)
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return is_plain(value)
    if origin in (Union, types.UnionType):
        return any(matches_type(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(literal) and value == literal for literal in parts)
    kind = origin or hint
    if kind is tuple and parts and parts[-1] is not ...:
        same = isinstance(value, (list, tuple)) and len(value) == len(parts)
        return same and all(matches_type(item, part) for item, part in zip(value, parts, strict=True))
    if kind in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(
            matches_type(item, parts[0] if parts else Any) for item in value
        )
    if kind in (dict, Mapping):
        key, part = parts or (str, Any)
        return isinstance(value, Mapping) and all(
            matches_type(k, key) and matches_type(v, part) for k, v in value.items()
        )
    if not is_plain(value) or (isinstance(value, bool) and kind is not bool):
        return False
    if kind is Path:
        return isinstance(value, (str, Path))
    return kind in NAMES and isinstance(value, (int, float) if kind is float else kind)


def type_description(hint: Any) -> str:
    """Describes an annotation in words, such as "a number or nothing"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_description(part) for part in parts))
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple and parts and parts[-1] is not ...:
        return f"a list of {len(parts)}"
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        return "a list"
    return NAMES.get(dict if kind is Mapping else str if kind is Path else kind, "a value that a file can hold")


def shorten_repr(value: Any) -> str:
    """Formats any value on one short line.

    Example:
        >>> shorten_repr("two"), shorten_repr({"a": [1]}), shorten_repr("a\\nb")
        ('two', "{'a': [1]}", "'a\\\\nb'")
    """
    try:
        text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    except (ValueError, RecursionError):  # integers with thousands of digits; recursive lists
        text = f"{type(value).__name__} of too many parts to show"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= 200 else f"{text[:200]}..."
