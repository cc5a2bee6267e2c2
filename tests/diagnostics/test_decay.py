"""Decay of links, alignment errors and their sum over depth, against loops and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.diagnostics.link_decay_test import alignment_error, e_dda, link_decay
from equipoise.errors import ConfigError, ShapeError
from helpers.tolerance import TOL
from oracles.plain import mean

EXACT = TOL[torch.float64]
NUMBER = {"rel": EXACT["rtol"], "abs": EXACT["atol"]}
BATCH, TOKENS, DIM = 3, 7, 5


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.2, 1.2), st.floats(-3.0, 0.0), st.integers(2, 13))
def test_exponential_decay_is_recovered(gamma, intercept, layers):
    alpha = torch.tensor([math.exp(intercept) * gamma**layer for layer in range(1, layers + 1)], dtype=torch.float64)
    result = link_decay(alpha)
    assert result.gamma == pytest.approx(gamma)
    assert result.intercept == pytest.approx(intercept, abs=1e-7)
    if abs(gamma - 1) > 0.01:
        assert result.r2 == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_least_squares(seed):
    logs = normal(seed, 11)
    slope, intercept = np.polyfit(np.arange(1, 12), logs.numpy(), 1)
    rest = [value - intercept - slope * layer for layer, value in enumerate(logs.tolist(), start=1)]
    total = [value - mean(logs.tolist()) for value in logs.tolist()]
    result = link_decay(logs.exp())
    assert result.gamma == pytest.approx(math.exp(slope), **NUMBER)
    assert result.intercept == pytest.approx(intercept, **NUMBER)
    assert result.r2 == pytest.approx(1 - sum(r * r for r in rest) / sum(t * t for t in total), **NUMBER)
    assert 0 < result.r2 < 1


def test_constant_and_missing_links():
    same = link_decay(torch.full((5,), 0.3))
    assert same.gamma == 1.0
    assert math.isnan(same.r2)
    for value in (0.0, math.nan):
        assert all(math.isnan(part) for part in link_decay(torch.tensor([0.3, value, 0.1])))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_alignment_against_loops(count):
    layers = [normal(seed, BATCH, TOKENS, dim) for seed, dim in enumerate((DIM, 2))]
    labels = torch.randint(-1, count, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.8
    expected = []
    for layer in layers:
        centroids = []
        for m in range(count):
            rows = [layer[b, i] for b in range(BATCH) for i in range(TOKENS) if mask[b, i] and labels[b, i] == m]
            centroids.append(sum(rows) / len(rows))
        cosines = [
            float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            for index, a in enumerate(centroids)
            for b in centroids[index + 1 :]
        ]
        expected.append(mean(1 - cosine for cosine in cosines) if cosines else math.nan)
    hidden = [layer.masked_fill(~mask[..., None], math.nan) for layer in layers]
    result = alignment_error(hidden, labels, count, mask)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), equal_nan=True, **EXACT)
    # A modality without samples adds no pair.
    torch.testing.assert_close(alignment_error(hidden, labels, count + 1, mask), result, equal_nan=True, **EXACT)


def test_hand_computed_alignment():
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, -5.0]]])
    labels = torch.tensor([0, 1])
    assert alignment_error(hidden, labels).tolist() == [1.0]
    assert alignment_error(hidden.abs().sum(dim=-1, keepdim=True), labels).tolist() == [0.0]
    assert alignment_error([hidden * torch.tensor([1.0, 0.0]), hidden], labels)[0] == 1.0  # no direction
    assert alignment_error(torch.tensor([[[1.0], [-2.0]]]), labels).tolist() == [2.0]
    assert bool(alignment_error(hidden * math.nan, labels).isnan().all())


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 1.5), st.lists(st.floats(0.01, 2.0), min_size=1, max_size=7))
def test_all_layers(gamma, errors):
    result = e_dda(gamma, torch.tensor(errors, dtype=torch.float64))
    product, total = 1.0, 0.0
    for layer, error in enumerate(errors, start=1):
        product *= gamma**layer * error
        total += gamma**layer * error
    assert result.log_product == pytest.approx(math.log(product))
    assert result.weighted_sum == pytest.approx(total, **NUMBER)


def test_underflow_and_zeros():
    deep = e_dda(0.5, torch.full((61,), 0.1))
    assert deep.log_product == pytest.approx(61 * 62 / 2 * math.log(0.5) + 61 * math.log(0.1))
    assert math.exp(deep.log_product) == 0.0
    assert e_dda(0.5, torch.tensor([1.0, 0.0])) == (-math.inf, 0.5)
    assert e_dda(0.0, torch.tensor([1.0, 2.0])) == (-math.inf, 0.0)
    assert all(math.isnan(part) for part in e_dda(math.nan, torch.tensor([1.0])))
    assert all(math.isnan(part) for part in e_dda(0.5, torch.tensor([math.nan, 1.0])))


def test_errors():
    for wrong in (torch.tensor([0.5]), torch.zeros(2, 3)):
        with pytest.raises(
            ShapeError, match=r"link_decay: expected alpha of shape \(layer,\) with layer >= 2, got shape"
        ):
            link_decay(wrong)
    with pytest.raises(ConfigError, match=r"link_decay: expected attention alpha >= 0, got -0.5"):
        link_decay(torch.tensor([0.5, -0.5]))
    for wrong in (torch.zeros(0), torch.zeros(2, 3)):
        with pytest.raises(ShapeError, match=r"e_dda: expected errors of shape \(layer,\), got shape"):
            e_dda(0.5, wrong)
    with pytest.raises(ConfigError, match=r"e_dda: expected finite gamma >= 0, got -0.5"):
        e_dda(-0.5, torch.ones(2))
    with pytest.raises(ConfigError, match=r"e_dda: expected finite errors >= 0, got \[1.0, inf\]"):
        e_dda(0.5, torch.tensor([1.0, math.inf]))
    hidden, labels = torch.zeros(3, 7, 5), torch.zeros(7).long()
    with pytest.raises(
        ShapeError, match=r"alignment_error hidden: expected a float tensor of shape \(batch, token, dim\)"
    ):
        alignment_error(hidden[0], labels)
    with pytest.raises(ShapeError, match=r"alignment_error modality: expected integer labels"):
        alignment_error(hidden, labels[1:])
    with pytest.raises(ShapeError, match=r"alignment_error mask: expected dtype torch.bool"):
        alignment_error(hidden, labels, mask=torch.ones(3, 7))
