"""Pairs of columns, such as images and their captions: modalities, complete rows, and which rows match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError, DataError, unknown_name
from .column_kinds import Modality, column_kind, find_modalities

if TYPE_CHECKING:
    import datasets

FILES = ("audio", "image", "video", "frames", "sequence", "array", "vector")


def pair_modalities(
    table: datasets.Dataset, root: Path, pair: Sequence[str], kinds: Mapping[str, Any], exclude: set[str]
) -> tuple[dict[str, Modality], dict[str, str]]:
    """Returns the modalities of the columns of a pair, and column -> reason for the other columns.

    A column of strings that are no files is a text, even if few of them differ.

    Args:
        table, root, kinds, exclude: see ``find_modalities``.
        pair: columns, or prefixes of number columns such as ``imu`` for ``imu_0, imu_1``.

    Raises:
        ConfigError: fewer than two columns, an unknown or repeated one, or one that is excluded.
        DataError: a column without any value.
    """
    if len(pair) < 2 or len(set(pair)) < len(pair):
        raise ConfigError(
            "pair", expected="two or more different columns", got=", ".join(pair) or "none",
            fix="For example: --pair image,text.",
        )  # fmt: skip
    if taken := exclude & set(pair):
        raise ConfigError("pair", expected="columns without another use", got=f"'{min(taken)}'")
    for name in kinds:
        if name not in pair and name not in table.column_names:
            raise unknown_name("Manifest kinds", "column", str(name), table.column_names)
    options = {name: dict(one) if isinstance(one, Mapping) else {"kind": one} for name, one in kinds.items()}
    times = {str(one["times"]) for one in options.values() if "times" in one}
    result: dict[str, Modality] = {}
    for name in pair:
        columns = {name} if name in table.column_names else {c for c in table.column_names if c.startswith(name)}
        if not columns:
            raise unknown_name("pair", "column", name, table.column_names)
        chosen = {name: options[name]} if name in options else {}
        if name in columns and "kind" not in chosen.get(name, {}):
            chosen[name] = {**chosen.get(name, {}), "kind": _kind(table, name, root)}
        keep = columns | (times & set(table.column_names) if "times" in chosen.get(name, {}) else set())
        modalities, _ = find_modalities(table, root, exclude=set(table.column_names) - keep, kinds=chosen)
        if len(modalities) != 1:
            raise unknown_name("pair", "column", name, table.column_names)
        result |= modalities
    used = {column for one in result.values() for column in one.columns} | times | exclude
    return result, {column: "not in the pair" for column in table.column_names if column not in used}


def _kind(table: datasets.Dataset, column: str, root: Path) -> str:
    kind = column_kind(table, column, root)
    strings = getattr(table.features[column], "dtype", "") in ("string", "large_string")
    if kind in ("category", "ignore") and strings and any(table[column][:]):
        return "text"
    if kind == "ignore":
        if getattr(table.features[column], "dtype", "null") in ("null", "string", "large_string"):
            raise DataError(f"column '{column}'", expected="values in some rows", got="empty cells only")
        return "number"
    return kind


def complete_rows(table: datasets.Dataset, modalities: Mapping[str, Modality]) -> np.ndarray:
    """Returns the rows that have all modalities; a modality of several columns needs a value in one of them.

    Raises:
        DataError: no row has all, with the number of rows that have each.
    """
    present = {name: _present(table, one.columns) for name, one in modalities.items()}
    rows = np.flatnonzero(np.all(list(present.values()), axis=0))
    if not len(rows):
        counts = ", ".join(f"'{name}' in {int(one.sum())}" for name, one in present.items())
        raise DataError(
            "pair",
            expected=f"rows with both {' and '.join(present)}" if len(present) == 2 else "rows with all columns",
            got=f"none of {len(table)} rows ({counts})",
            fix="Fill the cells: both sides of a pair are in one row.",
        )
    return rows


def _present(table: datasets.Dataset, columns: Sequence[str]) -> np.ndarray:
    present = np.zeros(len(table), dtype=bool)
    for column in columns:
        cells = table[column][:]
        present |= np.array([not is_blank(cell) for cell in cells])
    return present


def is_blank(cell: Any) -> bool:
    """Returns whether a cell has no value: None, NaN, a text of spaces, or an empty list."""
    if isinstance(cell, (list, dict)):
        return not cell
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def matching_rows(table: datasets.Dataset, modalities: Mapping[str, Modality]) -> np.ndarray:
    """Returns a number for each row, equal for rows that match: those with the same text or the same file.

    Texts are the same if their words are, whatever the case and punctuation. Rows that match a common row match.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows, nodes, size = [np.arange(len(table))], [np.arange(len(table))], len(table)
    for one in modalities.values():
        codes = shared_cells(table, one)
        if codes is not None:
            rows.append(np.flatnonzero(codes >= 0))
            nodes.append(codes[codes >= 0] + size)
            size += len(table)
    edges = np.concatenate(rows), np.concatenate(nodes)
    graph = coo_matrix((np.ones(len(edges[0]), dtype=bool), edges), shape=(size, size))
    component = connected_components(graph, directed=False)[1][: len(table)]
    return np.unique(component, return_inverse=True)[1]


def shared_cells(table: datasets.Dataset, modality: Modality) -> np.ndarray | None:
    """Returns a number for each row, equal for equal texts or files, -1 for empty cells; None for other kinds."""
    column, *others = modality.columns
    if others or modality.kind not in (*FILES, "text"):
        return None
    key = _text_key if modality.kind == "text" else _file_key
    number: dict[Any, int] = {}
    codes = [number.setdefault(name, len(number)) if (name := key(cell)) is not None else -1
             for cell in table[column][:]]  # fmt: skip
    return np.array(codes, dtype=np.int64)


def _text_key(cell: Any) -> Any:
    from ..sets.word_vocabulary import split_words

    text = "" if cell is None else str(cell)
    return tuple(split_words(text)) or text.strip() or None


def _file_key(cell: Any) -> Any:
    if isinstance(cell, dict):
        cell = cell.get("path") or cell.get("bytes")
    return cell if isinstance(cell, (str, bytes)) and cell else None
