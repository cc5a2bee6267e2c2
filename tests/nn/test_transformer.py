"""Attention, Block and Transformer against loops over rows and heads."""

import pytest
import torch

from equipoise.errors import ConfigError, ShapeError
from equipoise.nn.transformer import Attention, Block, PostNormAttention, PostNormBlock, Transformer, learned_token
from helpers.tolerance import TOL
from oracles.fusion import attention, block, layer_norm, linear, state_as_float64, transformer
from oracles.fusion_transformers import post_attention, post_block, relu

BATCH, DIM, HEADS, QUERIES, KEYS = 2, 14, 7, 3, 5
LABELS = torch.tensor([-1, 1, 0, 1, 0])
VALID = torch.tensor([[True, False, True, True, False], [True, True, True, True, True]])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 2, HEADS])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention(heads, masked):
    torch.manual_seed(0)
    layer = Attention(DIM, heads).double()
    rows, source = normal(1, BATCH, QUERIES, DIM), normal(2, BATCH, KEYS, DIM)
    attended = layer(rows, source, modality=LABELS, num_modalities=2, mask=VALID if masked else None)
    for sample in range(BATCH):
        valid = VALID[sample] if masked else [True] * KEYS
        output, share = attention(state_as_float64(layer), "", rows[sample], source[sample], LABELS, valid, heads, 2)
        torch.testing.assert_close(attended.output[sample], output, **TOL[torch.float64])
        # Shares are computed in float32 or higher precision.
        torch.testing.assert_close(attended.share[sample].double(), share, **TOL[torch.float32])


def test_self_attention_by_default_without_share():
    torch.manual_seed(0)
    layer, rows = Attention(DIM, 2), normal(3, BATCH, KEYS, DIM).float()
    attended = layer(rows)
    torch.testing.assert_close(attended.output, layer(rows, rows).output, **TOL[torch.float32])
    assert attended.share is None


def test_causal_attention():
    torch.manual_seed(0)
    layer, rows = Attention(DIM, 2).double(), normal(4, 1, KEYS, DIM)
    attended = layer(rows, is_causal=True)
    for row in range(KEYS):
        valid = [j <= row for j in range(KEYS)]
        output, _ = attention(state_as_float64(layer), "", rows[0], rows[0], LABELS, valid, 2, 2)
        torch.testing.assert_close(attended.output[0, row], output[row], **TOL[torch.float64])


def test_per_query_masks():
    torch.manual_seed(0)
    layer, rows, source = Attention(DIM, 2).double(), normal(5, 1, QUERIES, DIM), normal(6, 1, KEYS, DIM)
    mask = torch.tensor([[[True, False, True, False, True], [False, True, True, True, True], [True] * 5]])
    attended = layer(rows, source, mask=mask)
    for row in range(QUERIES):
        output, _ = attention(state_as_float64(layer), "", rows[0], source[0], LABELS, mask[0, row], 2, 2)
        torch.testing.assert_close(attended.output[0, row], output[row], **TOL[torch.float64])


def test_dropout_in_training_only():
    torch.manual_seed(0)
    layer, rows = Attention(DIM, 1, dropout=0.5), normal(7, BATCH, KEYS, DIM).float()
    torch.manual_seed(1)
    first = layer(rows).output
    assert not torch.equal(first, layer(rows).output)
    layer.eval()
    assert torch.equal(layer(rows).output, layer(rows).output)


def test_parameter_counts():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(Attention(DIM, 2)) == 4 * (DIM**2 + DIM)
    assert count(Block(DIM, 2)) == 12 * DIM**2 + 13 * DIM
    assert count(Transformer(DIM, 3, 2)) == 3 * (12 * DIM**2 + 13 * DIM) + 2 * DIM


@pytest.mark.parametrize("masked", [False, True])
def test_block(masked):
    torch.manual_seed(0)
    layer, rows = Block(DIM, 2).double(), normal(8, BATCH, KEYS, DIM)
    attended = layer(rows, modality=LABELS, num_modalities=2, mask=VALID if masked else None)
    for sample in range(BATCH):
        valid = VALID[sample] if masked else [True] * KEYS
        output, share = block(state_as_float64(layer), "", rows[sample], LABELS, valid, 2, 2)
        torch.testing.assert_close(attended.output[sample], output, **TOL[torch.float64])
        torch.testing.assert_close(attended.share[sample].double(), share, **TOL[torch.float32])


def test_block_on_the_first_rows_only():
    torch.manual_seed(0)
    layer, rows = Block(DIM, 2).double(), normal(9, BATCH, KEYS, DIM)
    full = layer(rows, mask=VALID, modality=LABELS, num_modalities=2)
    part = layer(rows, rows=2, mask=VALID, modality=LABELS, num_modalities=2)
    torch.testing.assert_close(part.output, full.output[:, :2], **TOL[torch.float64])
    torch.testing.assert_close(part.share, full.share[:, :, :2], **TOL[torch.float32])


def test_block_with_cross_attention_shared_norm_and_activation():
    torch.manual_seed(0)
    layer = Block(DIM, 2, activation=torch.nn.ReLU).double()
    with torch.no_grad():
        layer.norm_attention.weight.normal_()
    rows, source, state = normal(11, 1, QUERIES, DIM), normal(12, 1, KEYS, DIM), state_as_float64(layer)
    queries, keys = (torch.stack([layer_norm(state, "norm_attention.", row) for row in x[0]]) for x in (rows, source))
    read, _ = attention(state, "attention.", queries, keys, LABELS, VALID[0], 2, 2)
    after = rows[0] + read
    hidden = [relu(linear(state, "mlp.0.", layer_norm(state, "norm_mlp.", row))) for row in after]
    expected = after + torch.stack([linear(state, "mlp.2.", h) for h in hidden])
    torch.testing.assert_close(layer(rows, source, mask=VALID[:1]).output[0], expected, **TOL[torch.float64])


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_post_norm_layers(eps):
    torch.manual_seed(0)
    layer = PostNormBlock(DIM, 2, ratio=2.0, eps=eps).double()
    assert sum(p.numel() for p in layer.parameters()) == 4 * (DIM**2 + DIM) + 4 * DIM**2 + 3 * DIM + 4 * DIM
    rows, source = normal(13, BATCH, KEYS, DIM), normal(14, BATCH, QUERIES, DIM)
    for sample in range(BATCH):
        readable = rows[sample][VALID[sample]]
        expected = post_block(state_as_float64(layer), "", rows[sample], readable, 2, eps)
        torch.testing.assert_close(layer(rows, mask=VALID)[sample], expected, **TOL[torch.float64])
    reading = PostNormAttention(DIM, 2, eps=eps).double()
    expected = post_attention(state_as_float64(reading), "", rows[0], source[0], 2, eps)
    torch.testing.assert_close(reading(rows, source)[0], expected, **TOL[torch.float64])


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_transformer(depth):
    torch.manual_seed(0)
    layer, rows = Transformer(DIM, depth, 2).double(), normal(10, BATCH, KEYS, DIM)
    output = layer(rows, mask=VALID)
    for sample in range(BATCH):
        expected = transformer(state_as_float64(layer), "", rows[sample], VALID[sample], depth, 2)
        torch.testing.assert_close(output[sample], expected, **TOL[torch.float64])


def test_learned_token_is_small():
    torch.manual_seed(0)
    token = learned_token(101, 97)
    assert token.requires_grad
    assert float(token.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: Attention(14, 3),
            ConfigError,
            r"Attention: expected dim = 14 divisible by heads, got heads = 3\. .* heads = 2",
        ),
        (lambda: Attention(14, 0), ConfigError, r"got heads = 0\. The closest divisor is heads = 1"),
        (lambda: Attention(14)(torch.zeros(2, 3, 5)), ShapeError, r"Attention: expected dim = 14, got 5 and 5"),
        (lambda: Attention(14)(torch.zeros(2, 3, 14), torch.zeros(2, 3, 5)), ShapeError, r"got 14 and 5"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
