"""Base class of the readers of modalities: rows of a table to a padded batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import EquipoiseError
from .cell_readers import Cell
from .column_kinds import Modality

if TYPE_CHECKING:
    import datasets
    import pyarrow

EXAMINED = 256
"""Training samples that decide sizes, and the statistics of modalities in files."""
BLOCK = 65_536
"""Rows of a table that are read at once for statistics."""


class Read(NamedTuple):
    """One modality of a batch.

    Attributes:
        values: (batch, ...), 0 where masked.
        mask: (batch,) or (batch, token), True for valid; None if everything is valid.
        times: (batch, token) seconds, or None.
    """

    values: Tensor
    mask: Bool[Tensor, "batch ..."] | None = None
    times: Float[Tensor, "batch token"] | None = None


class Item(NamedTuple):
    """One decoded cell: (token, feature) or a fixed shape, and the times and mask of its tokens."""

    values: Tensor
    times: Tensor | None = None
    mask: Bool[Tensor, " token"] | None = None


class ModalityReader(ABC):
    """Reads one modality.

    Attributes:
        shape: shape of one sample; the first size is the maximum if the length varies.
        vocabulary: number of token ids for texts, else None.
    """

    shape: tuple[int, ...]
    vocabulary: int | None = None
    observes = False
    """Whether statistics are those of all training rows, see ``observe``."""

    def __init__(self, name: str, modality: Modality, table: datasets.Dataset, root: Path) -> None:
        self.name, self.modality, self.root = name, modality, root
        self.use(table)

    def use(self, table: datasets.Dataset) -> None:
        """Sets the table whose rows ``finish`` and ``read`` read."""
        columns = [*self.modality.columns, *self.extra_columns(self.modality)]
        self.table = table.select_columns(columns).with_format("arrow")

    def extra_columns(self, modality: Modality) -> list[str]:
        return []

    def fit(self, rows: np.ndarray) -> dict[str, Any]:
        """Determines sizes and statistics from training rows; returns the options that reproduce them."""
        for start in range(0, len(rows) if self.observes else 0, BLOCK):
            chosen = rows[start : start + BLOCK]
            self.observe(self.table[chosen.tolist()], chosen)
        return self.finish(rows)

    def observe(self, block: pyarrow.Table, rows: np.ndarray) -> None:  # noqa: B027
        """Adds a block of training rows to the statistics; ``rows`` are their numbers, for error messages."""

    @abstractmethod
    def finish(self, rows: np.ndarray) -> dict[str, Any]:
        """Determines sizes and statistics after all calls of ``observe``.

        Args:
            rows: training rows of ``table``, from which examples are examined.
        """

    def read(self, rows: np.ndarray) -> Read:
        """Reads a batch of rows of the table."""
        return self.read_block(self.table[rows.tolist()], rows)

    @abstractmethod
    def read_block(self, block: pyarrow.Table, rows: np.ndarray) -> Read:
        """Reads a batch of rows.

        Args:
            block: the rows, with the columns of the modality.
            rows: their numbers, for error messages.
        """

    def check(self, row: int) -> str | None:
        """Reads one row; returns the reason if it cannot be read."""
        return self.check_block(self.table[[row]], np.array([row]))

    def check_block(self, block: pyarrow.Table, rows: np.ndarray) -> str | None:
        """Reads rows that are in no table; returns the reason if they cannot be read."""
        try:
            self.read_block(block, rows)
        except EquipoiseError as error:
            return str(error)
        return None

    def cells(self, column: str, rows: np.ndarray) -> list[Cell]:
        return self.table[rows.tolist()].column(column).to_pylist()


def collate(items: Sequence[Item | None], shape: tuple[int, ...], *, varying: bool) -> Read:
    """Pads and stacks items; None is a missing sample.

    Args:
        items: decoded cells.
        shape: shape of one sample.
        varying: whether the first size varies; longer items are truncated to ``shape[0]``.
    """
    present = torch.tensor([item is not None for item in items])
    if not varying:
        values = torch.stack([torch.zeros(shape) if item is None else item.values for item in items])
        return Read(values, None if bool(present.all()) else present)
    lengths = torch.tensor([0 if item is None else min(len(item.values), shape[0]) for item in items])
    longest = max(1, int(lengths.max()))
    values = torch.zeros(len(items), longest, *shape[1:])
    mask = torch.arange(longest) < lengths[:, None]
    timed = any(item is not None and item.times is not None for item in items)
    times = torch.zeros(len(items), longest) if timed else None
    for index, (item, length) in enumerate(zip(items, lengths.tolist(), strict=True)):
        if item is not None:
            values[index, :length] = item.values[:length]
            if times is not None and item.times is not None:
                times[index, :length] = item.times[:length]
            if item.mask is not None:
                mask[index, :length] &= item.mask[:length]
    return Read(values, mask, times)
