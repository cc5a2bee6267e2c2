"""Readers of modalities: rows of a table to a padded, standardized batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError, DataError, EquipoiseError
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

if TYPE_CHECKING:
    import datasets

EXAMINED = 256
"""Training samples that decide sizes, and the statistics of modalities in files."""
CACHE_BYTES = 2**30
"""Decoded samples that a reader keeps in memory, per process."""
MOST_SECONDS, MOST_RATE, MOST_SIDE, MOST_LENGTH = 10.0, 16_000, 64, 1024
"""Upper limits of sizes that are inferred; larger ones can be set in the recipe."""


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
    """One decoded cell: (token, feature) or a fixed shape, and the times of its tokens."""

    values: Tensor
    times: Tensor | None = None


class ModalityReader(ABC):
    """Reads one modality.

    Attributes:
        shape: shape of one sample; the first size is the maximum if the length varies.
        vocabulary: number of token ids for texts, else None.
    """

    shape: tuple[int, ...]
    vocabulary: int | None = None

    def __init__(self, name: str, modality: Modality, table: datasets.Dataset, root: Path) -> None:
        self.name, self.modality, self.root = name, modality, root
        self.table = table.select_columns([*modality.columns, *self.extra_columns(modality)]).with_format("arrow")

    def extra_columns(self, modality: Modality) -> list[str]:
        return []

    @abstractmethod
    def fit(self, rows: np.ndarray) -> dict[str, Any]:
        """Determines sizes and statistics from training rows; returns the options that reproduce them."""

    @abstractmethod
    def read(self, rows: np.ndarray) -> Read:
        """Reads a batch of rows."""

    def check(self, row: int) -> str | None:
        """Reads one row; returns the reason if it cannot be read."""
        try:
            self.read(np.array([row]))
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
    timed = any(item is not None and item.times is not None for item in items)
    times = torch.zeros(len(items), longest) if timed else None
    for place, (item, length) in enumerate(zip(items, lengths.tolist(), strict=True)):
        if item is not None:
            values[place, :length] = item.values[:length]
            if times is not None and item.times is not None:
                times[place, :length] = item.times[:length]
    return Read(values, torch.arange(longest) < lengths[:, None], times)


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

    def fit(self, rows: np.ndarray) -> dict[str, Any]:
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
        return collate([self._cache[row] if row in self._cache else fresh[row] for row in rows.tolist()],
                       self.shape, varying=self.varying)  # fmt: skip

    def _decode_all(self, rows: list[int]) -> list[Item | None]:
        result = []
        for row, cell in zip(rows, self.cells(self.column, np.array(rows)), strict=True):
            item = None if cell is None or cell == "" else self._item(row, cell)
            result.append(item)
            size = 0 if item is None else item.values.nbytes
            if size <= self._free:
                self._cache[row] = item
                self._free -= size
        return result

    def _item(self, row: int, cell: Cell) -> Item:
        values = self.decode(cell, self.who(row))
        if tuple(values.shape[1:] if self.varying else values.shape) != tuple(
            self.shape[1:] if self.varying else self.shape
        ):
            raise DataError(
                self.who(row), expected=f"a sample of shape {self.shape} as in training",
                got=f"shape {tuple(values.shape)}",
            )  # fmt: skip
        if self.varying:
            values = values[: self.shape[0]]
        scale = [1] * values.ndim
        scale[self.feature_dim] = -1
        return Item((values - self.mean.view(scale)) / self.std.view(scale), self.times_of(row, cell, len(values)))

    def times_of(self, row: int, cell: Cell, length: int) -> Tensor | None:
        return None


class AudioReader(FileReader):
    """Recordings as standardized log-mel spectrograms (frame, band), with a time for each frame."""

    varying = True

    def infer(self, examined: Sequence[Cell]) -> None:
        if not {"rate", "seconds"} <= self.options.keys():
            found = []
            for cell in examined:
                try:
                    found.append(audio_rate_and_seconds(cell, self.root, self.column))
                except DataError:
                    continue
            rates, seconds = zip(*found, strict=True) if found else ((MOST_RATE,), (1.0,))
            self.options.setdefault("rate", min(MOST_RATE, int(np.median(rates))))
            self.options.setdefault("seconds", round(min(MOST_SECONDS, max(seconds)), 2))
        self.options.setdefault("bands", 40 if self.options["rate"] <= 8_000 else 64)

    def _shape(self, decoded: Sequence[Tensor]) -> tuple[int, ...]:
        return (max(1, -(-round(self.options["seconds"] * self.options["rate"]) // round(self.options["rate"] / 100))),
                self.options["bands"])  # fmt: skip

    def decode(self, cell: Cell, who: str) -> Tensor:
        return read_spectrogram(cell, self.root, who, **self.options)

    def times_of(self, row: int, cell: Cell, length: int) -> Tensor:
        return (torch.arange(length) + 0.5) / 100


class ImageReader(FileReader):
    """Images (3, size, size), standardized per channel."""

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

    def times_of(self, row: int, cell: Cell, length: int) -> Tensor | None:
        if "rate" in self.options:
            return torch.arange(length) / float(self.options["rate"])
        if "times" not in self.options:
            return None
        column = self.options["times"]
        who = f"{column}, row {row}"
        times = read_numbers(self.cells(column, np.array([row]))[0], self.root, who, ndim=1)
        if len(times) < length or (length > 1 and bool((times[1:] < times[:-1]).any())):
            raise DataError(
                who, expected=f"increasing times in seconds, one for each of {length} steps", got=f"{len(times)} times"
                if len(times) < length else "times that decrease",
            )  # fmt: skip
        return times[:length]


class TableReader(ModalityReader):
    """Numbers and categories as one vector: standardized numbers, one-hot categories.

    A missing number is replaced by the training mean and a missing or unknown category by zeros; a row without any
    value lacks the modality.
    """

    MOST_VALUES = 1_000
    PRELOADED_BYTES = 2**28

    def fit(self, rows: np.ndarray) -> dict[str, Any]:
        self._values: dict[str, list[str]] = {}
        features = self.table.features
        numbers = [c for c in self.modality.columns if self._is_number(features[c])]
        self._numbers = numbers if self.modality.kind != "category" else []
        for column in self.modality.columns:
            if column in self._numbers:
                continue
            if self.modality.kind in ("number", "vector"):
                raise ConfigError(
                    f"column '{column}'", expected=f"numbers, since its kind is {self.modality.kind}",
                    got=str(features[column].dtype), fix="Give its kind: category, text or ignore.",
                )  # fmt: skip
            cells = self.table.data.column(column).take(rows)
            values = sorted({str(cell) for cell in cells.unique().to_pylist() if cell is not None})
            if len(values) > self.MOST_VALUES:
                raise ConfigError(
                    f"column '{column}'", expected=f"at most {self.MOST_VALUES} categories", got=f"{len(values)}",
                    fix="Give its kind: text or ignore.",
                )  # fmt: skip
            self._values[column] = values
        width = len(self._numbers) + sum(map(len, self._values.values()))
        if not width:
            raise DataError(f"modality '{self.name}'", expected="training rows with values", got="empty cells only")
        self.shape = (width,)
        # Statistics in blocks of rows: the table may be larger than memory.
        total, square, count = (np.zeros(len(self._numbers)) for _ in range(3))
        shift = np.zeros(len(self._numbers))
        for start in range(0, len(rows), 65_536):
            block = self._matrix(rows[start : start + 65_536])
            if start == 0 and block.size:
                with np.errstate(all="ignore"):
                    shift = np.nan_to_num(np.nanmax(np.where(np.isnan(block), -np.inf, block), axis=0), neginf=0.0)
            valid = ~np.isnan(block)
            centered = np.where(valid, block - shift, 0.0)
            total, square, count = total + centered.sum(0), square + (centered**2).sum(0), count + valid.sum(0)
        count = np.maximum(count, 1)
        self._mean = shift + total / count
        std = np.sqrt(np.maximum(square / count - (total / count) ** 2, 0.0))
        self._std = np.where(std > 1e-6 * np.maximum(np.abs(self._mean), 1.0), std, 1.0)
        self._kept = None
        if len(self.table) * width * 4 <= self.PRELOADED_BYTES:
            self._kept = self._standardized(np.arange(len(self.table)))
        return dict(self.modality.options)

    @staticmethod
    def _is_number(feature: Any) -> bool:
        return getattr(feature, "dtype", "string") not in ("string", "large_string")

    def _matrix(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number columns (row, column) in float64; NaN where empty."""
        block = self.table[rows.tolist()]
        columns = [np.asarray(block.column(c).cast("float64").to_numpy(), dtype=np.float64) for c in self._numbers]
        values = np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))
        bad = np.argwhere(np.isinf(values))
        if len(bad):
            raise DataError(
                f"column '{self._numbers[bad[0][1]]}'", expected="finite numbers",
                got=f"infinity in row {rows[bad[0][0]]}", fix="Leave the cell empty if the value is unknown.",
            )  # fmt: skip
        return values

    def _standardized(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        numbers = self._matrix(rows)
        parts = [np.nan_to_num((numbers - self._mean) / self._std)]
        present = (~np.isnan(numbers)).any(axis=1)
        if self._values:
            block = self.table[rows.tolist()]
        for column, values in self._values.items():
            number = {value: place for place, value in enumerate(values)}
            cells = block.column(column).to_pylist()
            present |= np.array([cell is not None for cell in cells], dtype=bool)
            hot = np.zeros((len(rows), len(values)))
            for place, cell in enumerate(cells):
                if cell is not None and str(cell) in number:
                    hot[place, number[str(cell)]] = 1.0
            parts.append(hot)
        values = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
        return values.masked_fill(~torch.from_numpy(present)[:, None], 0.0), torch.from_numpy(present)

    def read(self, rows: np.ndarray) -> Read:
        if self._kept is not None:
            chosen = torch.from_numpy(rows)
            values, present = self._kept[0][chosen], self._kept[1][chosen]
        else:
            values, present = self._standardized(rows)
        return Read(values, None if bool(present.all()) else present)


class TextReader(ModalityReader):
    """Texts as word ids; 0 is padding. The vocabulary is that of the training rows, or of a tokenizer on disk."""

    MOST_WORDS = 20_000

    def fit(self, rows: np.ndarray) -> dict[str, Any]:
        self.options = dict(self.modality.options)
        texts = [text for text in self.cells(self.modality.columns[0], rows) if text]
        self._ids = self._tokenizer() if "tokenizer" in self.options else self._words(texts)
        lengths = [len(self._ids(str(text))) for text in texts[:EXAMINED]]
        self.options.setdefault("length", max(1, min(MOST_LENGTH // 4, max(lengths, default=1))))
        self.shape = (self.options["length"],)
        return self.options

    def _words(self, texts: Sequence[str]) -> Callable[[str], list[int]]:
        from collections import Counter

        from ..sets.word_vocabulary import WordVocabulary, split_words

        counts = Counter(word for text in texts for word in split_words(str(text)))
        if not counts:
            raise DataError(
                f"column '{self.modality.columns[0]}'", expected="training rows with words", got="empty cells only"
            )
        known = sorted(counts, key=lambda word: (-counts[word], word))[: self.MOST_WORDS]
        words = WordVocabulary(known, length=1)
        self.vocabulary = len(words)
        return lambda text: [number for word in words.numbers(text) for number in word]

    def _tokenizer(self) -> Callable[[str], list[int]]:
        import transformers

        folder = self.root / str(self.options["tokenizer"])
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"modality '{self.name}'", expected="a folder with a tokenizer of Hugging Face transformers",
                got=f"'{folder}'",
            ) from error  # fmt: skip
        self.vocabulary = len(tokenizer) + 1
        # 0 is padding in TextEncoder.
        return lambda text: [number + 1 for number in tokenizer(text)["input_ids"]]

    def read(self, rows: np.ndarray) -> Read:
        ids = torch.zeros(len(rows), *self.shape, dtype=torch.long)
        for place, text in enumerate(self.cells(self.modality.columns[0], rows)):
            row = self._ids(str(text))[: self.shape[0]] if text else []
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.long)
        valid = ids > 0
        return Read(ids, valid)


READERS: Mapping[str, type[ModalityReader]] = {
    "audio": AudioReader, "image": ImageReader, "video": FramesReader, "frames": FramesReader, "text": TextReader,
    "vector": VectorReader, "sequence": SequenceReader, "array": ArrayReader, "number": TableReader, "category": TableReader,
    "table": TableReader,
}  # fmt: skip


def make_reader(name: str, modality: Modality, table: datasets.Dataset, root: Path) -> ModalityReader:
    """Returns the reader of a modality."""
    several = modality.kind == "vector" and len(modality.columns) > 1
    return (TableReader if several else READERS[modality.kind])(name, modality, table, root)
