"""Sparse attention patterns against loops over pairs, and linear attention against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.alignment.connectors import sparse_patterns
from equipoise.alignment.connectors.linear_attention import linear_attend
from equipoise.errors import ConfigError, ShapeError
from equipoise.nn.attention import attend
from helpers.tolerance import TOL
from oracles import align as slow

EXACT = TOL[torch.float64]
RULES = {
    "local": (lambda q, k: sparse_patterns.local(q, k, width=2), lambda i, j: abs(i - j) <= 2),
    "dilated": (lambda q, k: sparse_patterns.dilated(q, k, width=2, step=3), lambda i, j: abs(i - j) in (0, 3, 6)),
    "strided": (lambda q, k: sparse_patterns.strided(q, k, step=3), lambda i, j: j in (0, 3, 6, 9, 12)),
    "block": (lambda q, k: sparse_patterns.block_diagonal(q, k, block=3), lambda i, j: i // 3 == j // 3),
    "global": (lambda q, k: sparse_patterns.global_tokens(q, k, count=2), lambda i, j: i < 2 or j < 2),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 11), (11, 5), (1, 1), (0, 3)])
def test_patterns(name, queries, keys):
    build, rule = RULES[name]
    result = build(queries, keys)
    expected = [[rule(i, j) for j in range(keys)] for i in range(queries)]
    assert result.mask.tolist() == expected
    pairs = sum(sum(row) for row in expected)
    assert result.pairs == pairs
    assert result.density == (pairs / (queries * keys) if queries * keys else 0.0)


def test_random_keys():
    result = sparse_patterns.random_keys(5, 11, count=3, seed=4)
    assert result.mask.sum(dim=1).tolist() == [3] * 5
    assert (result.pairs, result.density) == (15, 3 / 11)
    assert torch.equal(result.mask, sparse_patterns.random_keys(5, 11, count=3, seed=4).mask)
    assert not torch.equal(result.mask, sparse_patterns.random_keys(5, 11, count=3, seed=5).mask)
    assert sparse_patterns.random_keys(2, 3, count=7).density == 1.0
    state = torch.random.get_rng_state()
    sparse_patterns.random_keys(5, 11, count=3)
    assert torch.equal(torch.random.get_rng_state(), state)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9))
def test_top_k_includes_ties(seed, k):
    logits = torch.randint(5, (2, 3, 7), generator=torch.Generator().manual_seed(seed)).double()
    logits[0, 0, 2] = -torch.inf
    result = sparse_patterns.top_k(logits, k=k)
    for row, kept in zip(logits.flatten(0, 1).tolist(), result.mask.flatten(0, 1).tolist(), strict=True):
        least = sorted(row, reverse=True)[min(k, 7) - 1]
        assert kept == [x >= least and x > -np.inf for x in row]
    assert result.pairs == int(result.mask.sum())
    assert result.density == result.pairs / 42


def test_bottleneck_for_three_modalities():
    lengths, count = [2, 3, 1], 2
    labels = [0, 0, 1, 1, 1, 2, "shared", "shared"]
    expected = [[a == b or "shared" in (a, b) for b in labels] for a in labels]
    assert sparse_patterns.bottleneck(lengths, count=count).mask.tolist() == expected
    assert sparse_patterns.bottleneck([3], count=0).density == 1.0
    assert sparse_patterns.bottleneck([2, 2], count=0).density == 0.5


def test_patterns_combine():
    both = sparse_patterns.local(7, 7, width=1) | sparse_patterns.global_tokens(7, 7, count=1)
    either = sparse_patterns.local(7, 7, width=1).mask | sparse_patterns.global_tokens(7, 7, count=1).mask
    assert torch.equal(both.mask, either)
    assert both.pairs == int(either.sum())
    common = sparse_patterns.local(7, 7, width=1) & sparse_patterns.strided(7, 7, step=2)
    assert torch.equal(
        common.mask, sparse_patterns.local(7, 7, width=1).mask & sparse_patterns.strided(7, 7, step=2).mask
    )
    assert common.density == common.pairs / 49
    with pytest.raises(ShapeError, match=r"Pattern: expected \(query, key\) = \(7, 7\), got \(7, 5\)"):
        sparse_patterns.local(7, 7, width=1) | sparse_patterns.local(7, 5, width=1)


@pytest.mark.parametrize("name", RULES)
def test_attention_with_a_pattern_equals_masked_softmax(name):
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, 4, generator=random, dtype=torch.float64) for n in (5, 11, 11))
    pattern = RULES[name][0](5, 11)
    result = attend(query, key, value, mask=pattern.mask[None, None]).output[0, 0]
    expected = slow.soft_attention(*(x[0, 0].numpy() for x in (query, key, value)), pattern.mask.tolist())
    torch.testing.assert_close(result, torch.from_numpy(expected), **EXACT)


def test_linear_attention():
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, n, width, generator=random, dtype=torch.float64) for n, width in ((5, 4), (7, 4), (7, 2))
    )
    mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    result = linear_attend(query, key, value, mask=mask)
    assert float(result[1].abs().max()) == 0.0

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(x))

    for h in range(3):
        for i in range(5):
            weights = [phi(query[0, h, i].numpy()) @ phi(key[0, h, j].numpy()) for j in range(4)]
            expected = sum(w * value[0, h, j].numpy() for j, w in enumerate(weights)) / sum(weights)
            assert result[0, h, i].tolist() == pytest.approx(expected.tolist(), rel=EXACT["rtol"])
    leaves = [x.clone().requires_grad_() for x in (query[:1, :1], key[:1, :1], value[:1, :1])]
    assert torch.autograd.gradcheck(linear_attend, leaves)


def test_errors():
    with pytest.raises(ConfigError, match="dilated: expected width >= 0, got width = -1"):
        sparse_patterns.local(3, 3, width=-1)
    with pytest.raises(ConfigError, match="strided: expected step >= 1, got step = 0"):
        sparse_patterns.strided(3, 3, step=0)
    with pytest.raises(ConfigError, match="block_diagonal: expected block >= 1"):
        sparse_patterns.block_diagonal(3, 3, block=0)
    with pytest.raises(ConfigError, match="global_tokens: expected count >= 0"):
        sparse_patterns.global_tokens(3, 3, count=-1)
    with pytest.raises(ConfigError, match="random_keys: expected count >= 0"):
        sparse_patterns.random_keys(3, 3, count=-1)
    with pytest.raises(ConfigError, match="top_k: expected k >= 1"):
        sparse_patterns.top_k(torch.zeros(2, 2), k=0)
    with pytest.raises(ShapeError, match=r"top_k: expected floating logits \(..., query, key\)"):
        sparse_patterns.top_k(torch.zeros(2), k=1)
    with pytest.raises(ConfigError, match=r"bottleneck: expected the lengths of one or more modalities, got \[\]"):
        sparse_patterns.bottleneck([], count=1)
    one = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ShapeError, match=r"linear_attend key: expected .* got \(1, 2, 3, 5\) for \(1, 2, 3, 4\)"):
        linear_attend(one, torch.zeros(1, 2, 3, 5), one)
    with pytest.raises(ShapeError, match="linear_attend value: expected"):
        linear_attend(one, one, one[:, :, :2])
    with pytest.raises(ShapeError, match=r"linear_attend mask: expected \(batch, key\) = \(1, 3\), got \(1, 2\)"):
        linear_attend(one, one, one, mask=torch.ones(1, 2, dtype=torch.bool))
