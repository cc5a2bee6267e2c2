"""Readers of values in the table itself: numbers and categories, and texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError, ShapeError, require_extra
from .column_kinds import Modality
from .modality_readers import EXAMINED, ModalityReader, Read

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from ..sets.word_vocabulary import WordVocabulary


class TableReader(ModalityReader):
    """Numbers and categories as one vector: standardized numbers, one-hot categories.

    A missing number is replaced by the training mean and a missing or unknown category by zeros; a row without any
    value lacks the modality.
    """

    MOST_VALUES = 1_000
    PRELOADED_BYTES = 2**28
    observes = True

    def fit(self, rows: np.ndarray) -> dict[str, Any]:
        options = super().fit(rows)
        if len(self.table) * self.shape[0] * 4 <= self.PRELOADED_BYTES:
            numbers = np.arange(len(self.table))
            self._kept = self._standardized(self.table[:], numbers)
        return options

    def __init__(self, name: str, modality: Modality, table: datasets.Dataset, root: Path) -> None:
        super().__init__(name, modality, table, root)
        features = self.table.features
        numbers = [c for c in self.modality.columns if self._is_number(features[c])]
        self._numbers = numbers if self.modality.kind != "category" else []
        self._found: dict[str, set[str]] = {c: set() for c in self.modality.columns if c not in self._numbers}
        self._total, self._square, self._count = (np.zeros(len(self._numbers)) for _ in range(3))
        self._shift: np.ndarray | None = None
        self._kept: tuple[Tensor, Tensor] | None = None
        for column in self._found if self.modality.kind in ("number", "vector") else ():
            raise ConfigError(
                f"column '{column}'", expected=f"numbers, since its kind is {self.modality.kind}",
                got=str(features[column].dtype), fix="Give its kind: category, text or ignore.",
            )  # fmt: skip

    def observe(self, block: pyarrow.Table, rows: np.ndarray) -> None:
        for column, found in self._found.items():
            found |= {str(cell) for cell in block.column(column).unique().to_pylist() if cell is not None}
            if len(found) > self.MOST_VALUES:
                raise ConfigError(
                    f"column '{column}'", expected=f"at most {self.MOST_VALUES} categories", got="more",
                    fix="Give its kind: text or ignore.",
                )  # fmt: skip
        values = self._matrix(block, rows)
        if self._shift is None and values.size:
            # A shift near the mean keeps the sums of squares exact.
            with np.errstate(all="ignore"):
                highest = np.nanmax(np.where(np.isnan(values), -np.inf, values), axis=0)
            self._shift = np.nan_to_num(highest, neginf=0.0)
        valid = ~np.isnan(values)
        centered = np.where(valid, values - (0.0 if self._shift is None else self._shift), 0.0)
        self._total += centered.sum(0)
        self._square += (centered**2).sum(0)
        self._count += valid.sum(0)

    def finish(self, rows: np.ndarray) -> dict[str, Any]:
        self._values = {column: sorted(found) for column, found in self._found.items()}
        width = len(self._numbers) + sum(map(len, self._values.values()))
        if not width:
            raise DataError(f"modality '{self.name}'", expected="training rows with values", got="empty cells only")
        self.shape = (width,)
        count = np.maximum(self._count, 1)
        self._mean = (0.0 if self._shift is None else self._shift) + self._total / count
        std = np.sqrt(np.maximum(self._square / count - (self._total / count) ** 2, 0.0))
        self._std = np.where(std > 1e-6 * np.maximum(np.abs(self._mean), 1.0), std, 1.0)
        return dict(self.modality.options)

    @staticmethod
    def _is_number(feature: Any) -> bool:
        return getattr(feature, "dtype", "string") not in ("string", "large_string")

    def _matrix(self, block: pyarrow.Table, rows: np.ndarray) -> np.ndarray:
        """Returns the number columns (row, column) in float64; NaN where empty."""
        columns = [np.asarray(block.column(c).cast("float64").to_numpy(), dtype=np.float64) for c in self._numbers]
        values = np.stack(columns, axis=1) if columns else np.zeros((len(block), 0))
        bad = np.argwhere(np.isinf(values))
        if len(bad):
            raise DataError(
                f"column '{self._numbers[bad[0][1]]}'", expected="finite numbers",
                got=f"infinity in row {rows[bad[0][0]]}", fix="Leave the cell empty if the value is unknown.",
            )  # fmt: skip
        return values

    def _standardized(self, block: pyarrow.Table, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        numbers = self._matrix(block, rows)
        parts = [np.nan_to_num((numbers - self._mean) / self._std)]
        present = (~np.isnan(numbers)).any(axis=1)
        for column, values in self._values.items():
            number = {value: index for index, value in enumerate(values)}
            cells = block.column(column).to_pylist()
            present |= np.array([cell is not None for cell in cells], dtype=bool)
            hot = np.zeros((len(rows), len(values)))
            for index, cell in enumerate(cells):
                if cell is not None and str(cell) in number:
                    hot[index, number[str(cell)]] = 1.0
            parts.append(hot)
        values = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
        return values.masked_fill(~torch.from_numpy(present)[:, None], 0.0), torch.from_numpy(present)

    def read(self, rows: np.ndarray) -> Read:
        if self._kept is None:
            return super().read(rows)
        chosen = torch.from_numpy(rows)
        return self._masked(self._kept[0][chosen], self._kept[1][chosen])

    def read_block(self, block: pyarrow.Table, rows: np.ndarray) -> Read:
        return self._masked(*self._standardized(block, rows))

    @staticmethod
    def _masked(values: Tensor, present: Tensor) -> Read:
        return Read(values, None if bool(present.all()) else present)


class TextReader(ModalityReader):
    """Texts as word ids; 0 is padding. The vocabulary is that of the training rows, or of a tokenizer on disk.

    The ids of a tokenizer are raised by 1.
    """

    MOST_WORDS, LONGEST = 20_000, 256
    MOST_COUNTED = 2**20
    """Different words that are counted; beyond, the rarer half is dropped, so that memory is bounded."""
    least_length = 1
    observes = True

    def __init__(self, name: str, modality: Modality, table: datasets.Dataset, root: Path) -> None:
        super().__init__(name, modality, table, root)
        self._counts: Counter[str] = Counter()
        self._first: list[str] = []

    def observe(self, block: pyarrow.Table, rows: np.ndarray) -> None:
        from ..sets.word_vocabulary import split_words

        texts = [str(text) for text in block.column(self.modality.columns[0]).to_pylist() if text]
        self._counts.update(word for text in texts for word in split_words(text))
        self._first += texts[: EXAMINED - len(self._first)]
        if len(self._counts) > self.MOST_COUNTED:
            self._counts = Counter(dict(self._counts.most_common(self.MOST_COUNTED // 2)))

    def finish(self, rows: np.ndarray) -> dict[str, Any]:
        self.options = dict(self.modality.options)
        self._words = self._known_words()
        self._ids = self._tokenizer() if "tokenizer" in self.options else self._word_ids
        examined = [
            *self._first,
            *(str(text) for text in self.cells(self.modality.columns[0], rows[:EXAMINED]) if text),
        ]
        longest = max(self.least_length, 1, max((len(self._ids(text)) for text in examined), default=1))
        self.options.setdefault("length", min(self.LONGEST, longest))
        self.shape = (self.options["length"],)
        return self.options

    def _known_words(self) -> WordVocabulary:
        from ..sets.word_vocabulary import WordVocabulary

        counts = self._counts
        if not counts:
            raise DataError(
                f"column '{self.modality.columns[0]}'", expected="training rows with words", got="empty cells only"
            )
        vocabulary = sorted(counts, key=lambda word: (-counts[word], word))[: self.MOST_WORDS]
        words = WordVocabulary(vocabulary, length=1)
        self.vocabulary = len(words)
        return words

    def _word_ids(self, text: str) -> list[int]:
        return [number for word in self._words.numbers(text) for number in word]

    def _tokenizer(self) -> Callable[[str], list[int]]:
        with require_extra(f"tokenizer of '{self.name}'"):
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

    def encode(self, text: str, who: str) -> Tensor:
        """Returns the ids (1, length) of a text that is not in the table.

        Raises:
            ShapeError: an empty or too long text. ConfigError: no word of the text is known, not even by its letters.
        """
        if "tokenizer" not in self.options:
            return self._words.encode([text], who, length=self.shape[0])
        ids = self._ids(text)
        if not text.strip() or len(ids) > self.shape[0]:
            raise ShapeError(
                who, expected=f"a text of 1 to {self.shape[0]} tokens", got=f"{len(ids)} ({text[:40]!r})",
                fix="Shorten it, or set a larger length under data.modalities of the recipe.",
            )  # fmt: skip
        return torch.tensor([[*ids, *[0] * (self.shape[0] - len(ids))]])

    def unseen(self, text: str) -> list[str]:
        """Returns the words of a text that are in no training row."""
        return self._words.unseen(text)

    def read_block(self, block: pyarrow.Table, rows: np.ndarray) -> Read:
        ids = torch.zeros(len(rows), *self.shape, dtype=torch.long)
        for place, text in enumerate(block.column(self.modality.columns[0]).to_pylist()):
            row = self._ids(str(text))[: self.shape[0]] if text else []
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.long)
        valid = ids > 0
        return Read(ids, valid)
