"""`stream`: the samples of a table whose rows are read in order, for data that do not fit on the disk or in memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError, unknown_name
from ...io.typed_values import shorten_repr
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split
from ..streams.stream_order import StreamOrder
from ..streams.stream_source import StreamSource
from ..streams.stream_splits import SPLITS, StreamSplits
from ..streams.stream_survey import INDEX, ROW, StreamRows, survey
from ..tables.column_kinds import find_modalities, modalities_from_options
from ..tables.reader_choice import make_reader
from ..tables.table_manifest import table_root
from ..tables.table_reading import SPLIT
from ..tables.target_columns import TargetReader

if TYPE_CHECKING:
    import datasets
    import pyarrow

MOST_BAD = 10_000
"""Rows that cannot be read after which ``check`` stops."""
BUFFER = 2_048
"""Rows that are shuffled together."""


class StreamSplit(Split):
    """A split of a stream: its size, without inputs and targets."""

    def __init__(self, size: int) -> None:
        super().__init__({}, torch.zeros(0))
        object.__setattr__(self, "size", size)

    def __len__(self) -> int:
        return self.size  # type: ignore[attr-defined]


class StreamDataset(Dataset):
    """The samples of a table that is read as a stream: rows are read in order and never held in memory together.

    One pass over the stream determines the sizes of the splits, the classes, and the statistics of the training rows:
    numbers, categories and words of all of them, files, arrays and lengths of a random sample of 256. An epoch permutes
    the shards, reads up to 8 of them in turns, and shuffles blocks of ``buffer_size`` rows; see ``StreamOrder``.
    Batches depend on the seed, the epoch and the data only: they are the same for any number of workers and processes,
    and a run resumes exactly in the middle of an epoch, by reading the rows up to there without decoding them.

    Differences from ``ManifestDataset``: splits are not stratified, ``fold`` selects rows by a hash, training rows are
    shuffled within the buffer only, and sampling weights and pairs are refused.

    Args:
        path: csv, tsv, jsonl or parquet file; folder of ``datasets.Dataset.save_to_disk``, or with csv, jsonl or
            parquet shards; name of a data set on the Hugging Face Hub; a ``datasets.IterableDataset`` or
            ``IterableDatasetDict``.
        target, group, split, kinds, modalities, task, root: see ``Manifest``.
        pair, weight: refused.
        folds, fold, seed: of the splits that the source does not have; see ``StreamSplits``.
        skip: numbers of rows to leave out, such as those with damaged files; see ``check``.
        checksum: digest of the data that a trained model had; others are refused.
        buffer_size: rows that are shuffled together, and held in memory as they are stored.

    Raises:
        DataError: the source is damaged or empty, a target is missing, a split has no rows, or the data have changed.
        ConfigError: an unknown column, kind or option; weights or pairs.

    Example:
        >>> import datasets
        >>> table = datasets.Dataset.from_dict({"x_0": range(40), "x_1": range(40), "label": ["a", "b"] * 20})
        >>> data = StreamDataset(table.to_iterable_dataset(num_shards=4), target="label")
        >>> data.names, data.num_outputs, sum(len(data.split(name)) for name in ("train", "val", "test"))
        (('x',), 2, 40)
    """

    ordered = True

    def __init__(
        self, path: str | Path | datasets.IterableDataset | datasets.IterableDatasetDict | None = None, *,
        target: str | list[str] | None = None, pair: list[str] | None = None, group: str | None = None,
        split: str | None = None, weight: str | None = None, kinds: dict[str, Any] | None = None,
        modalities: dict[str, Any] | None = None,
        task: Literal["classification", "multilabel", "regression"] | None = None, root: str | None = None,
        folds: int = 5, fold: str | int = 0, seed: int = 0, skip: list[int] | None = None, checksum: str | None = None,
        buffer_size: int = BUFFER,
    ) -> None:  # fmt: skip
        if path is None or not target:
            raise ConfigError(
                "stream", expected="a source of rows and a target", got="none" if path is None else "no target",
                fix="Name your data: --data SOURCE --target COLUMN --stream.",
            )  # fmt: skip
        for name, value in (("pair", pair), ("weight", weight)):
            if value is not None:
                raise ConfigError(
                    "stream",
                    expected=f"no {name}, which needs all rows at once",
                    got=f"{name} = {shorten_repr(value)}",
                    fix="Leave out --stream: tables are memory-mapped, and only the rows of a batch are read.",
                )
        if not re.fullmatch("[0-9]{1,9}", str(fold)):
            raise ConfigError(
                "stream", expected="a fold from 0 to folds - 1", got=f"fold = '{shorten_repr(str(fold))}'"
            )
        if not 1 <= buffer_size <= 10_000_000:
            raise ConfigError("stream", expected="buffer_size from 1 to 10,000,000", got=f"{buffer_size}")
        self.source = StreamSource(path)
        head = self.source.head
        self.targets = [target] if isinstance(target, str) else list(target)
        if split is None and SPLIT in head.column_names and SPLIT not in self.targets and len(self.source.parts) == 1:
            split = SPLIT
        special = [name for name in (*self.targets, group, split) if name is not None]
        for name in special:
            if name not in head.column_names:
                raise unknown_name("stream", "column", name, head.column_names)
        if len(set(special)) < len(special):
            raise ConfigError(
                "stream", expected="different columns for target, group and split", got=", ".join(special)
            )
        columns = [name for name in head.column_names if name not in special]
        self.root = table_root(path, root)
        self.unused: dict[str, str] = {}
        if modalities:
            self.modalities = modalities_from_options(modalities, columns)
        else:
            self.modalities, self.unused = find_modalities(head, self.root, exclude=set(special), kinds=kinds or {})
        numeric = [one for one in self.modalities.values() if one.kind in ("number", "table", "vector")]
        self.source.as_floats([c for one in numeric for c in one.columns])
        self.readers = {name: make_reader(name, one, head, self.root) for name, one in self.modalities.items()}
        inputs = [c for one in self.readers.values() for c in (*one.modality.columns, *one.extra_columns(one.modality))]
        self.splits = StreamSplits(
            self.source.parts, column=split, group=group, folds=folds, fold=int(fold), seed=seed
        )  # fmt: skip
        self.rows = StreamRows(self.source, self.splits, [*inputs, *special], skip or ())
        self._target = TargetReader(head.features, self.targets, task)
        sample, self._checksum, changes = survey(self.rows, self._target, self.readers)
        if checksum is not None and checksum != self._checksum:
            raise DataError(
                f"stream '{path}'", expected="the data that the model was trained with", got="other rows",
                fix="Restore the data, or train again in a new folder.",
            )  # fmt: skip
        self._set_splits()
        self._target.finish()
        self.task, self.classes = self._target.task, self._target.classes
        self.num_outputs, self.names = len(self.classes), tuple(self.modalities)
        self.buffer_size = buffer_size
        self._warn_of_sorted_rows(changes)
        self.options: dict[str, dict[str, Any]] = {}
        for name, reader in self.readers.items():
            reader.use(sample.table())
            self.options[name] = {**self.modalities[name].to_dict(), **reader.finish(np.arange(len(sample.rows)))}
        self.noise = dict.fromkeys(self.names, (0.0, 1.0))
        self.vocabulary = {name: one.vocabulary for name, one in self.readers.items() if one.vocabulary is not None}
        self._orders: dict[str, tuple[tuple[int, int] | None, StreamOrder]] = {}

    def _set_splits(self) -> None:
        sizes = dict(zip(SPLITS, self.rows.counts.sum(axis=0).tolist(), strict=True))
        for name, size in sizes.items():
            if not size:
                raise DataError(
                    "stream", expected="rows in train, val and test", got=f"none in {name} of {len(self.rows)} rows",
                    fix="Add rows or groups, or name train, val and test in the column of splits.",
                )  # fmt: skip
        self.train, self.val, self.test = (StreamSplit(sizes[name]) for name in SPLITS)

    def _warn_of_sorted_rows(self, changes: int) -> None:
        shards = int((self.rows.counts[:, SPLITS.index("train")] > 0).sum())
        rows = len(self.train)
        if shards == 1 and self.task == "classification" and max(1, changes) * self.buffer_size < rows:
            warnings.warn(
                f"stream: the training rows are sorted by '{self.targets[0]}' in one shard, and only "
                f"{self.buffer_size} rows are shuffled together; most batches have one class. Shuffle the data once, "
                "or raise buffer_size.",
                stacklevel=3,
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: reader.shape for name, reader in self.readers.items()}

    def checksum(self) -> str:
        """Returns a digest of the row counts, the types and the first targets."""
        return self._checksum

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs

    def batch(self, split: str, index: Tensor, *, seed: int, epoch: int, train: bool) -> dict[str, Any]:
        """Returns a batch of samples.

        Args:
            split: "train", "val" or "test".
            index: (batch,) positions in the order of the epoch if ``train``, else in the stored order. Rows before them
                are read as well, unless the batch before was of the same epoch.
            seed, epoch: of the order of training rows.
            train: shuffle.
        """
        if not len(index) or int(index.min()) < 0 or int(index.max()) >= len(self.split(split)):
            raise DataError("stream", expected=f"positions from 0 to {len(self.split(split)) - 1} of {split}",
                            got=f"{index.tolist()[:3]}")  # fmt: skip
        try:
            block = self._order(split, (seed, epoch) if train else None).take(index.numpy())
        except IndexError as error:
            raise DataError(
                f"stream, {split}", expected="as many rows as when it was first read", got=str(error),
                fix="The data changed while they were read: start again.",
            ) from error  # fmt: skip
        rows = block.column(ROW).to_numpy()
        parts = {name: reader.read_block(block, rows) for name, reader in self.readers.items()}
        batch: dict[str, Any] = {name: part.values for name, part in parts.items()}
        batch |= {"target": self._target.read(block), "index": torch.tensor(block.column(INDEX).to_pylist())}
        mask = {name: part.mask for name, part in parts.items() if part.mask is not None}
        times = {name: part.times for name, part in parts.items() if part.times is not None}
        return {**batch, **({"mask": mask} if mask else {}), **({"times": times} if times else {})}

    def _order(self, split: str, key: tuple[int, int] | None) -> StreamOrder:
        known = self._orders.get(split)
        if known is None or known[0] != key:
            lengths = self.rows.counts[:, SPLITS.index(split)].tolist()
            order = StreamOrder(lengths, self.rows.read(split), buffer_size=self.buffer_size, seed=key)
            known = self._orders[split] = key, order
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process.
        return {**self.__dict__, "_orders": {}}

    def check(self, progress: Callable[[int, int], None] | None = None, *, workers: int = 4) -> dict[int, list[str]]:
        """Reads the files of every row once.

        Args:
            progress: called with (rows done, rows).
            workers: threads.

        Returns:
            row -> reasons, for up to ``MOST_BAD`` rows with a file that cannot be read.
        """
        bad: dict[int, list[str]] = {}
        with ThreadPoolExecutor(workers) as pool:
            for done, (row, reasons) in enumerate(self._examined(pool), 1):
                if reasons:
                    bad[row] = reasons
                if progress is not None:
                    progress(done, len(self.rows))
                if len(bad) >= MOST_BAD:
                    break
        return bad

    def _examined(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, list[str]]]:
        rows = StreamRows(self.source, self.splits, self.rows.columns, self.rows.skip.tolist())
        for block, numbers, _ in rows.scan():
            whole = [one.check_block(block, numbers) for one in self.readers.values()]
            if not any(whole):
                yield from ((row, []) for row in numbers.tolist())
                continue

            def examine(place: int, block: pyarrow.Table = block, numbers: np.ndarray = numbers) -> list[str]:
                one, number = block.slice(place, 1), numbers[place : place + 1]
                return [reason for reader in self.readers.values() if (reason := reader.check_block(one, number))]

            yield from zip(numbers.tolist(), pool.map(examine, range(len(numbers))), strict=True)

    def describe(self) -> list[str]:
        """Returns one line per modality, for the target and for the splits: what was recognized."""
        lines = []
        for name, one in self.modalities.items():
            columns = one.columns[0] if len(one.columns) == 1 else f"{len(one.columns)} columns, {one.columns[0]} ..."
            lines.append(f"{name}: {one.kind} ({columns})")
        if self.unused:
            lines.append(f"not used: {', '.join(self.unused)}")
        kind = {"classification": "classes", "multilabel": "labels", "regression": "outputs"}[self.task]
        lines.append(f"target: {', '.join(self.targets)} ({self.task}, {self.num_outputs} {kind})")
        return lines

    def split_title(self) -> str:
        """Returns how rows were assigned to splits."""
        if self.splits.column is not None:
            return f"column '{self.splits.column}'"
        if not self.splits.hashed:
            return "splits of the source"
        by = "row number" if self.splits.group is None else f"'{self.splits.group}'"
        return f"a hash of the {by}; not stratified" if self.splits.group is None else f"a hash of {by}; not stratified"
