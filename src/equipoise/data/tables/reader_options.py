"""Options of the readers of modalities: their types and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError, unknown_name
from ...io.typed_values import matches_type, shorten_repr, type_description

LIMITS: Mapping[str, tuple[type, float, float]] = {
    "size": (int, 1, 4_096), "frames": (int, 1, 1_024), "seconds": (float, 0.01, 3_600), "bands": (int, 1, 512),
    "length": (int, 1, 1_000_000),
}  # fmt: skip
"""Name -> type, smallest and largest value."""
OPTIONS: Mapping[str, Mapping[str, tuple[type, float, float] | type]] = {
    "audio": {"rate": (int, 100, 768_000), "seconds": LIMITS["seconds"], "bands": LIMITS["bands"]},
    "image": {"size": LIMITS["size"], "mean": list[float], "std": list[float]},
    "video": {"frames": LIMITS["frames"], "size": LIMITS["size"]},
    "frames": {"frames": LIMITS["frames"], "size": LIMITS["size"]},
    "sequence": {"length": LIMITS["length"], "rate": (float, 1e-6, 1e9), "times": str},
    "text": {"length": LIMITS["length"], "tokenizer": str},
    "array": {}, "vector": {}, "number": {}, "category": {}, "table": {}, "ignore": {},
}  # fmt: skip
"""Kind -> its options."""
SEVERAL = ("vector", "number", "category", "table")
"""Kinds that can have more than one column."""


def check_columns(name: str, kind: str, value: Any, columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the columns of a modality.

    Raises:
        ConfigError: unknown or repeated columns, or several for a kind that has one.
    """
    who = f"modality '{shorten_repr(name)}'"
    if not matches_type(value, list[str]) or not value or len(set(value)) < len(value):
        raise ConfigError(who, expected="a list of different columns", got=shorten_repr(value))
    for column in value:
        if column not in columns:
            raise unknown_name(who, "column", column, columns)
    if len(value) > 1 and kind not in SEVERAL:
        raise ConfigError(who, expected=f"one column of {kind}", got=f"{len(value)}")
    return tuple(value)


def check_options(name: str, kind: str, options: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Checks the names, types and ranges of the options of one modality.

    Raises:
        ConfigError: an unknown option, or a value out of range.
    """
    who = f"modality '{shorten_repr(name)}'"
    for option, value in options.items():
        if option not in OPTIONS[kind]:
            raise unknown_name(who, f"option of {kind}", shorten_repr(option), OPTIONS[kind])
        rule = OPTIONS[kind][option]
        hint, least, most = rule if isinstance(rule, tuple) else (rule, -math.inf, math.inf)
        if not matches_type(value, hint):
            raise ConfigError(f"{who}, {option}", expected=type_description(hint), got=shorten_repr(value))
        if option in ("mean", "std") and (len(value) not in (1, 3) or (option == "std" and min(value) <= 0)):
            limit = " > 0" if option == "std" else ""
            raise ConfigError(f"{who}, {option}", expected=f"three numbers{limit}", got=shorten_repr(value))
        if hint in (int, float) and not least <= value <= most:
            raise ConfigError(f"{who}, {option}", expected=f"{least:,} to {most:,}", got=shorten_repr(value))
        if option == "times" and value not in columns:
            raise unknown_name(f"{who}, times", "column", value, columns)
