"""ResumableBatchSampler: batches that several processes share."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from equipoise.data.resumable_sampler import ResumableBatchSampler
from equipoise.errors import ConfigError


def sampler_batches(*args, epoch=0, **kwargs):
    order = ResumableBatchSampler(*args, **kwargs)
    order.set_epoch(epoch)
    got = list(order)
    assert len(order) == len(got)
    assert all(at == epoch for at, _ in got)
    return [index.tolist() for _, index in got]


def test_evaluation_keeps_the_order():
    assert sampler_batches(7, 3, seed=0, shuffle=False) == [[0, 1, 2], [3, 4, 5], [6]]
    assert sampler_batches(7, 3, seed=0, shuffle=False, drop_last=True) == [[0, 1, 2], [3, 4, 5]]


def test_order_depends_on_seed_and_epoch_only():
    torch.manual_seed(0)
    first = sampler_batches(101, 11, seed=3, shuffle=True, epoch=2)
    torch.manual_seed(1)
    assert sampler_batches(101, 11, seed=3, shuffle=True, epoch=2) == first
    assert sampler_batches(101, 11, seed=3, shuffle=True, epoch=3) != first
    assert sampler_batches(101, 11, seed=4, shuffle=True, epoch=2) != first
    assert sorted(chain(*first)) == list(range(101))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 97), st.integers(1, 7), st.integers(1, 5), st.booleans())
def test_processes_share_each_training_batch_equally(size, part, world, drop_last):
    size += world
    options = {"seed": 0, "shuffle": True, "drop_last": drop_last}
    alone = sampler_batches(size, part * world, **options)
    shared = [sampler_batches(size, part * world, **options, rank=rank, world=world) for rank in range(world)]
    assert len({len(own) for own in shared}) == 1
    for number, parts in enumerate(zip(*shared, strict=True)):
        assert len({len(part) for part in parts}) == 1
        together = sorted(chain(*parts))
        assert set(together) <= set(alone[number])
        assert len(alone[number]) - len(together) < world
        assert len(together) == len(set(together))
    assert size - sum(len(batch) for own in shared for batch in own) < (part * world if drop_last else world)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 97), st.integers(5, 23), st.integers(1, 5))
def test_evaluation_on_processes_sees_every_sample_once(size, batch_size, world):
    size += world
    shared = [sampler_batches(size, batch_size, seed=0, shuffle=False, rank=r, world=world) for r in range(world)]
    assert sorted(index for own in shared for batch in own for index in batch) == list(range(size))
    assert len({len(own) for own in shared}) == 1
    assert all(batch for own in shared for batch in own)


def test_frameworks_recognize_a_distributed_sampler():
    assert isinstance(ResumableBatchSampler(5, 2, seed=0, shuffle=True), DistributedSampler)


def test_errors():
    with pytest.raises(ConfigError, match="ResumableBatchSampler: expected batch_size >= 1, got 0"):
        ResumableBatchSampler(5, 0, seed=0, shuffle=True)
    with pytest.raises(ConfigError, match=r"a batch_size that 2 processes share equally, got 3.*multiple"):
        len(ResumableBatchSampler(7, 3, seed=0, shuffle=True, rank=0, world=2))
    with pytest.raises(ConfigError, match="a batch_size of at least 5, one sample for each process, got 3"):
        len(ResumableBatchSampler(7, 3, seed=0, shuffle=False, rank=0, world=5))


def test_repeated_batches_never_share_an_optimizer_step():
    # 7 batches in groups of 3, each repeated: the seventh is dropped, since its repetitions would share a step.
    got = sampler_batches(20, 3, seed=0, shuffle=True, steps_per_batch=2, group=3)
    full = sampler_batches(20, 3, seed=0, shuffle=True)
    assert got == full[:3] * 2 + full[3:6] * 2
    assert sampler_batches(20, 3, seed=0, shuffle=True, steps_per_batch=1, group=3) == full
    with pytest.raises(
        ConfigError, match=r"with steps_per_batch > 1, at least 3 batches per epoch.*got 2\. Lower train\.accumulate"
    ):
        len(ResumableBatchSampler(5, 3, seed=0, shuffle=True, steps_per_batch=2, group=3))
