"""Residuals and rank collapse against loops, what must leave them alone, and what has none."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.diagnostics.rank_collapse_test import rank_collapse, residual
from equipoise.errors import ConfigError, ShapeError
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
BATCH, TOKENS, DIMS = 3, 7, (5, 2)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frobenius(rows):
    return math.sqrt(sum(value * value for row in rows for value in row))


def composite(rows):
    columns = max(sum(abs(row[column]) for row in rows) for column in range(len(rows[0])))
    return math.sqrt(columns * max(sum(abs(value) for value in row) for row in rows))


def slow_residual(rows, size):
    """||res(X)|| / ||X|| of the tokens of one sample, a list of lists."""
    if not rows:
        return math.nan
    mean = [sum(row[column] for row in rows) / len(rows) for column in range(len(rows[0]))]
    rest = [[value - m for value, m in zip(row, mean, strict=True)] for row in rows]
    return size(rest) / size(rows) if size(rows) else 0.0


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("norm", "size"), [("frobenius", frobenius), ("composite", composite)])
def test_against_loops(norm, size, count):
    layers = [normal(seed, BATCH, TOKENS, dim) for seed, dim in enumerate(DIMS)]
    labels = torch.randint(-1, count, (BATCH, TOKENS), generator=torch.Generator().manual_seed(count))
    labels[1] = labels[1].masked_fill(labels[1] == count - 1, -1)
    mask = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.8
    # What is masked must not be looked at.
    broken = [layer.masked_fill(~mask[..., None], math.nan) for layer in layers]
    result = rank_collapse(broken, mask=mask, modality=labels, num_modalities=count, norm=norm)
    full, parts = torch.empty(2, BATCH).double(), torch.empty(2, BATCH, count).double()
    for index, layer in enumerate(layers):
        for b in range(BATCH):
            rows = [(row.tolist(), int(m)) for row, m, v in zip(layer[b], labels[b], mask[b], strict=True) if v]
            full[index, b] = slow_residual([row for row, _ in rows], size)
            for m in range(count):
                parts[index, b, m] = slow_residual([row for row, label in rows if label == m], size)
    torch.testing.assert_close(result.whole, full, **EXACT)
    torch.testing.assert_close(result.per_modality, parts, equal_nan=True, **EXACT)
    assert bool(parts[:, 1, -1].isnan().all())
    assert rank_collapse(layers, norm=norm).per_modality is None


def test_hand_computed_values():
    hidden = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]])
    assert rank_collapse(hidden).whole.tolist() == [[1.0]]
    # One modality is where its tokens cancel, the other is one token alone.
    result = rank_collapse(hidden, modality=torch.tensor([0, 0, 1, -1]))
    assert result.per_modality.tolist() == [[[1.0, 0.0]]]
    # res = (1, -1), X = (3, 1): sqrt(2 / 10), and sqrt((2 * 1) / (4 * 3)).
    pair = torch.tensor([[[3.0], [1.0]]])
    assert float(rank_collapse(pair).whole) == pytest.approx(math.sqrt(0.2))
    assert float(rank_collapse(pair, norm="composite").whole) == pytest.approx(math.sqrt(1 / 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equal_rows_have_zero_residual(dtype):
    row = normal(0, BATCH, 1, 5).to(dtype)
    assert residual(row.expand(-1, TOKENS, -1)).abs().max() == 0
    for norm in ("frobenius", "composite"):
        assert rank_collapse(row.expand(-1, TOKENS, -1), norm=norm).whole.abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["frobenius", "composite"]))
def test_properties(seed, norm):
    tokens, common = normal(seed, BATCH, TOKENS, 5), normal(seed + 1, BATCH, 1, 5)
    rest = residual(tokens)
    torch.testing.assert_close(residual(tokens + common), rest, **EXACT)
    torch.testing.assert_close(residual(rest), rest, **EXACT)
    torch.testing.assert_close(rest.sum(dim=1), torch.zeros(BATCH, 5).double(), **EXACT)
    full = rank_collapse(tokens, norm=norm).whole
    torch.testing.assert_close(rank_collapse(-3.0 * tokens, norm=norm).whole, full, **EXACT)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rank_collapse(tokens[:, order], norm=norm).whole, full, **EXACT)
    if norm == "frobenius":
        assert float(full.max()) <= 1.0


def test_padding_has_no_effect():
    tokens, labels = normal(0, BATCH, TOKENS, 5), torch.tensor([0, 0, 0, 1, 1, -1, 1])
    padded = torch.cat([normal(1, BATCH, 2, 5), tokens], dim=1)
    mask = torch.arange(TOKENS + 2).expand(BATCH, -1) >= 2
    padded_labels = torch.cat([torch.tensor([-1, -1]), labels])
    alone, result = rank_collapse(tokens, modality=labels), rank_collapse(padded, mask=mask, modality=padded_labels)
    torch.testing.assert_close(result.whole, alone.whole, **EXACT)
    torch.testing.assert_close(result.per_modality, alone.per_modality, **EXACT)


def test_uniform_attention_collapses_and_skip_connection_does_not():
    tokens = normal(0, BATCH, TOKENS, 5)
    query = torch.zeros(BATCH, 1, TOKENS, 5).double()
    attended = torch.nn.functional.scaled_dot_product_attention(query, tokens[:, None], tokens[:, None])[:, 0]
    before, after, with_shortcut = rank_collapse([tokens, attended, tokens + attended]).whole
    assert float(before.min()) > 0.5
    torch.testing.assert_close(after, torch.zeros(BATCH).double(), **EXACT)
    assert float(with_shortcut.min()) > 0.5


def test_zero_empty_and_nan_tokens():
    hidden = torch.zeros(3, 2, 5)
    hidden[2, 0, 0] = math.nan
    mask = torch.tensor([[True, True], [False, False], [True, True]])
    result = rank_collapse(hidden, mask=mask, modality=torch.tensor([0, 0]), num_modalities=2)
    assert result.whole[0].tolist() == pytest.approx([0.0, math.nan, math.nan], nan_ok=True)
    assert result.per_modality[0, 0].tolist() == pytest.approx([0.0, math.nan], nan_ok=True)
    assert rank_collapse(hidden, modality=torch.tensor([-1, -1])).per_modality.shape == (1, 3, 0)


def test_residual_is_differentiable_and_score_is_detached():
    tokens = normal(0, 2, 3, 5).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert torch.autograd.gradcheck(lambda x: residual(x, mask), (tokens,))
    assert not rank_collapse(tokens).whole.requires_grad


def test_errors():
    hidden = torch.zeros(3, 7, 5)
    with pytest.raises(ConfigError, match=r"rank_collapse: expected norm 'frobenius' or 'composite', got 'nuclear'"):
        rank_collapse(hidden, norm="nuclear")
    for wrong, got in ((hidden[0], r"shape \(7, 5\)"), (hidden.long(), r"shape .*torch.int64"), ([None], "NoneType")):
        with pytest.raises(ShapeError, match=rf"rank_collapse hidden: expected .*\(batch, token, dim\).* got {got}"):
            rank_collapse(wrong)
    with pytest.raises(ShapeError, match=r"the same first 2 sizes in all layers, got \(3, 7, 5\) and \(3, 6, 5\)"):
        rank_collapse([hidden, hidden[:, 1:]])
    with pytest.raises(ShapeError, match=r"without a size of 0, .*, got \(0, 7, 5\) and"):
        rank_collapse(hidden[:0])
    with pytest.raises(ShapeError, match="rank_collapse hidden: expected at least one layer, got none"):
        rank_collapse([])
    for mask in (torch.ones(3, 7), torch.ones(7, dtype=torch.bool)):
        with pytest.raises(ShapeError, match=r"rank_collapse mask: .*\(batch, token\) = \(3, 7\).* Use mask.bool\(\)"):
            rank_collapse(hidden, mask=mask)
        with pytest.raises(ShapeError, match=r"residual mask: expected .* \(\.\.\., token\) = \(3, 7\), got shape"):
            residual(hidden, mask)
    for labels in (torch.zeros(7), torch.zeros(6).long(), torch.zeros(7, dtype=torch.bool), [0] * 7):
        with pytest.raises(ShapeError, match=r"rank_collapse modality: expected integer labels .*\(token,\) = \(7,\)"):
            rank_collapse(hidden, modality=labels)
    with pytest.raises(ShapeError, match=r"labels from -1 to num_modalities - 1 = 1, got labels from 0 to 2"):
        rank_collapse(hidden, modality=torch.tensor([0, 0, 0, 0, 0, 0, 2]), num_modalities=2)
    for wrong in (torch.zeros(5), torch.zeros(0, 5), torch.zeros(7, 5).long()):
        with pytest.raises(ShapeError, match=r"residual: expected a float tensor of shape \(\.\.\., token, dim\)"):
            residual(wrong)
