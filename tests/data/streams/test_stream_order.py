"""The order of a stream against a list of all rows: every row once, shards read by the processes that need them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.streams.stream_order import LANES, StreamOrder


def shards(lengths, opened=None, size=3):
    """Returns a function that reads a shard in tables of a few rows; row = 1000 * shard + place."""

    def read(shard):
        if opened is not None:
            opened.append(shard)
        rows = np.arange(lengths[shard]) + 1000 * shard
        for start in range(0, len(rows), size):
            yield pa.table({"row": rows[start : start + size]})

    return read


def everything(lengths):
    return [1000 * shard + index for shard, length in enumerate(lengths) for index in range(length)]


def rows(order, positions):
    return order.take(np.asarray(positions)).column("row").to_pylist()


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(any), buffer=st.integers(1, 40),
    seed=st.integers(0, 9), size=st.integers(1, 9),
)  # fmt: skip
def test_every_row_once_in_any_batches(lengths, buffer, seed, size):
    total = sum(lengths)
    order = StreamOrder(lengths, shards(lengths), buffer_size=buffer, seed=(seed, 1))
    full = rows(order, range(total))
    assert sorted(full) == everything(lengths)
    again = StreamOrder(lengths, shards(lengths), buffer_size=buffer, seed=(seed, 1))
    batches = [range(start, min(start + size, total)) for start in range(0, total, size)]
    assert [row for batch in batches for row in rows(again, batch)] == full
    # Any other order of positions, also backward.
    backward = StreamOrder(lengths, shards(lengths), buffer_size=buffer, seed=(seed, 1))
    assert [rows(backward, batch) for batch in batches[::-1]] == [[full[p] for p in batch] for batch in batches[::-1]]


def test_stored_order():
    lengths = [3, 0, 5, 1]
    order = StreamOrder(lengths, shards(lengths), buffer_size=2, seed=None)
    assert rows(order, range(9)) == everything(lengths)
    assert rows(order, [7, 1, 7]) == [2004, 1, 2004]


def test_epochs_and_seeds_differ():
    lengths = [20] * 5
    result = [
        rows(StreamOrder(lengths, shards(lengths), buffer_size=50, seed=seed), range(100))
        for seed in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(one) for one in result}) == 3
    # Blocks mix the rows of all lanes from the start.
    assert len({row // 1000 for row in result[0][:20]}) == 5


@pytest.mark.parametrize("world", [2, 4])
def test_processes_open_only_their_shards(world):
    lengths = [10] * 16
    result = []
    for rank in range(world):
        opened = []
        order = StreamOrder(lengths, shards(lengths, opened), buffer_size=16, seed=(0, 0))
        result.append(rows(order, np.arange(160)[rank::world]))
        assert len(opened) == len(set(opened)) == 16 // world
    full = rows(StreamOrder(lengths, shards(lengths), buffer_size=16, seed=(0, 0)), range(160))
    assert [result[index % world][index // world] for index in range(160)] == full


def test_rows_in_memory_are_bounded():
    lengths = [1000] * 4
    order = StreamOrder(lengths, shards(lengths, size=10), buffer_size=100, seed=(0, 0))
    for start in range(0, 4000, 50):
        order.take(np.arange(start, start + 50))
        held = sum(len(block) for lane in order._lanes.values() for _, block in lane._blocks)
        assert held <= 2 * 100 + LANES


def test_a_stream_that_ends_early_is_an_error():
    order = StreamOrder([5, 9], shards([5, 4]), buffer_size=4, seed=None)
    with pytest.raises(IndexError, match="ended after 9 rows instead of 14"):
        order.take(np.array([13]))
