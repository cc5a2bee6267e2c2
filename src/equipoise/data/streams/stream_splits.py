"""Assigns the rows of a stream to train, val and test, each by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import ConfigError, DataError
from ..counter_rng import CounterRNG
from ..tables.column_pairs import is_blank
from ..tables.row_splits import NAMES

if TYPE_CHECKING:
    import pyarrow

SPLITS = ("train", "val", "test")


class StreamSplits:
    """The split of each row, a function of the row alone.

    The named splits of the source decide, or a column with train, val or test in each row. If val or test is missing, a
    training row is in part h of ``folds``, where h is a hash of the seed and its group, or of its number without
    groups: part ``fold`` is test and the next one val. Groups are never in two splits; sizes are about equal, and
    classes are not stratified.

    Args:
        parts: names of the splits of the source; one without a name is all rows.
        column: column of the split, or None.
        group: column of the group, or None. A row without a value is a group of its own.
        folds, fold, seed: of the assignment.

    Raises:
        ConfigError: fewer than 3 folds, an unknown fold, a column of splits beside splits of the source.
        DataError: splits of other names, or none named train.
    """

    def __init__(
        self, parts: Iterable[str], *, column: str | None, group: str | None, folds: int, fold: int, seed: int
    ) -> None:
        if folds < 3 or not 0 <= fold < folds:
            raise ConfigError(
                "stream", expected="folds >= 3 and 0 <= fold < folds", got=f"folds = {folds}, fold = {fold}"
            )
        self.column, self.group = column, group
        self._folds, self._seed = folds, seed
        self.names = {part: "train" if not part else _known(part) for part in parts}
        given = set(self.names.values())
        if "train" not in given:
            raise DataError("stream", expected="a split named train", got=", ".join(self.names))
        if column is not None and len(self.names) > 1:
            raise ConfigError("stream", expected="splits of the source or a column of splits", got="both")
        lacking = [name for name in ("test", "val") if name not in given] if column is None else []
        self._parts = {fold: lacking[0]} if lacking else {}
        if len(lacking) > 1:
            self._parts[(fold + 1) % folds] = lacking[1]

    @property
    def hashed(self) -> bool:
        """Returns whether rows are assigned by a hash."""
        return bool(self._parts)

    def assign(self, part: str, block: pyarrow.Table, rows: np.ndarray) -> np.ndarray:
        """Returns the number in ``SPLITS`` of each row.

        Raises:
            DataError: another name in the column of splits.
        """
        if self.column is not None:
            cells = block.column(self.column).to_pylist()
            known = [NAMES.get(str(cell).strip().casefold()) for cell in cells]
            if None in known:
                place = known.index(None)
                raise DataError(
                    "stream split", expected="train, val or test in every row of the split column",
                    got=f"{cells[place]!r} in row {rows[place]}",
                )  # fmt: skip
            return np.array([SPLITS.index(str(name)) for name in known])
        own = self.names[part]
        result = np.full(len(rows), SPLITS.index(own))
        if own != "train" or not self._parts:
            return result
        keys = rows if self.group is None else _group_keys(block.column(self.group).to_pylist(), rows)
        draws = CounterRNG(self._seed, 0, torch.from_numpy(keys), "stream").uniform("split", 1)[:, 0].numpy()
        parts = np.minimum((draws * self._folds).astype(int), self._folds - 1)
        for number, name in self._parts.items():
            result[parts == number] = SPLITS.index(name)
        return result


def _known(part: str) -> str:
    name = NAMES.get(part.strip().casefold())
    if name is None:
        raise DataError("stream", expected="splits named train, validation and test", got=f"'{part}'",
                        fix="Give the files of each split, or a column with the split of each row.")  # fmt: skip
    return name


def _group_keys(groups: list[object], rows: np.ndarray) -> np.ndarray:
    """Returns a number for each group; a row without one has that of the row."""
    known = {
        group: int.from_bytes(hashlib.blake2b(group.encode(), digest_size=7).digest(), "big")
        for group in set(map(str, groups))
    }
    return np.array(
        [row if is_blank(group) else known[str(group)] for group, row in zip(groups, rows.tolist(), strict=True)],
        dtype=np.int64,
    )
