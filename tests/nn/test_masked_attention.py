"""Masked values do not affect outputs and gradients of attention and of the layers built on it."""

import math

import pytest
import torch

from equipoise.errors import ShapeError
from equipoise.nn.attention import attend, shares
from equipoise.nn.attention.modular import PseudoAttention, modular_attention
from equipoise.nn.duplex import DuplexAligner
from equipoise.nn.transformer import Attention, Block, PostNormAttention, PostNormBlock, Transformer
from helpers.masked_cases import FILLS, assert_equal_and_finite, outputs_and_gradients


def random_heads(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYERS = {
    "attention": lambda: Attention(8, 2), "block": lambda: Block(8, 2), "transformer": lambda: Transformer(8, 2, 2),
    "post_norm": lambda: PostNormAttention(8, 2), "post_norm_block": lambda: PostNormBlock(8, 2),
}  # fmt: skip


class TestAttention:
    @pytest.mark.parametrize("rows", [1, 3, 37])
    @pytest.mark.parametrize("labels", [None, "shared", "ragged"])
    @pytest.mark.parametrize("form", ["bool", "additive", "rows", "heads", "causal"])
    def test_attend(self, rows, labels, form):
        key_mask = torch.rand(2, 41, generator=torch.Generator().manual_seed(0)) < 0.6
        key_mask[1] = False
        mask, causal = key_mask, form == "causal"
        if form == "additive":
            mask = torch.zeros(2, 41, dtype=torch.float64).masked_fill(~key_mask, -math.inf)
        if form == "rows":
            mask = key_mask[:, None] & (torch.rand(2, rows, 41, generator=torch.Generator().manual_seed(1)) < 0.8)
            key_mask = mask.any(dim=1)
        if form == "heads":
            mask = key_mask[:, None, None].expand(-1, 4, -1, -1)
        modality = None
        if labels is not None:
            shape = (41,) if labels == "shared" else (2, 41)
            modality = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(2))
        actual = []
        for fill in (0.0, *FILLS):
            query, hidden = random_heads(2, 4, rows, 8, seed=0).requires_grad_(), ~key_mask[:, None, :, None]
            key, value = (random_heads(2, 2, 41, 8, seed=s).masked_fill(hidden, fill).requires_grad_() for s in (1, 2))
            options = {"modality": modality, "num_modalities": 2} if labels else {}
            result = attend(query, key, value, mask=mask, is_causal=causal, **options)
            actual.append(outputs_and_gradients(result, (query, key, value)))
            if labels:
                share = shares(query, key, mask=mask, is_causal=causal, **options)
                torch.testing.assert_close(share, result.share)
        for outcome in actual[1:]:
            assert_equal_and_finite(outcome, actual[0])

    @pytest.mark.parametrize("mask", [None, "some"])
    def test_keys_after_the_last_query(self, mask):
        hidden = None if mask is None else torch.ones(2, 5, dtype=torch.bool)
        result = []
        for fill in (0.0, math.nan):
            query, key = random_heads(2, 1, 3, 8, seed=0).requires_grad_(), random_heads(2, 1, 5, 8, seed=1)
            key[:, :, 3:] = fill
            key.requires_grad_()
            result.append(outputs_and_gradients(attend(query, key, key, mask=hidden, is_causal=True)[:1], (query, key)))
        assert_equal_and_finite(result[1], result[0])

    @pytest.mark.parametrize("merge", ["mass", "gate", "sum", "concat"])
    @pytest.mark.parametrize("length", [5, 37])
    @pytest.mark.parametrize("causal", [False, True])
    def test_modular(self, merge, length, causal):
        mask = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.6
        mask[:, 0] = True
        modality = torch.randint(-1, 2, (length,), generator=torch.Generator().manual_seed(2))
        gate = torch.zeros(2, 1, dtype=torch.float64) if merge == "gate" else None
        actual = []
        for fill in (0.0, *FILLS):
            query, hidden = random_heads(2, 2, length, 8, seed=0).requires_grad_(), ~mask[:, None, :, None]
            key, value = (
                random_heads(2, 2, length, 8, seed=s).masked_fill(hidden, fill).requires_grad_() for s in (1, 2)
            )
            result = modular_attention(
                query, key, value, modality=modality, mask=mask, is_causal=causal, merge=merge, gate=gate,
                pseudo=PseudoAttention(count="all_masked"),
            )  # fmt: skip
            actual.append(outputs_and_gradients((result.output,), (query, key, value)))
        for outcome in actual[1:]:
            assert_equal_and_finite(outcome, actual[0])

    @pytest.mark.parametrize("basis", ["gram", "key_value", "covariance"])
    @pytest.mark.parametrize("scope", ["all", "prefix", "causal"])
    @pytest.mark.parametrize("fuse", ["concat", "add"])
    def test_duplex_aligner(self, basis, scope, fuse):
        mask = torch.rand(2, 17, generator=torch.Generator().manual_seed(0)) < 0.6
        modality = torch.randint(-1, 2, (17,), generator=torch.Generator().manual_seed(2))
        torch.manual_seed(0)
        aligner = DuplexAligner(4, 2, basis=basis, basis_scope=scope, fuse=fuse).double()
        with torch.no_grad():
            for parameter in aligner.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        actual = []
        for fill in (0.0, *FILLS):
            hidden = ~mask[:, None, :, None]
            key, value = (random_heads(2, 3, 17, 4, seed=s).masked_fill(hidden, fill).requires_grad_() for s in (1, 2))
            result = aligner(key, value, modality=modality, mask=mask).key
            seen = result.masked_fill(hidden, 0.0)
            actual.append(outputs_and_gradients((seen,), (key, *aligner.parameters())))
            assert torch.equal(result.isfinite(), key.isfinite())
        for result in actual[1:]:
            assert_equal_and_finite(result, actual[0])

    @pytest.mark.parametrize("name", LAYERS)
    def test_layers(self, name):
        torch.manual_seed(0)
        layer = LAYERS[name]().double()
        mask, result = torch.tensor([[True, False, True, True, False], [True] * 4 + [False]]), []
        for fill in (0.0, math.nan, math.inf):
            tokens = random_heads(2, 5, 8, seed=0).masked_fill(~mask[..., None], fill).requires_grad_()
            module = layer(tokens, mask=mask)
            module = (module if isinstance(module, torch.Tensor) else module.output)[mask]
            result.append(outputs_and_gradients((module,), (tokens, *layer.parameters())))
        for module in result[1:]:
            assert_equal_and_finite(module, result[0])
        with pytest.raises(ShapeError, match=r"mask: expected a boolean mask .*, got torch\.float"):
            layer(random_heads(2, 5, 8, seed=0), mask=torch.zeros(2, 5))

    @pytest.mark.parametrize("name", ["attention", "block", "post_norm"])
    @pytest.mark.parametrize("by_row", [False, True])
    def test_cross_attention_layers(self, name, by_row):
        torch.manual_seed(0)
        layer = LAYERS[name]().double()
        mask, result = torch.tensor([[True, False, True, True, False], [False] * 5]), []
        given = mask[:, None].expand(-1, 3, -1) if by_row else mask
        for fill in (0.0, *FILLS):
            tokens = random_heads(2, 3, 8, seed=0).requires_grad_()
            source = random_heads(2, 5, 8, seed=1).masked_fill(~mask[..., None], fill).requires_grad_()
            module = layer(tokens, source, mask=given)
            module = module if isinstance(module, torch.Tensor) else module.output
            result.append(outputs_and_gradients((module,), (tokens, source, *layer.parameters())))
        for module in result[1:]:
            assert_equal_and_finite(module, result[0])
