"""CounterRNG: numbers depend on seed, epoch, index, salt and purpose only."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.counter_rng import CounterRNG
from helpers.tolerance import TOL
from oracles import data as oracles_data


def test_bits_match_published_splitmix64():
    draw = CounterRNG(seed=3, epoch=5, index=torch.tensor([11]))
    first = draw._bits("hiss", 7)[0].tolist()
    # One step of the generator undone: the stream's start is what the first word came from.
    state = _unmixed(first[0]) - 0x9E3779B97F4A7C15
    assert first == oracles_data.splitmix64(state % 2**64, 7)


def _unmixed(word: int) -> int:
    """The inverse of the finalizer, by inverse multipliers and repeated shifts."""
    mask = 2**64 - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        undone = word
        for _ in range(3):
            undone = word ^ (undone >> shift)
        word = undone * pow(factor, -1, 2**64) & mask
    return word


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 2**40), st.integers(0, 1000))
def test_numbers_of_a_sample_do_not_depend_on_the_batch(order, seed, epoch):
    full = CounterRNG(seed, epoch, torch.arange(7)).normal("hiss", 3, 5)
    some = torch.tensor(order[:4])
    assert torch.equal(CounterRNG(seed, epoch, some).normal("hiss", 3, 5), full[some])


def test_numbers_depend_on_every_part_of_the_key():
    index = torch.arange(3)
    draws = [
        CounterRNG(0, 0, index).normal("a", 5),
        CounterRNG(1, 0, index).normal("a", 5),
        CounterRNG(0, 1, index).normal("a", 5),
        CounterRNG(0, 0, index, "val").normal("a", 5),
        CounterRNG(0, 0, index).normal("b", 5),
        CounterRNG(0, 0, index + 3).normal("a", 5),
    ]
    values = torch.cat([draw.flatten() for draw in draws])
    assert len(values.unique()) == len(values)


def test_normal_and_uniform_have_their_moments():
    index = torch.arange(1009)
    normal = CounterRNG(7, 2, index).normal("hiss", 101).double()
    uniform = CounterRNG(7, 2, index).uniform("values", 101).double()
    # Five standard errors of each estimate over n = 101,909 values.
    error = 5 / normal.numel() ** 0.5
    assert abs(normal.mean()) < error
    assert abs(normal.var() - 1) < error * 2**0.5
    assert abs((normal**4).mean() - 3) < error * 96**0.5
    assert abs(uniform.mean() - 0.5) < error * 12**-0.5
    assert 0 <= uniform.min() < uniform.max() < 1
    neighbors = torch.corrcoef(normal[:, :2].T)[0, 1]
    assert abs(neighbors) < 5 / 1009**0.5


def test_odd_counts_and_shapes():
    draw = CounterRNG(0, 0, torch.arange(2))
    assert draw.normal("hiss", 3, 5).shape == (2, 3, 5)
    assert draw.normal("hiss", 1).shape == (2, 1)
    assert draw.uniform("values").shape == (2,)
    torch.testing.assert_close(
        draw.normal("hiss", 15).reshape(2, 3, 5), draw.normal("hiss", 3, 5), **TOL[torch.float32]
    )


def test_global_rng_is_not_used():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = CounterRNG(0, 0, torch.arange(3)).normal("hiss", 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(CounterRNG(0, 0, torch.arange(3)).normal("hiss", 5), first)
