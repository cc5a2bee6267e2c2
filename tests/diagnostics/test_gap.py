"""The attention gap against loops over queries and keys: shares, masks, weights, and where there is none."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.diagnostics.attention_gap_test import attention_gap, gap_from_attention, share_table
from equipoise.errors import ConfigError, ShapeError
from helpers.tolerance import TOL
from oracles.plain import mean

EXACT = TOL[torch.float64]
LAYERS, BATCH, HEADS, TOKENS = 2, 3, 5, 11


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_shares(seed, count, *lead):
    """Shares that leave something to special tokens."""
    scores = torch.randn(*lead, count, count + 1, generator=generator(seed), dtype=torch.float64)
    return scores.softmax(dim=-1)[..., :count]


def expected_gap(own, cross):
    return 100 * abs(own - cross) / (own + cross)


def masked_attention(seed, seen):
    """Attention of LAYERS layers under a mask (batch, query, key)."""
    scores = torch.randn(LAYERS, BATCH, HEADS, TOKENS, TOKENS, generator=generator(seed), dtype=torch.float64)
    # A query that sees nothing is NaN after softmax, as some models leave it.
    return scores.masked_fill(~seen[:, None], -math.inf).softmax(dim=-1)


def slow_gap(attention, labels, count, seen, per_token):
    """Loops over the queries that see both kinds of keys, the mean of the heads first."""
    result = []
    for m in range(count):
        layers = []
        for layer in attention.mean(dim=2).tolist():
            own, cross = [], []
            for b, sample in enumerate(layer):
                for i, row in enumerate(sample):
                    keys = [j for j in range(TOKENS) if seen[b, i, j] and labels[b, j] >= 0]
                    kinds = [[row[j] for j in keys if bool(labels[b, j] == m) is same] for same in (True, False)]
                    if labels[b, i] == m and all(kinds):
                        for sums, kind in zip((own, cross), kinds, strict=True):
                            sums.append(sum(kind) / (len(kind) if per_token else 1))
            if own:
                layers.append(expected_gap(mean(own), mean(cross)))
        result.append(mean(layers) if layers else math.nan)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("normalize", ["mass", "per_token"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["none", "keys", "causal"])
def test_from_attention_against_loops(count, kind, normalize):
    labels = torch.randint(-1, count, (BATCH, TOKENS), generator=generator(count))
    valid = torch.rand(BATCH, TOKENS, generator=generator(1)) < 0.8
    if kind == "keys":
        mask, seen = valid, valid[:, None] & valid[:, :, None]
        labels_left = labels.masked_fill(~valid, -1)
    else:
        mask = None if kind == "none" else torch.ones(BATCH, TOKENS, TOKENS).tril().bool() & valid[:, None]
        seen = torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool) if mask is None else mask
        labels_left = labels
    attention = masked_attention(0, seen)
    actual = gap_from_attention(list(attention), labels, count, mask, normalize=normalize)
    expected = slow_gap(attention.nan_to_num(), labels_left, count, seen, normalize == "per_token")
    torch.testing.assert_close(actual, expected, equal_nan=True, **EXACT)
    assert bool(actual.isnan().all()) is (count == 1)
    result = share_table(list(attention), labels, count, mask)
    if normalize == "mass":
        torch.testing.assert_close(
            attention_gap(result.share, weights=result.rows[:, None]), expected, equal_nan=True, **EXACT
        )


def test_share_table_against_loops():
    labels = torch.randint(-1, 3, (BATCH, TOKENS), generator=generator(2))
    labels[1] = labels[1].masked_fill(labels[1] == 2, 0)
    seen = torch.ones(BATCH, TOKENS, TOKENS).tril().bool()
    attention = masked_attention(1, seen)
    result = share_table(list(attention), labels, 3, seen)
    for b in range(BATCH):
        for m in range(3):
            rows = []
            for i in range(TOKENS):
                kinds = {int(label) == m for label in labels[b, : i + 1] if label >= 0}
                if labels[b, i] == m and kinds == {True, False}:
                    rows.append(i)
            assert result.rows[b, m] == len(rows)
            for n in range(3):
                shares = [attention[:, b, :, i, labels[b] == n].sum(dim=-1) for i in rows]
                expected = mean(shares) if rows else torch.full((LAYERS, HEADS), math.nan).double()
                torch.testing.assert_close(result.share[:, b, :, m, n], expected, equal_nan=True, **EXACT)
    assert result.rows[1, 2] == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_gap_of_shares_against_loops(count):
    share = random_shares(0, count, 2, 3, 7)
    counts = torch.randint(0, 4, share.shape, generator=generator(1))
    weights = torch.rand(share.shape[:-1], generator=generator(2), dtype=torch.float64).round(decimals=1)
    for per_token in (False, True):
        expected = []
        for m in range(count):
            layers = []
            for layer in range(2):
                own = cross = 0.0
                for sample in range(3):
                    for head in range(7):
                        row, keys = share[layer, sample, head, m].tolist(), counts[layer, sample, head, m].tolist()
                        others = [n for n in range(count) if n != m]
                        rest = sum(keys[n] for n in others)
                        weight = float(weights[layer, sample, head, m])
                        if keys[m] and rest:
                            own += weight * row[m] / (keys[m] if per_token else 1)
                            cross += weight * sum(row[n] for n in others) / (rest if per_token else 1)
                layers.append(expected_gap(own, cross))
            expected.append(mean(layers))
        result = attention_gap(share, weights=weights, counts=counts, normalize="per_token" if per_token else "mass")
        torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_averaging_order_of_heads_samples_and_layers():
    two = torch.tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]])
    assert attention_gap(two).tolist() == [0.0, 0.0]
    assert attention_gap(two[:, None]).tolist() == [0.0, 0.0]
    assert attention_gap(two[:, None, None]).tolist() == [50.0, 0.0]
    assert attention_gap(torch.tensor([[0.0, 0.5], [0.0, 0.25]])).tolist() == [100.0, 100.0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_properties(seed, count):
    share = random_shares(seed, count, LAYERS, BATCH, HEADS)
    result = attention_gap(share)
    assert bool(((result >= 0) & (result <= 100)).all())
    order = torch.randperm(count, generator=generator(seed))
    torch.testing.assert_close(attention_gap(share[..., order, :][..., order]), result[order], **EXACT)
    torch.testing.assert_close(attention_gap(share * 0.5), result, **EXACT)
    torch.testing.assert_close(attention_gap(share.mean(dim=2, keepdim=True)), result, **EXACT)
    for extra in (1, 2, 3):
        alone = share[(0,) * extra]
        torch.testing.assert_close(attention_gap(alone), attention_gap(alone[(None,) * extra]), **EXACT)


def test_absent_modalities_are_excluded_and_invalid_shares_raise():
    share = random_shares(0, 2, BATCH, HEADS)
    lacking = torch.cat([share, torch.full((1, HEADS, 2, 2), math.nan).double()])
    torch.testing.assert_close(attention_gap(lacking), attention_gap(share), **EXACT)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]
    torch.testing.assert_close(attention_gap(lacking, weights=weights), attention_gap(share), **EXACT)
    assert bool(attention_gap(lacking, weights=weights + 1).isnan().all())
    half = share.clone()
    half[0, 0, 0, 1] = math.nan
    assert attention_gap(half).isnan().tolist() == [True, False]
    assert bool(attention_gap(torch.full((2, 2), math.nan)).isnan().all())
    assert bool(attention_gap(torch.tensor([[0.7]])).isnan())
    assert bool(attention_gap(torch.zeros(2, 2)).isnan().all())
    attention = torch.full((1, 1, 3, 3), 1 / 3)
    attention[0, 0, 0] = math.nan
    assert gap_from_attention(attention, torch.tensor([0, 0, 1])).isnan().tolist() == [True, False]
    # The readout alone looks across: no query of a modality does.
    one_way = torch.tensor([[[True, True, True], [False, True, False], [False, False, True]]])
    assert bool(gap_from_attention(attention, torch.tensor([-1, 0, 1]), mask=one_way).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype):
    share = random_shares(0, 3, 257, HEADS).to(dtype)
    single = TOL[torch.float32]
    torch.testing.assert_close(attention_gap(share), attention_gap(share.double()).float(), **single)
    attention = masked_attention(0, torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool))[0].to(dtype)
    labels = torch.arange(TOKENS) % 3
    expected = gap_from_attention(attention.double(), labels)
    torch.testing.assert_close(gap_from_attention(attention, labels), expected.float(), **single)


def test_layers_attending_to_special_tokens_only_are_excluded():
    share = torch.stack([torch.tensor([[0.75, 0.25], [0.25, 0.25]]), torch.zeros(2, 2)])[:, None, None]
    assert attention_gap(share).tolist() == [50.0, 0.0]


def test_errors():
    share = random_shares(0, 3, 2)
    for wrong, got in (
        (share[..., :2], r"shape \(2, 3, 2\)"),
        (share[0, 0], r"shape \(3,\)"),
        (share.long(), ".*int64"),
    ):
        with pytest.raises(
            ShapeError, match=rf"attention_gap share: expected a float .*modality, modality\).*got {got}"
        ):
            attention_gap(wrong)
    with pytest.raises(ShapeError, match=r"attention_gap weights: .* broadcasts to \(1, 1, 2, 3\), got shape \(2,\)"):
        attention_gap(share, weights=torch.ones(2))
    with pytest.raises(ShapeError, match=r"attention_gap counts: .* broadcasts to \(1, 1, 2, 3, 3\), got shape \(2,\)"):
        attention_gap(share, counts=torch.ones(2))
    with pytest.raises(ConfigError, match=r"attention_gap: expected counts for normalize 'per_token', got none\. Give"):
        attention_gap(share, normalize="per_token")
    attention, labels = torch.ones(2, 3, 5, 5), torch.zeros(5).long()
    with pytest.raises(ConfigError, match=r"attention_gap: expected normalize 'mass' or 'per_token', got 'mean'"):
        attention_gap(share, normalize="mean")
    with pytest.raises(ConfigError, match=r"gap_from_attention: expected normalize 'mass' or 'per_token', got 'mean'"):
        gap_from_attention(attention, labels, normalize="mean")
    for who, call in (("gap_from_attention", gap_from_attention), ("share_table", share_table)):
        with pytest.raises(ShapeError, match=rf"{who} attention: expected self-attention, .*, got query = 1, key = 5"):
            call(attention[:, :, :1], labels)
        with pytest.raises(
            ShapeError, match=rf"{who} attention: .*\(batch, head, query, key\), .*got shape \(3, 5, 5\)"
        ):
            call(attention[0], labels)
        with pytest.raises(
            ShapeError, match=rf"{who} mask: .*\(batch, key\) = \(2, 5\) or \(batch, query, key\) = \(2"
        ):
            call(attention, labels, mask=torch.ones(5, 5, dtype=torch.bool))
        with pytest.raises(ShapeError, match=rf"{who} modality: expected integer labels"):
            call(attention, torch.zeros(4).long())
