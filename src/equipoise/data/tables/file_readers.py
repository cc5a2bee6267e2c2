"""Readers of modalities in files: audio, images, frames, arrays, vectors and sequences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from .cell_readers import (
    Cell,
    audio_rate_and_seconds,
    load_array,
    read_channels,
    read_frames,
    read_image,
    read_numbers,
    read_spectrogram,
)
from .column_kinds import Modality
from .modality_readers import EXAMINED, Item, ModalityReader, Read, collate

if TYPE_CHECKING:
    import datasets
    import pyarrow

CACHE_BYTES = 2**30
"""Decoded samples that a reader keeps in memory, per process."""
MOST_SECONDS, MOST_RATE, MOST_SIDE, MOST_LENGTH = 10.0, 16_000, 64, 1024
"""Upper limits of sizes that are inferred; larger ones can be set in the recipe."""


class FileReader(ModalityReader):
    """Base class of readers that decode one cell at a time; decoded samples are kept in memory up to a limit."""

    varying = False
    feature_dim = -1

    def __init__(self, name: str, modality: Modality, table: datasets.Dataset, root: Path) -> None:
        super().__init__(name, modality, table, root)
        self.options = dict(modality.options)
        self.mean = self.std = torch.zeros(())
        self._cache: dict[int, Item | None] = {}
        self._free = CACHE_BYTES

    @abstractmethod
    def decode(self, cell: Cell, who: str) -> Tensor:
        """Decodes one cell."""

    def infer(self, examined: Sequence[Cell]) -> None:
        """Sets the options that were not given."""

    @property
    def column(self) -> str:
        return self.modality.columns[0]

    def who(self, row: int) -> str:
        return f"{self.column}, row {row}"

    def finish(self, rows: np.ndarray) -> dict[str, Any]:
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), EXAMINED)).astype(int))]
        examined = [(row, cell) for row, cell in zip(chosen, self.cells(self.column, chosen), strict=True) if cell]
        self.infer([cell for _, cell in examined])
        decoded = []
        for row, cell in examined:
            try:
                decoded.append(self.decode(cell, self.who(row)))
            except DataError:
                # Reported by check for all rows at once.
                continue
        if not decoded:
            raise DataError(
                f"column '{self.column}'", expected=f"training rows with {self.modality.kind}",
                got=self.check(int(examined[0][0])) or "none" if examined else "empty cells only",
            )  # fmt: skip
        self.shape = self._shape(decoded)
        axes = torch.cat([one.movedim(self.feature_dim, -1).reshape(-1, self._features(one)) for one in decoded])
        axes = axes.double()
        self.mean, std = axes.mean(dim=0).float(), axes.std(dim=0, correction=0).float()
        # Constant features stay at 0 instead of growing without bound on other data.
        self.std = torch.where(std > 1e-6 * self.mean.abs().clamp(min=1.0), std, 1.0)
        # Pretrained encoders have statistics of their own.
        self.mean, self.std = (
            torch.as_tensor(self.options.get(name, own)).float()
            for name, own in (("mean", self.mean), ("std", self.std))
        )
        return self.options

    def _features(self, one: Tensor) -> int:
        return one.shape[self.feature_dim]

    def _shape(self, decoded: Sequence[Tensor]) -> tuple[int, ...]:
        shapes = [tuple(one.shape[1:] if self.varying else one.shape) for one in decoded]
        if len(set(shapes)) > 1:
            raise DataError(
                f"column '{self.column}'", expected="samples of one shape", got=f"shapes {sorted(set(shapes))[:3]}"
            )
        longest = max(len(one) for one in decoded)
        return (self.options.get("length", longest), *shapes[0]) if self.varying else shapes[0]

    def read(self, rows: np.ndarray) -> Read:
        missing = [row for row in rows.tolist() if row not in self._cache]
        fresh = dict(zip(missing, self._decode_all(missing), strict=True)) if missing else {}
        return self._collate([self._cache[row] if row in self._cache else fresh[row] for row in rows.tolist()])

    def read_block(self, block: pyarrow.Table, rows: np.ndarray) -> Read:
        return self._collate(self._items(block, rows.tolist()))

    def _collate(self, items: Sequence[Item | None]) -> Read:
        return collate(items, self.shape, varying=self.varying)

    def _decode_all(self, rows: list[int]) -> list[Item | None]:
        result = self._items(self.table[rows], rows)
        for row, item in zip(rows, result, strict=True):
            size = 0 if item is None else item.values.nbytes
            if size <= self._free:
                self._cache[row] = item
                self._free -= size
        return result

    def _items(self, block: pyarrow.Table, rows: Sequence[int]) -> list[Item | None]:
        cells = block.column(self.column).to_pylist()
        times = self.times_cells(block)
        return [
            None if cell is None or cell == "" else self._item(cell, self.who(row), row, own)
            for row, cell, own in zip(rows, cells, times, strict=True)
        ]

    def times_cells(self, block: pyarrow.Table) -> Sequence[Cell]:
        """Returns the cells with the times of the steps, None without them."""
        return [None] * len(block)

    def read_file(self, cell: Cell, who: str) -> Read:
        """Reads a file that is not in the table, as a batch of one sample."""
        return self._collate([self._item(cell, who)])

    def _item(self, cell: Cell, who: str, row: int | None = None, times: Cell = None) -> Item:
        values = self.decode(cell, who)
        if tuple(values.shape[1:] if self.varying else values.shape) != tuple(
            self.shape[1:] if self.varying else self.shape
        ):
            raise DataError(
                who, expected=f"a sample of shape {self.shape} as in training",
                got=f"shape {tuple(values.shape)}",
            )  # fmt: skip
        if self.varying:
            values = values[: self.shape[0]]
        scale = [1] * values.ndim
        scale[self.feature_dim] = -1
        return Item((values - self.mean.view(scale)) / self.std.view(scale), self.times_of(len(values), times, row))

    def times_of(self, length: int, times: Cell, row: int | None) -> Tensor | None:
        """Returns the times of the steps in seconds, from their cell; ``row`` is None for a file outside the table."""
        return None


class AudioReader(FileReader):
    """Recordings as standardized log-mel spectrograms (frame, band), with a time for each frame."""

    varying = True

    def infer(self, examined: Sequence[Cell]) -> None:
        if not {"rate", "seconds"} <= self.options.keys():
            shapes = []
            for cell in examined:
                try:
                    shapes.append(audio_rate_and_seconds(cell, self.root, self.column))
                except DataError:
                    continue
            rates, seconds = zip(*shapes, strict=True) if shapes else ((MOST_RATE,), (1.0,))
            self.options.setdefault("rate", min(MOST_RATE, int(np.median(rates))))
            self.options.setdefault("seconds", round(min(MOST_SECONDS, max(seconds)), 2))
        self.options.setdefault("bands", 40 if self.options["rate"] <= 8_000 else 64)

    def _shape(self, decoded: Sequence[Tensor]) -> tuple[int, ...]:
        return (max(1, -(-round(self.options["seconds"] * self.options["rate"]) // round(self.options["rate"] / 100))),
                self.options["bands"])  # fmt: skip

    def decode(self, cell: Cell, who: str) -> Tensor:
        return read_spectrogram(cell, self.root, who, **self.options)

    def times_of(self, length: int, times: Cell, row: int | None) -> Tensor:
        return (torch.arange(length) + 0.5) / 100


class ImageReader(FileReader):
    """Images (3, size, size), standardized per channel.

    The options ``mean`` and ``std``, of pixels in [0, 1], replace the statistics of the training split.
    """

    feature_dim = 0

    def infer(self, examined: Sequence[Cell]) -> None:
        if "size" not in self.options:
            from ..media_files import load_image
            from .cell_readers import file_of

            sides = []
            for cell in examined[:32]:
                try:
                    sides.append(min(load_image(file_of(cell, self.root)).size))
                except DataError:
                    continue
            self.options["size"] = int(min(MOST_SIDE, max(8, round(float(np.median(sides or [MOST_SIDE])) / 8) * 8)))

    def decode(self, cell: Cell, who: str) -> Tensor:
        return read_image(cell, self.root, who, size=self.options["size"])


class FramesReader(FileReader):
    """Equally spaced frames (frame, 3, size, size) of videos, folders of images or arrays, standardized per channel."""

    feature_dim = 1

    def infer(self, examined: Sequence[Cell]) -> None:
        self.options = {"frames": 4, "size": MOST_SIDE, **self.options}

    def decode(self, cell: Cell, who: str) -> Tensor:
        return read_frames(cell, self.root, who, **self.options)


class ArrayReader(FileReader):
    """Arrays of one shape in .npy files, such as spectrograms and optical flow, neither cropped nor resized.

    (height, width), (height, width, channel) and (frame, height, width, channel) become channels first, and are
    standardized per channel.
    """

    feature_dim = -3

    def decode(self, cell: Cell, who: str) -> Tensor:
        return read_channels(cell, self.root, who)


class VectorReader(FileReader):
    """Vectors (feature,) from .npy files or list columns, standardized per feature."""

    def decode(self, cell: Cell, who: str) -> Tensor:
        return read_numbers(cell, self.root, who, ndim=1)


class SequenceReader(FileReader):
    """Sequences (time, feature) from .npy files or list columns, standardized per feature.

    ``times`` names a column with the times of the steps in seconds, as .npy files or lists; ``rate`` gives the rate in
    Hz of steps at equal distance instead.
    """

    varying = True

    def extra_columns(self, modality: Modality) -> list[str]:
        return [modality.options["times"]] if "times" in modality.options else []

    def infer(self, examined: Sequence[Cell]) -> None:
        if "length" not in self.options:
            lengths = []
            for cell in examined:
                try:
                    lengths.append(len(load_array(cell, self.root, self.column)))
                except (DataError, TypeError):
                    continue
            self.options["length"] = max(1, min(MOST_LENGTH, max(lengths, default=1)))

    def decode(self, cell: Cell, who: str) -> Tensor:
        return read_numbers(cell, self.root, who, ndim=2)

    def times_cells(self, block: pyarrow.Table) -> Sequence[Cell]:
        column = self.options.get("times")
        return [None] * len(block) if column is None else block.column(column).to_pylist()

    def times_of(self, length: int, times: Cell, row: int | None) -> Tensor | None:
        if "rate" in self.options:
            return torch.arange(length) / float(self.options["rate"])
        if "times" not in self.options or row is None:
            return None
        who = f"{self.options['times']}, row {row}"
        seconds = read_numbers(times, self.root, who, ndim=1)
        if len(seconds) < length or (length > 1 and bool((seconds[1:] < seconds[:-1]).any())):
            raise DataError(
                who, expected=f"increasing times in seconds, one for each of {length} steps",
                got=f"{len(seconds)} times" if len(seconds) < length else "times that decrease",
            )  # fmt: skip
        return seconds[:length]
