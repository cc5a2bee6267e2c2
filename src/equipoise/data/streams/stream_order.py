"""Order in which the rows of a stream are read: interleaved shards, and shuffled blocks of rows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow

LANES = 8
"""Shards of a training split that are read in turns; a constant, so that the order does not depend on the hardware."""

ReadShard = Callable[[int], Iterator["pyarrow.Table"]]


class Lane:
    """Reads some shards one after the other; with a seed, rows are shuffled in blocks.

    Memory: two blocks.

    Args:
        tables: rows in stored order.
        size: rows of a shuffled block; the first one is shorter by a random number, so that rows of neighboring blocks
            are mixed in other epochs.
        seed: seed of the order of rows; None keeps it.
    """

    def __init__(self, tables: Generator[pyarrow.Table, None, None], size: int, seed: Sequence[int] | None) -> None:
        self._tables, self._size = tables, size
        # Arrow's readers must end before the interpreter does.
        weakref.finalize(self, tables.close)
        self._random = None if seed is None else np.random.default_rng(list(seed))
        self._rest: pyarrow.Table | None = None
        self._blocks: list[tuple[int, pyarrow.Table]] = []
        self._stop = 0

    @property
    def first(self) -> int:
        """Returns the first row that can still be read."""
        return self._blocks[0][0] if self._blocks else 0

    def take(self, rows: np.ndarray) -> pyarrow.Table:
        """Returns rows, given by increasing positions in this lane."""
        import pyarrow as pa

        parts = []
        while len(rows):
            for first, block in self._blocks:
                chosen = rows[(rows >= first) & (rows < first + len(block))]
                if len(chosen):
                    parts.append(block.take(chosen - first))
            rows = rows[rows >= self._stop]
            if len(rows) and not self._next():
                raise IndexError(f"a stream ended after {self._stop} rows instead of {rows[-1] + 1}")
        return pa.concat_tables(parts)

    def _next(self) -> bool:
        """Reads the next block; returns False at the end."""
        import pyarrow as pa

        size = self._size
        if self._random is not None and not self._stop:
            size = int(self._random.integers(1, self._size, endpoint=True))
        parts = [] if self._rest is None else [self._rest]
        count = sum(map(len, parts))
        while count < size and (table := next(self._tables, None)) is not None:
            parts.append(table)
            count += len(table)
        if not count:
            return False
        whole = pa.concat_tables(parts)
        block, self._rest = whole.slice(0, size), whole.slice(size) if count > size else None
        if self._random is not None:
            block = block.take(self._random.permutation(len(block)))
        self._blocks = [*self._blocks[-1:], (self._stop, block)]
        self._stop += len(block)
        return True


class StreamOrder:
    """The rows of a split in the order of one epoch, a function of the seed, the epoch and the shards alone.

    Shards are permuted and dealt to up to ``LANES`` lanes, which are read in turns: row p of the epoch comes from lane
    p modulo the number of lanes until a lane ends. Each lane shuffles blocks of ``buffer_size`` / lanes rows. A process
    that reads every n-th row opens only the shards of its own lanes if n divides the number of lanes; otherwise all
    processes read all shards and skip the rows of the others.

    Args:
        lengths: rows of the split in each shard.
        read: number of a shard -> tables with its rows of the split, in order.
        buffer_size: rows that are shuffled together.
        seed: (seed, epoch); None for the stored order.
    """

    def __init__(
        self, lengths: Sequence[int], read: ReadShard, *, buffer_size: int, seed: tuple[int, int] | None
    ) -> None:
        used = np.flatnonzero(lengths)
        order = used if seed is None else np.random.default_rng([*seed, 0]).permutation(used)
        count = 1 if seed is None else max(1, min(LANES, len(order)))
        self._shards = [order[lane::count].tolist() for lane in range(count)]
        self._read, self._seed = read, seed
        self._block = max(1, buffer_size // count)
        self._lanes: dict[int, Lane] = {}
        totals = np.array([sum(lengths[shard] for shard in shards) for shards in self._shards])
        # Rounds of turns between the ends of two lanes: first position, first round, lanes.
        self._phases: list[tuple[int, int, np.ndarray]] = []
        position = rounds = 0
        for end in np.unique(totals):
            active = np.flatnonzero(totals > rounds)
            self._phases.append((position, rounds, active))
            position, rounds = position + (int(end) - rounds) * len(active), int(end)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lane of each position of the epoch, and the row of that lane."""
        phase = np.searchsorted([first for first, _, _ in self._phases], positions, side="right") - 1
        lane, row = np.zeros_like(positions), np.zeros_like(positions)
        for number in np.unique(phase):
            first, start, active = self._phases[number]
            chosen = phase == number
            lane[chosen] = active[(positions[chosen] - first) % len(active)]
            row[chosen] = start + (positions[chosen] - first) // len(active)
        return lane, row

    def take(self, positions: np.ndarray) -> pyarrow.Table:
        """Returns rows by their positions in the epoch; fast for increasing positions, others are read again."""
        import pyarrow as pa

        lane, row = self.locate(positions)
        parts, places = [], []
        for number in np.unique(lane):
            chosen = np.flatnonzero(lane == number)
            chosen = chosen[np.argsort(row[chosen], kind="stable")]
            reader = self._lanes.get(number)
            if reader is None or row[chosen[0]] < reader.first:
                reader = self._lanes[number] = self._open(int(number))
            parts.append(reader.take(row[chosen]))
            places.append(chosen)
        return pa.concat_tables(parts).take(np.argsort(np.concatenate(places)))

    def _open(self, lane: int) -> Lane:
        tables = (table for shard in self._shards[lane] for table in self._read(shard))
        return Lane(tables, self._block, None if self._seed is None else (*self._seed, 1, lane))
