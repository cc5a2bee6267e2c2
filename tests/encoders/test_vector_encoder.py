"""VectorEncoder against loops, its errors, and the encoders that recipes choose by the shape of a sample."""

import pytest
import torch

import equipoise as eq
from equipoise.data import Split
from equipoise.data.sets.generated import Generated
from equipoise.encoders import SequenceEncoder, TextEncoder, VectorEncoder
from equipoise.errors import ConfigError, ShapeError
from equipoise.training.method_factory import build_encoder
from helpers.tolerance import TOL
from oracles.fusion import gelu, state_as_float64

EXACT = TOL[torch.float64]


def layer_norm(x, weight, bias):
    centered = x - x.mean()
    return centered / (centered.square().mean() + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_single_token_against_hidden_layers(depth):
    torch.manual_seed(0)
    encoder = VectorEncoder(7, dim=6, depth=depth, hidden=11, dropout=0.5).double().eval()
    values = torch.randn(3, 7, dtype=torch.float64)
    tokens, state = encoder(values), state_as_float64(encoder)
    assert tokens.values.shape == (3, 1, 6)
    for row in range(3):
        x = values[row]
        for layer in range(depth):
            x = gelu(state[f"layers.{3 * layer}.weight"] @ x + state[f"layers.{3 * layer}.bias"])
        x = state[f"layers.{3 * depth}.weight"] @ x + state[f"layers.{3 * depth}.bias"]
        x = layer_norm(x, state[f"layers.{3 * depth + 1}.weight"], state[f"layers.{3 * depth + 1}.bias"])
        torch.testing.assert_close(tokens.values[row, 0], x, **EXACT)


def test_dropout_in_training_only():
    torch.manual_seed(0)
    encoder, values = VectorEncoder(7, dim=6, dropout=0.5), torch.randn(3, 7)
    assert not torch.equal(encoder(values).values, encoder(values).values)
    assert torch.equal(encoder.eval()(values).values, encoder(values).values)


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (torch.zeros(3, 5), r"shape \(3, 5\), torch.float32"),
        (torch.zeros(3, 2, 7), r"shape \(3, 2, 7\), torch.float32"),
        (torch.zeros(3, 7, dtype=torch.long), r"shape \(3, 7\), torch.int64"),
    ],
)
def test_invalid_shape_or_dtype_raises(values, got):
    expected = r"VectorEncoder: expected floating-point values \(batch, feature = 7\), got "
    with pytest.raises(ShapeError, match=expected + got):
        VectorEncoder(7, dim=6)(values)


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": 6, "depth": -1}, {"dim": 6, "hidden": 0}])
def test_sizes_out_of_range_raise(options):
    with pytest.raises(ConfigError, match=r"VectorEncoder: expected features, dim and hidden of 1 or more"):
        VectorEncoder(7, **options)


def build_source(values, vocabulary=None):
    data = Generated(samples=20)
    data.names, data.vocabulary = ("part",), {} if vocabulary is None else {"part": vocabulary}
    data.train = Split({"part": values}, torch.zeros(len(values), dtype=torch.long))
    return data


def test_recipes_select_encoder_by_shape_and_vocabulary():
    vectors, ids, sequences = (
        build_source(torch.zeros(3, 7)),
        build_source(torch.ones(3, 7).long(), 11),
        build_source(torch.zeros(3, 5, 2)),
    )
    assert isinstance(build_encoder("part", {"dim": 8}, vectors), VectorEncoder)
    text = build_encoder("part", {"dim": 8}, ids)
    assert isinstance(text, TextEncoder)
    assert text.vocabulary == 11
    assert isinstance(build_encoder("part", {"dim": 8}, sequences), SequenceEncoder)
    assert eq.encoders.VectorEncoder is VectorEncoder


def test_incompatible_encoder_error_lists_compatible_ones():
    with pytest.raises(
        ConfigError,
        match=r"encoder 'part': .*\(word,\) integers, or .*VectorEncoder for \(feature,\).* got TextEncoder",
    ):
        build_encoder("part", {"name": "TextEncoder", "dim": 8}, build_source(torch.zeros(3, 7)))
    with pytest.raises(
        ConfigError, match=r"or .*TextEncoder for \(word,\) integers, got VectorEncoder for samples of .*, ids below 11"
    ):
        build_encoder("part", {"name": "VectorEncoder", "dim": 8}, build_source(torch.ones(3, 7).long(), 11))
