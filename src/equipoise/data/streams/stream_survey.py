"""One pass over a stream: sizes of splits, target, and statistics of the training rows, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..counter_rng import CounterRNG
from ..tables.modality_readers import EXAMINED, ModalityReader
from ..tables.target_columns import TargetReader
from .stream_source import StreamSource
from .stream_splits import SPLITS, StreamSplits

if TYPE_CHECKING:
    import datasets
    import pyarrow

ROW, INDEX = "__row__", "__index__"
"""Columns of blocks: number of a row in the source, and its position in its split."""
DIGESTED = 10_000
"""Rows whose targets are part of the digest."""


class StreamRows:
    """The rows of a stream with their splits and numbers.

    Args:
        source: the stream.
        splits: assigns rows to splits.
        columns: columns to read.
        skip: numbers of rows to leave out.
    """

    def __init__(
        self, source: StreamSource, splits: StreamSplits, columns: Sequence[str], skip: Sequence[int] = ()
    ) -> None:
        self.source, self.splits, self.columns = source, splits, list(columns)
        self.skip = np.array(sorted(set(skip)), dtype=np.int64)
        self.shards = [(name, shard) for name in source.parts for shard in range(source.shards(name))]
        self.counts = np.zeros((len(self.shards), len(SPLITS)), dtype=np.int64)
        self.sizes = np.zeros(len(self.shards), dtype=np.int64)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def scan(self) -> Iterator[tuple[pyarrow.Table, np.ndarray, np.ndarray]]:
        """Yields (rows, their numbers, their splits) of the whole stream, and counts them."""
        self.counts[:], self.sizes[:] = 0, 0
        for shard in range(len(self.shards)):
            for block, rows, split in self._blocks(shard, int(self.sizes[:shard].sum())):
                self.sizes[shard] += len(rows)
                kept = self._kept(rows)
                self.counts[shard] += np.bincount(split[kept], minlength=len(SPLITS))
                yield block.filter(kept) if not kept.all() else block, rows[kept], split[kept]

    def read(self, split: str) -> Callable[[int], Iterator[pyarrow.Table]]:
        """Returns a function that yields the rows of a split in a shard, with ``ROW`` and ``INDEX``; after ``scan``."""
        import pyarrow as pa

        number = SPLITS.index(split)

        def tables(shard: int) -> Iterator[pyarrow.Table]:
            index = int(self.counts[:shard, number].sum())
            for block, rows, splits in self._blocks(shard, int(self.sizes[:shard].sum())):
                chosen = (splits == number) & self._kept(rows)
                count = int(chosen.sum())
                if count:
                    part = block if count == len(block) else block.filter(chosen)
                    part = part.append_column(ROW, pa.array(rows[chosen]))
                    yield part.append_column(INDEX, pa.array(np.arange(index, index + count)))
                index += count

        return tables

    def _blocks(self, shard: int, first: int) -> Iterator[tuple[pyarrow.Table, np.ndarray, np.ndarray]]:
        name, number = self.shards[shard]
        for block in self.source.blocks(name, number, self.columns):
            rows = np.arange(first, first + len(block))
            first += len(block)
            yield block, rows, self.splits.assign(name, block, rows)

    def _kept(self, rows: np.ndarray) -> np.ndarray:
        return ~np.isin(rows, self.skip) if len(self.skip) else np.ones(len(rows), dtype=bool)


class RowSample:
    """A random sample of rows of a stream: those with the smallest hash of their number."""

    def __init__(self, size: int = EXAMINED) -> None:
        self.size = size
        self._keys = np.zeros(0)
        self.rows = np.zeros(0, dtype=np.int64)
        self._table: pyarrow.Table | None = None

    def add(self, block: pyarrow.Table, rows: np.ndarray) -> None:
        import pyarrow as pa

        keys = CounterRNG(0, 0, torch.from_numpy(rows), "stream").uniform("sample", 1)[:, 0].numpy()
        limit = self._keys.max() if len(self._keys) == self.size else np.inf
        chosen = np.flatnonzero(keys < limit)
        if not len(chosen):
            return
        parts = [block.take(chosen)] if self._table is None else [self._table, block.take(chosen)]
        keys, rows = np.concatenate([self._keys, keys[chosen]]), np.concatenate([self.rows, rows[chosen]])
        best = np.sort(np.argsort(keys, kind="stable")[: self.size])
        # A copy, so that the blocks are freed.
        self._table, self._keys, self.rows = pa.concat_tables(parts).take(best), keys[best], rows[best]

    def table(self) -> datasets.Dataset:
        import datasets

        assert self._table is not None
        return datasets.Dataset(self._table)


def survey(rows: StreamRows, target: TargetReader, readers: Mapping[str, ModalityReader]) -> tuple[RowSample, str, int]:
    """Reads a stream once.

    Args:
        rows: the stream; its counts are set.
        target: observes all rows.
        readers: observe the training rows.

    Returns:
        A sample of the training rows, a digest of the data, and how often the target differs from that of the row
        before in the training rows of a shard.
    """
    sample, changes, digested = RowSample(), 0, 0
    digest = hashlib.sha256()
    for block, numbers, split in rows.scan():
        target.observe(block, numbers)
        if digested < DIGESTED:
            cells = block.select(target.columns).slice(0, DIGESTED - digested).to_pylist()
            digest.update(json.dumps(cells, default=str, sort_keys=True).encode())
            digested += len(cells)
        chosen = split == SPLITS.index("train")
        if chosen.any():
            part = block if chosen.all() else block.filter(chosen)
            for reader in readers.values():
                reader.observe(part, numbers[chosen])
            sample.add(part, numbers[chosen])
            cells = part.column(target.columns[0]).to_pylist()
            changes += sum(one != other for one, other in pairwise(cells))
    schema = {name: str(kind) for name, kind in rows.source.head.features.items() if name in rows.columns}
    digest.update(json.dumps([schema, rows.sizes.tolist(), list(rows.source.parts)], sort_keys=True).encode())
    return sample, digest.hexdigest()[:16], changes
