"""Assigns the rows of a table to train, val and test."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ...errors import ConfigError, DataError

NAMES = {
    "train": "train", "training": "train", "tr": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test", "te": "test",
}  # fmt: skip


def split_rows(
    size: int, *, split: Sequence[str | None] | None, group: Sequence[object] | None, classes: np.ndarray | None,
    folds: int, fold: int, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Assigns rows to train, val and test.

    A split column decides where it has all three names. Missing parts are taken from the training rows: one of
    ``folds`` equal parts for each, without a group in two parts and with the class frequencies of the whole where the
    target is a class.

    Args:
        size: number of rows.
        split: name of the split of each row, or None.
        group: group of each row, such as the speaker; rows of a group stay together. None without groups.
        classes: (size,) class of each row for stratification, or None.
        folds: number of equal parts; the test part is part number ``fold``.
        fold: 0 to folds - 1.
        seed: seed of the assignment.

    Returns:
        {"train": rows, "val": rows, "test": rows}, each in the order of the table.

    Raises:
        ConfigError: fewer than 3 folds, or an unknown fold. DataError: unknown split names, or a part without rows.
    """
    if folds < 3 or not 0 <= fold < folds:
        raise ConfigError(
            "Manifest", expected="folds >= 3 and 0 <= fold < folds", got=f"folds = {folds}, fold = {fold}"
        )
    if not 0 <= seed < 2**32:
        raise ConfigError("Manifest", expected="a seed from 0 to 2**32 - 1", got=f"{seed}")
    labels = np.array(["train"] * size, dtype=object) if split is None else _split_names(split)
    for name in ("test", "val"):
        if not (labels == name).any():
            rest = np.flatnonzero(labels == "train")
            part = _part(rest, group, classes, folds, fold if name == "test" else fold % (folds - 1), seed)
            labels[part] = name
    result = {name: np.flatnonzero(labels == name) for name in ("train", "val", "test")}
    for name, rows in result.items():
        if not len(rows):
            raise DataError(
                "Manifest", expected="rows in train, val and test", got=f"none in {name} of {size} rows",
                fix="Add rows or groups, or name the split of each row in a column and give it as split.",
            )  # fmt: skip
    if split is not None and group is not None:
        _warn_of_shared_groups(result, group)
    return result


def _split_names(split: Sequence[str | None]) -> np.ndarray:
    names = [NAMES.get(str(name).strip().casefold()) for name in split]
    if None in names:
        bad = split[names.index(None)]
        raise DataError(
            "Manifest split", expected="train, val or test in every row of the split column",
            got=f"{bad!r} in row {names.index(None)}",
        )  # fmt: skip
    if "train" not in names:
        raise DataError("Manifest split", expected="rows of the split train", got="none")
    return np.array(names, dtype=object)


def _part(
    rows: np.ndarray, group: Sequence[object] | None, classes: np.ndarray | None, folds: int, fold: int, seed: int
) -> np.ndarray:
    """Returns one of ``folds`` parts of the rows."""
    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    groups = None if group is None else np.array([str(group[row]) for row in rows])
    labels = None if classes is None else classes[rows]
    count = len(rows) if groups is None else len(set(groups.tolist()))
    if count < 3:
        raise DataError(
            "Manifest", expected=f"at least 3 {'rows' if group is None else 'groups'} for train, val and test",
            got=f"{count}", fix="Name the split of each row in a column and give it as split.",
        )  # fmt: skip
    folds = min(folds, count)
    options = {"n_splits": folds, "shuffle": True, "random_state": seed}
    with warnings.catch_warnings():
        # Classes with fewer samples than parts cannot be in every part.
        warnings.filterwarnings("ignore", message=".*least populated class.*")
        if groups is not None:
            labels = np.zeros(len(rows), dtype=int) if labels is None else labels
            splitter = StratifiedGroupKFold(**options)
        elif labels is not None and max(np.unique(labels, return_counts=True)[1]) >= folds:
            splitter = StratifiedKFold(**options)
        else:
            splitter = KFold(**options)
        parts = [held for _, held in splitter.split(rows, labels, groups)]
    parts = [part for part in parts if len(part)]
    return rows[parts[fold % len(parts)]]


def _warn_of_shared_groups(rows: dict[str, np.ndarray], group: Sequence[object]) -> None:
    held = {name: {group[row] for row in part} for name, part in rows.items()}
    for name in ("val", "test"):
        if shared := held["train"] & held[name]:
            warnings.warn(
                f"Manifest: {len(shared)} groups have rows in train and in {name}, such as "
                f"{min(map(str, shared))!r}; scores on {name} may be too high.",
                stacklevel=4,
            )
