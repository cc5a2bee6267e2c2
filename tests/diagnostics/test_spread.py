"""Entropies, spread of shares and their correlation with quality, against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from equipoise.diagnostics.share_spread_test import (
    attention_entropy,
    share_entropy,
    share_quality_correlation,
    share_spread,
)
from equipoise.errors import ShapeError
from helpers.tolerance import TOL
from oracles.plain import mean

EXACT = TOL[torch.float64]
SAMPLES, HEADS, QUERIES, KEYS = 7, 2, 3, 5


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_shares(seed, count, samples=SAMPLES, heads=HEADS):
    scores = torch.randn(samples, heads, count + 1, generator=generator(seed), dtype=torch.float64)
    return scores.softmax(dim=-1)[..., :count]


def entropy(weights):
    return -sum(weight * math.log(weight) for weight in weights if weight > 0)


def deviation(values):
    return math.sqrt(mean((value - mean(values)) ** 2 for value in values)) if values else math.nan


@pytest.mark.parametrize("kind", ["none", "keys", "causal"])
def test_attention_against_loops(kind):
    scores = torch.randn(SAMPLES, HEADS, QUERIES, KEYS, generator=generator(0), dtype=torch.float64)
    seen, mask = torch.ones(SAMPLES, QUERIES, KEYS, dtype=torch.bool), None
    if kind == "keys":
        mask = torch.rand(SAMPLES, KEYS, generator=generator(1)) < 0.5
        mask[0] = False
        seen = mask[:, None].expand(-1, QUERIES, -1)
    if kind == "causal":
        mask = seen = torch.ones(SAMPLES, QUERIES, KEYS).tril().bool()
    attention = scores.masked_fill(~seen[:, None], -math.inf).softmax(dim=-1)
    plain, normalized = torch.empty(2, SAMPLES, HEADS, QUERIES, dtype=torch.float64)
    for b in range(SAMPLES):
        for h in range(HEADS):
            for i in range(QUERIES):
                weights = attention[b, h, i][seen[b, i]].tolist()
                plain[b, h, i] = entropy(weights) if weights else math.nan
                normalized[b, h, i] = entropy(weights) / math.log(len(weights)) if len(weights) > 1 else math.nan
    torch.testing.assert_close(attention_entropy(attention, mask=mask), plain, equal_nan=True, **EXACT)
    result = attention_entropy(attention, mask=mask, normalized=True)
    torch.testing.assert_close(result, normalized, equal_nan=True, **EXACT)
    if kind == "causal":
        assert bool((plain[..., 0] == 0).all() & normalized[..., 0].isnan().all())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_share_entropy_against_loops(count):
    share = random_shares(0, count)
    share[0, 0] = 0.0
    share[0, 1] = torch.eye(count)[0]
    expected = torch.empty(SAMPLES, HEADS, dtype=torch.float64)
    for b in range(SAMPLES):
        for h in range(HEADS):
            row = share[b, h].tolist()
            expected[b, h] = entropy([part / sum(row) for part in row]) if sum(row) else math.nan
    torch.testing.assert_close(share_entropy(share), expected, equal_nan=True, **EXACT)
    assert share_entropy(share)[0, 1] == 0
    expected = expected / math.log(count) if count > 1 else expected * math.nan
    torch.testing.assert_close(share_entropy(share, normalized=True), expected, equal_nan=True, **EXACT)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_entropy_bounds(seed, count):
    share = random_shares(seed, count)
    assert bool(((share_entropy(share) >= 0) & (share_entropy(share) <= math.log(count))).all())
    order = torch.randperm(count, generator=generator(seed))
    torch.testing.assert_close(share_entropy(share[..., order]), share_entropy(share), **EXACT)
    even = torch.full((SAMPLES, HEADS, QUERIES, KEYS), 1 / KEYS, dtype=torch.float64)
    torch.testing.assert_close(attention_entropy(even), (even[..., 0] * 0) + math.log(KEYS), **EXACT)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_spread_against_loops(count):
    share = random_shares(1, count)
    share[::3, :, -1] = math.nan
    result = share_spread(share)
    for m in range(count):
        there = [sample for sample in share[..., m].tolist() if not math.isnan(sample[0])]
        assert result.samples[m] == len(there)
        assert float(result.spread[m]) == pytest.approx(deviation([mean(sample) for sample in there]))
        for head in range(HEADS):
            assert float(result.per_head[head, m]) == pytest.approx(deviation([sample[head] for sample in there]))


def test_spread_by_hand():
    against = torch.tensor([[[0.2], [0.8]], [[0.8], [0.2]]])
    result = share_spread(against)
    assert float(result.spread[0]) == 0.0
    assert result.per_head.tolist() == [[pytest.approx(0.3)], [pytest.approx(0.3)]]
    assert share_spread(against[:1]).per_head.tolist() == [[0.0], [0.0]]
    absent = share_spread(torch.tensor([[[0.5, math.nan]], [[0.25, math.nan]]]))
    assert absent.samples.tolist() == [2, 0]
    assert absent.spread.isnan().tolist() == [False, True]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_quality_against_scipy(count):
    share, quality = (
        random_shares(2, count, samples=13),
        torch.randn(13, count, generator=generator(3), dtype=torch.float64),
    )
    share[4, :, 0] = math.nan
    quality[7, 0] = math.nan
    result = share_quality_correlation(share, quality)
    for m in range(count):
        pairs = [
            (mean(sample), better)
            for sample, better in zip(share[..., m].tolist(), quality[:, m].tolist(), strict=True)
            if not math.isnan(mean(sample) + better)
        ]
        expected = stats.pearsonr(*zip(*pairs, strict=True))
        assert result.samples[m] == len(pairs) == (11 if m == 0 else 13)
        assert float(result.r[m]) == pytest.approx(expected.statistic)
        assert float(result.p[m]) == pytest.approx(expected.pvalue)


def test_constant_quality_is_undefined():
    share = random_shares(0, 2)
    for quality in (torch.ones(SAMPLES, 2), torch.full((SAMPLES, 2), math.nan)):
        result = share_quality_correlation(share, quality)
        assert bool(result.r.isnan().all() & result.p.isnan().all())
    assert bool(share_quality_correlation(share[:2], torch.arange(4.0).view(2, 2)).r.isnan().all())
    rising = torch.arange(1, SAMPLES + 1)[:, None].expand(-1, 2)
    share = torch.stack([rising[:, :1], -rising[:, :1]], dim=-1) / 100
    assert share_quality_correlation(share, rising).r.tolist() == pytest.approx([1.0, -1.0])


def test_errors():
    attention = torch.ones(2, 3, 5, 7)
    for wrong in (attention[0], (attention, attention), attention[..., :0]):
        with pytest.raises(ShapeError, match=r"attention_entropy attention: .*\(batch, head, query, key\)"):
            attention_entropy(wrong)
    with pytest.raises(ShapeError, match=r"attention_entropy mask: .*\(batch, query, key\) = \(2, 5, 7\)"):
        attention_entropy(attention, mask=torch.ones(5, 7, dtype=torch.bool))
    for wrong in (torch.zeros(3, 0), torch.zeros(3).long(), torch.tensor(0.5)):
        with pytest.raises(ShapeError, match=r"share_entropy: expected a float tensor of shape \(\.\.\., modality\)"):
            share_entropy(wrong)
    share = torch.ones(5, 2, 3)
    for wrong in (share[:, 0], share[:0], share.long()):
        for who, call in (("share_spread", share_spread), ("share_quality_correlation", quality_of)):
            with pytest.raises(ShapeError, match=rf"{who} share: .*\(sample, head, modality\).* Is the split empty\?"):
                call(wrong)
    with pytest.raises(ShapeError, match=r"quality: expected shape \(sample, modality\) = \(5, 3\), got shape \(5,\)"):
        share_quality_correlation(share, torch.ones(5))


def quality_of(share):
    return share_quality_correlation(share, torch.ones(5, 3))
