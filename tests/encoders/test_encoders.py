"""Patch and sequence encoders against loops over patches and frames."""

import pytest
import torch

from equipoise.encoders import PatchEncoder, SequenceEncoder
from equipoise.errors import ConfigError, ShapeError
from helpers.tolerance import TOL
from oracles.fusion import patch_encoder, sequence_encoder, state_as_float64

EXACT = TOL[torch.float64]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_patch_encoder():
    torch.manual_seed(0)
    encoder, pixels = PatchEncoder(3, (4, 10), patch=2, dim=14, depth=2, heads=7).double(), normal(1, 5, 3, 4, 10)
    tokens = encoder(pixels)
    assert tokens.values.shape == (5, 2 * 5 + 1, 14)
    assert tokens.cls
    torch.testing.assert_close(tokens.values, patch_encoder(state_as_float64(encoder), pixels, 2, 2, 7), **EXACT)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_sequence_encoder(stride, masked):
    torch.manual_seed(0)
    encoder = SequenceEncoder(5, max_length=13, dim=14, stride=stride, depth=2, heads=2).double()
    frames, mask = normal(2, 3, 11, 5), torch.ones(3, 11, dtype=torch.bool)
    mask[0, 4:], mask[1, [2, 5]], mask[2] = False, False, False
    tokens = encoder(frames, mask=mask if masked else None)
    values, valid = sequence_encoder(state_as_float64(encoder), frames, mask if masked else None, stride, 2, 2)
    torch.testing.assert_close(tokens.values, values, **EXACT)
    assert tokens.cls
    assert torch.equal(tokens.valid(), valid)
    assert (tokens.mask is None) is not masked


def test_masked_frames_have_no_effect():
    torch.manual_seed(0)
    encoder = SequenceEncoder(5, max_length=13, dim=14, stride=3, depth=2, heads=2).double().eval()
    frames = normal(3, 2, 7, 5)
    padded, mask = torch.cat([frames, torch.full((2, 4, 5), torch.nan)], dim=1), torch.arange(11).expand(2, -1) < 7
    padded = padded.double()
    longer = encoder(padded, mask=mask)
    torch.testing.assert_close(longer.values[:, :4], encoder(frames).values, **EXACT)
    torch.testing.assert_close(longer.pooled(), encoder(frames).pooled(), **EXACT)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: PatchEncoder(1, (7, 8), patch=2, dim=6),
            ConfigError,
            r"PatchEncoder: expected a patch that divides \(height, width\) = \(7, 8\), got patch = 2.*crop or pad",
        ),
        (lambda: PatchEncoder(1, (8, 8), patch=0, dim=8), ConfigError, r"got patch = 0"),
        (
            lambda: PatchEncoder(1, (8, 8), patch=2, dim=8)(torch.zeros(3, 2, 8, 8)),
            ShapeError,
            r"PatchEncoder: expected .* = \(batch, 1, 8, 8\), got shape \(3, 2, 8, 8\)",
        ),
        (lambda: PatchEncoder(1, (8, 8), patch=2, dim=8)(torch.zeros(1, 8, 8)), ShapeError, r"got shape \(1, 8, 8\)"),
        (
            lambda: SequenceEncoder(5, max_length=7, dim=8, stride=0),
            ConfigError,
            r"SequenceEncoder: expected stride >= 1, got stride = 0",
        ),
        (
            lambda: SequenceEncoder(5, max_length=7, dim=8)(torch.zeros(2, 11, 5)),
            ShapeError,
            r"SequenceEncoder: expected \(batch, frame <= 7, feature = 5\), got shape \(2, 11, 5\).*max_length",
        ),
        (lambda: SequenceEncoder(5, max_length=7, dim=8)(torch.zeros(2, 0, 5)), ShapeError, r"got shape \(2, 0, 5\)"),
        (lambda: SequenceEncoder(5, max_length=7, dim=8)(torch.zeros(2, 7, 3)), ShapeError, r"got shape \(2, 7, 3\)"),
        (
            lambda: SequenceEncoder(5, max_length=7, dim=8)(torch.zeros(2, 5, 5), torch.ones(2, 7).bool()),
            ShapeError,
            r"SequenceEncoder mask: expected \(batch, frame\) = \(2, 5\), torch\.bool, got shape \(2, 7\)",
        ),
        (
            lambda: SequenceEncoder(5, max_length=7, dim=8)(torch.zeros(2, 5, 5), torch.ones(2, 5)),
            ShapeError,
            r"torch\.float32.*True = valid",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
