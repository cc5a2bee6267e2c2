"""Schema of ``results.json``, checked before tables and reports use it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..errors import SchemaError
from ..io.typed_values import matches_type, shorten_repr, type_description
from .significance import Outcomes, unpack_outcomes

SCHEMA = 1  # files of another version are rejected
AGAIN = "Write it again with equipoise compare, or read it with the version that wrote it."

RUN = {"method": str, "seed": int, "fold": str | None, "metrics": dict[str, float | None]}
RUN_MAY = {"history": list[Any], "noise_modality": str | None, "keys": dict[str, Any],
           "shares": dict[str, Any], "outcomes": dict[str, str | list[float | None]],
           "intervals": dict[str, list[float]], "resamples": dict[str, str], "undefined": dict[str, str],
           "bootstrap": dict[str, Any], "groups": str}  # fmt: skip
ENTRY = {"epoch": float, "loss": float | None, "share": dict[str, float | None], "air": float | None,
         "rotations": float | None, "balance": dict[str, Any]}  # fmt: skip
ROW = {"method": str, "metric": str, "mean": float, "sd": float | None, "n": int, "difference": float | None,
       "p": float | None}  # fmt: skip
ROW_MAY = {"low": float | None, "high": float | None, "pairs": int, "higher": int, "reference": str | None}
PROTOCOL = {"recipe": str | None, "data": str | None, "methods": list[str] | None, "modalities": list[str] | None,
            "noise_modality": str | None, "score": str | None, "metrics": list[str] | None}  # fmt: skip
KEYS = {"cosine_mean": float | None, "cosine_std": float | None, "norm_mean": float | None, "norm_std": float | None}


def check_results(content: Any, who: str) -> None:
    """Checks the whole content of ``results.json``.

    Raises:
        SchemaError: unknown schema, missing entries, or an entry of the wrong type.
    """
    _require(content, ("schema",), who)
    if content["schema"] != SCHEMA:
        raise SchemaError(who, expected=f"schema {SCHEMA}", got=f"schema {shorten_repr(content['schema'])}", fix=AGAIN)
    kinds = {"protocol": Mapping, "environment": Mapping, "runs": list, "summary": list}
    _require(content, tuple(kinds), who)
    for key, kind in kinds.items():
        if not isinstance(content[key], kind):
            raise SchemaError(f"{who}, {key}", expected=kind.__name__, got=type(content[key]).__name__, fix=AGAIN)
    _typed(content["protocol"], PROTOCOL, f"{who}, protocol")
    for index, run in enumerate(content["runs"]):
        check_run(run, f"{who}, run {index}")
    for index, row in enumerate(content["summary"]):
        _require(row, tuple(ROW), f"{who}, summary row {index}")
        _typed(row, {**ROW, **ROW_MAY}, f"{who}, summary row {index}")


def check_run(run: Any, who: str) -> None:
    """Checks one run of ``results.json`` or ``run.json``.

    Raises:
        SchemaError: missing entries, or an entry of the wrong type.
    """
    _require(run, tuple(RUN), who)
    _typed(run, {**RUN, **RUN_MAY}, who)
    for index, entry in enumerate(run.get("history") or ()):
        _require(entry, (), f"{who}, history {index}")
        _typed(entry, ENTRY, f"{who}, history {index}")
    for moment, kinds in (run.get("keys") or {}).items():
        for kind, modalities in _parts(kinds, f"{who}, keys.{moment}"):
            for name, keys in _parts(modalities, f"{who}, keys.{moment}.{kind}"):
                where = f"{who}, keys.{moment}.{kind}.{name}"
                _require(keys, ("cosine",), where)
                _typed(keys, KEYS, where)
                _histogram(keys["cosine"], f"{where}.cosine")
    for kind, histogram in (run.get("shares") or {}).items():
        _histogram(histogram, f"{who}, shares.{kind}")
    for metric, packed in run.get("outcomes", {}).items():
        _outcomes(packed, f"{who}, outcomes.{metric}")
    for metric, packed in run.get("resamples", {}).items():
        _outcomes(packed, f"{who}, resamples.{metric}")
    if "groups" in run:
        _outcomes(run["groups"], f"{who}, groups")
    for metric, ends in run.get("intervals", {}).items():
        if len(ends) != 2 or ends[0] > ends[1]:
            raise SchemaError(
                f"{who}, intervals.{metric}", expected="a lower and an upper end", got=shorten_repr(ends), fix=AGAIN
            )


def _parts(part: Any, who: str) -> list[tuple[str, Any]]:
    if part is None:
        return []
    _require(part, (), who)
    return list(part.items())


def _histogram(part: Any, who: str) -> None:
    _require(part, ("edges", "counts"), who)
    edges, counts = part["edges"], part["counts"]
    numbers = matches_type(edges, list[float]) and matches_type(counts, list[float])
    rises = numbers and all(low < high for low, high in pairwise(edges))
    empty = numbers and not edges and not counts
    if not (empty or (rises and counts and len(edges) == len(counts) + 1 and min(counts) >= 0)):
        raise SchemaError(who, expected="n + 1 increasing edges and n counts", got=shorten_repr(part), fix=AGAIN)


def _outcomes(packed: Outcomes, who: str) -> None:
    try:
        unpack_outcomes(packed)
    except ValueError as error:
        raise SchemaError(
            who, expected="0, 1 or - for each sample, or numbers", got=shorten_repr(packed), fix=AGAIN
        ) from error


def _typed(part: Mapping[str, Any], kinds: Mapping[str, Any], who: str) -> None:
    for key, kind in kinds.items():
        if key in part and not matches_type(part[key], kind):
            name = {str: "str", int: "int"}.get(kind, type_description(kind))
            got = type(part[key]).__name__ if kind is str else shorten_repr(part[key])
            raise SchemaError(f"{who}, {key}", expected=name, got=got, fix=AGAIN)


def _require(part: Any, keys: tuple[str, ...], who: str) -> None:
    if not isinstance(part, Mapping):
        raise SchemaError(who, expected="a mapping", got=type(part).__name__, fix=AGAIN)
    if missing := [key for key in keys if key not in part]:
        got = f"none called {', '.join(missing)}"
        raise SchemaError(who, expected=f"the entries {', '.join(keys)}", got=got, fix=AGAIN)
