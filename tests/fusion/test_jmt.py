"""JMT: loops, interpolation to equal lengths, order of modalities, errors."""

import itertools

import pytest
import torch

from equipoise.errors import ConfigError
from equipoise.fusion import JMT
from equipoise.fusion.token_streams import equal_lengths
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import BATCH, DIM, EXACT, NAMES, build_fusion, check_gradients, random_tokens
from oracles.fusion import state_as_float64
from oracles.fusion_transformers import jmt


@pytest.mark.parametrize("output", ["fc", "attention"])
@pytest.mark.parametrize(("masked", "cls"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_forward(output, masked, cls, count, depth):
    tokens = random_tokens(NAMES[:count], masked=masked, cls=cls)
    fusion = build_fusion(JMT, NAMES[:count], heads=2, depth=depth, output=output)
    expected = jmt(state_as_float64(fusion), tokens, heads=2, depth=depth, output=output)
    result = fusion(tokens)
    torch.testing.assert_close(result.features, expected, **EXACT)
    assert result.features.shape == (BATCH, fusion.out_dim)
    assert result.share is None


def test_six_pairs_of_the_paper():
    assert JMT(DIM).build(("a", "v")).pairs == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert JMT(DIM).build(("a", "v")).out_dim == 6 * DIM
    assert JMT(DIM, output="attention").build(("a", "v")).out_dim == DIM


@pytest.mark.parametrize("output", ["fc", "attention"])
@pytest.mark.parametrize("missing", NAMES[:2])
def test_missing_modality(output, missing):
    tokens = random_tokens(NAMES[:2])
    present = torch.tensor([True, False, True])
    values = tokens[missing].values
    tokens[missing] = Tokens(values, mask=present[:, None].expand(values.shape[:2]))
    fusion = build_fusion(JMT, NAMES[:2], output=output)
    expected = jmt(state_as_float64(fusion), tokens, heads=1, depth=1, output=output)
    torch.testing.assert_close(fusion(tokens).features, expected, **EXACT)


@pytest.mark.parametrize("output", ["fc", "attention"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_order_of_modalities_has_no_effect(output, order):
    tokens = random_tokens(NAMES[:3], masked=True)
    one = build_fusion(JMT, NAMES[:3], output=output)
    other = JMT(DIM, output=output).build(tuple(NAMES[m] for m in order)).double().eval()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(tokens).features, one(tokens).features)


def test_hand_computed_equal_lengths():
    short = Tokens(torch.tensor([[[0.0], [3.0], [99.0]], [[7.0], [99.0], [99.0]]]), mask=torch.tensor(
        [[True, True, False], [True, False, False]]
    ))  # fmt: skip
    long = Tokens(torch.arange(8.0).view(2, 4, 1), mask=torch.tensor([[True] * 4, [False, True, True, False]]))
    stretched, kept = equal_lengths([short, long])
    # The longest sequence of the first sample has 4 tokens, that of the second 2.
    assert stretched.values[..., 0].tolist() == [[0.0, 1.0, 2.0, 3.0], [7.0, 7.0, 0.0, 0.0]]
    assert kept.values[..., 0].tolist() == [[0.0, 1.0, 2.0, 3.0], [5.0, 6.0, 0.0, 0.0]]
    assert stretched.mask.tolist() == kept.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_equal_lengths_keeps_equal_sequences_and_fills_missing():
    part = Tokens(torch.ones(2, 3, 1))
    assert equal_lengths([part, part])[0] is part
    empty, same = equal_lengths([Tokens(torch.ones(2, 0, 1)), part])
    assert not empty.mask.any()
    assert not empty.values.any()
    torch.testing.assert_close(same.values, part.values)
    assert same.mask.all()
    unmasked, _ = equal_lengths([Tokens(torch.ones(2, 2, 1)), part])
    assert unmasked.mask is None


@pytest.mark.parametrize("output", ["fc", "attention"])
def test_gradients(output):
    fusion = build_fusion(JMT, NAMES[:2], output=output)
    assert check_gradients(fusion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, r"JMT: expected depth >= 1 and output 'fc' or 'attention', got depth = 0, output = 'fc'"),
        ({"output": "mean"}, r"JMT: expected .* got depth = 1, output = 'mean'"),
        ({"heads": 3}, r"expected dim = 10 divisible by heads, got heads = 3"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        JMT(DIM, **options).build(NAMES[:2])
