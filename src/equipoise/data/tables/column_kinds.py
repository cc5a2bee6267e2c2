"""Recognizes what the columns of a table contain, and groups them into modalities."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ...errors import ConfigError, unknown_name
from ...io.typed_values import shorten_repr
from .reader_options import check_columns, check_options

if TYPE_CHECKING:
    import datasets

Kind = Literal[
    "audio", "image", "video", "frames", "text", "vector", "sequence", "array", "number", "category", "ignore"
]
KINDS: tuple[str, ...] = get_args(Kind)

EXTENSIONS: dict[str, tuple[str, ...]] = {
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "video": (".mp4", ".avi", ".mov", ".mkv", ".webm", ".flv", ".mpg", ".mpeg", ".wmv"),
}
LOOKED_AT = 200
"""Number of cells that decide the kind of a column."""
TABLE = "table"
"""Name of the modality of all number and category columns without a common prefix."""
IDENTIFIERS = {"", "id", "idx", "index", "uid", "uuid", "key", "unnamed: 0"}


@dataclass(frozen=True)
class Modality:
    """A modality of a table: its columns, their kind, and options of its reader.

    Args:
        kind: kind of all its columns; "table" for a mixture of numbers and categories.
        columns: column names, in the order of the table.
        options: such as ``rate`` of audio, ``size`` of images, ``length`` of sequences and texts, ``times`` of
            sequences.
    """

    kind: str
    columns: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as a recipe holds them under ``data.modalities``."""
        columns = {"column": self.columns[0]} if len(self.columns) == 1 else {"columns": list(self.columns)}
        return {"kind": self.kind, **columns, **self.options}


def column_kind(table: datasets.Dataset, column: str, root: Path) -> Kind:
    """Recognizes the kind of one column from its type and up to ``LOOKED_AT`` of its cells."""
    import datasets

    feature = table.features[column]
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.Audio):
        return "audio"
    if type(feature).__name__ == "Video":
        return "video"
    if isinstance(feature, datasets.ClassLabel):
        return "category"
    if isinstance(feature, datasets.Array2D):
        return "sequence"
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        inner = feature.feature
        if isinstance(inner, datasets.Value):
            return "category" if inner.dtype == "string" else "vector"
        return "sequence"
    if not isinstance(feature, datasets.Value):
        return "ignore"
    if feature.dtype == "null":
        return "ignore"
    if feature.dtype not in ("string", "large_string"):
        is_integer = feature.dtype.startswith(("int", "uint"))
        return "ignore" if is_integer and _is_identifier(column, _cells(table, column)) else "number"
    return _string_kind(column, _cells(table, column), root)


def _cells(table: datasets.Dataset, column: str) -> list[Any]:
    rows = np.unique(np.linspace(0, len(table) - 1, min(len(table), 5 * LOOKED_AT)).astype(int))
    cells = table.with_format(None).select_columns([column])[rows.tolist()][column]
    return [cell for cell in cells if cell is not None]


def _is_identifier(column: str, cells: Sequence[Any]) -> bool:
    return column.strip().casefold() in IDENTIFIERS and len(set(cells)) == len(cells)


def _string_kind(column: str, cells: Sequence[str], root: Path) -> Kind:
    if not cells:
        return "ignore"
    looked = cells[:LOOKED_AT]
    suffixes = {Path(cell).suffix.lower() for cell in looked}
    for kind, extensions in EXTENSIONS.items():
        if suffixes <= set(extensions):
            return kind  # type: ignore[return-value]
    if suffixes == {".npy"}:
        return _array_kind(looked, root)
    if suffixes == {""} and all((root / cell).is_dir() for cell in looked[:20]):
        return "frames"
    if _is_identifier(column, cells):
        return "ignore"
    words = sum(len(cell.split()) for cell in looked) / len(looked)
    few = len(set(cells)) <= max(20, len(cells) // 20)
    if few and words < 4:
        return "category"
    if len(set(cells)) == len(cells) and words == 1:
        return "ignore"
    return "text"


def _array_kind(cells: Sequence[str], root: Path) -> Kind:
    for cell in cells:
        try:
            ndim = np.load(root / cell, mmap_mode="r", allow_pickle=False).ndim
        except (OSError, ValueError, EOFError):
            continue
        return {1: "vector", 2: "sequence", 3: "image"}.get(ndim, "frames")  # type: ignore[return-value]
    return "vector"


def find_modalities(
    table: datasets.Dataset, root: Path, *, exclude: set[str], kinds: Mapping[str, Any]
) -> tuple[dict[str, Modality], dict[str, str]]:
    """Groups the columns of a table into modalities.

    Columns of files, texts, sequences and arrays are a modality each. Number columns with a common prefix and a number
    at the end, such as ``imu_0, imu_1``, form one vector; the remaining numbers and categories form the modality
    "table".

    Args:
        table: table with one row per sample.
        root: folder that relative paths refer to.
        exclude: columns that are no input: target, group, split, weight.
        kinds: column or prefix -> kind, or a dict with "kind" and options of the reader.

    Returns:
        name -> Modality, and column -> reason for the columns that are not used.

    Raises:
        ConfigError: unknown kind or column, or no column is left.
    """
    columns = [name for name in table.column_names if name not in exclude]
    prefixes: dict[str, list[str]] = {}
    for column in columns:
        if match := re.fullmatch(r"(.*?[^\d._\- ])[._\- ]?\d+", column):
            prefixes.setdefault(match[1], []).append(column)
    given_kinds = _given("kinds", kinds, columns)
    for name in given_kinds:
        if name not in columns and name not in prefixes:
            raise unknown_name("Manifest kinds", "column", str(name), columns)
    times = {str(options["times"]) for _, options in given_kinds.values() if "times" in options}
    kind_of = {
        c: given_kinds[c][0] if c in given_kinds else column_kind(table, c, root) for c in columns if c not in times
    }
    result: dict[str, Modality] = {}
    unused = {column: "not used" for column, kind in kind_of.items() if kind == "ignore"}
    plain: list[str] = []
    grouped: set[str] = set()
    for prefix, members in prefixes.items():
        numbers = [c for c in members if kind_of.get(c) == "number" and c not in given_kinds]
        if prefix in given_kinds and given_kinds[prefix][0] == "ignore":
            unused |= dict.fromkeys(numbers, "not used")
            grouped |= set(numbers)
        elif len(numbers) > 1:
            kind, options = given_kinds.get(prefix, ("vector", {}))
            check_columns(prefix, kind, numbers, columns)
            result[_name(prefix, result)] = Modality(kind, tuple(numbers), options)
            grouped |= set(numbers)
    for column, kind in kind_of.items():
        if kind == "ignore" or column in grouped:
            continue
        options = given_kinds[column][1] if column in given_kinds else {}
        if kind in ("number", "category") and not options:
            plain.append(column)
        else:
            result[_name(column, result)] = Modality(kind, (column,), options)
    if plain:
        same = {kind_of[column] for column in plain}
        name = plain[0] if len(plain) == 1 else TABLE
        result[_name(name, result)] = Modality(same.pop() if len(same) == 1 else "table", tuple(plain))
    if not result:
        raise ConfigError(
            "Manifest", expected="at least one column of inputs", got=f"columns {', '.join(table.column_names)}",
            fix="Name the kind of a column with kinds={'column': 'text'} or --kind column=text.",
        )  # fmt: skip
    order = {column: index for index, column in enumerate(table.column_names)}
    return dict(sorted(result.items(), key=lambda item: order[item[1].columns[0]])), unused


def modalities_from_options(content: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Modality]:
    """Builds modalities from ``data.modalities`` of a recipe.

    Raises:
        ConfigError: unknown kind or column.
    """
    result = {}
    for name, (kind, options) in _given("modalities", content, columns, extra=("column", "columns")).items():
        one, several = options.pop("column", None), options.pop("columns", None)
        names = check_columns(name, kind, [one] if one is not None else [name] if several is None else several, columns)
        if kind != "ignore":
            result[_name(name, result)] = Modality(kind, names, options)
    if not result:
        raise ConfigError("Manifest modalities", expected="at least one that is not ignored", got="none")
    return result


def _given(
    who: str, content: Any, columns: Sequence[str], extra: Sequence[str] = ()
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns name -> (kind, options), with checked options."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ConfigError(
            f"Manifest {who}", expected="a kind, or a mapping with a kind, for each name", got=shorten_repr(content)
        )
    result = {}
    for name, value in content.items():
        options = dict(value) if isinstance(value, Mapping) else {"kind": value}
        kind = options.pop("kind", None)
        if kind not in (*KINDS, TABLE):
            raise unknown_name(f"column '{shorten_repr(name)}'", "kind", shorten_repr(kind), KINDS)
        check_options(name, kind, {key: part for key, part in options.items() if key not in extra}, columns)
        result[name] = (kind, options)
    return result


RESERVED = {"mask", "times", "target", "index", "weight"}


def _name(column: str, used: Mapping[str, Any]) -> str:
    """Returns a modality name that a batch and a ModuleDict accept."""
    from torch import nn

    name = re.sub(r"[^\w-]", "_", column).strip("_") or "input"
    while name in used or name in RESERVED or hasattr(nn.ModuleDict, name):
        name += "_"
    return name
