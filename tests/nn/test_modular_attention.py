"""Modular attention: loops in float64, ordinary attention as a special case, pseudo-attention, gradients, errors."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from equipoise.errors import ConfigError, ShapeError
from equipoise.nn.attention import attend, sdpa_kernels
from equipoise.nn.attention import self_cross_parts as parts_module
from equipoise.nn.attention.modality_blocks import blocks_of, into_blocks, out_of_blocks
from equipoise.nn.attention.modular import modular_attention
from equipoise.nn.attention.pseudo_attention import PseudoAttention, pseudo_logit
from helpers.tolerance import TOL
from oracles.moda import logit, modular

BATCH, HEADS, KEY_HEADS, DIM = 2, 4, 2, 5
LONG, SHORT = 37, 11
EXACT = TOL[torch.float64]


def random_heads(length=LONG, *, dtype=torch.float64, seed=0, dim=DIM):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, n, length, dim, generator=random, dtype=torch.float64).to(dtype)
            for n in (HEADS, KEY_HEADS, KEY_HEADS)]  # fmt: skip


def random_labels(kind, length=LONG, seed=1):
    random = torch.Generator().manual_seed(seed)
    if kind == "blocks":
        return torch.arange(length) * 3 // length
    if kind == "backwards":
        return 2 - torch.arange(length) * 3 // length
    return torch.randint(-1, 3, (length,) if kind == "mixed" else (BATCH, length), generator=random)


def build_masks(kind, length=LONG, seed=2):
    """Returns a mask for ``modular_attention``, and the visible (query, key) pairs."""
    random = torch.Generator().manual_seed(seed)
    if kind is None:
        return None, torch.ones(BATCH, length, length, dtype=torch.bool)
    if kind == "padding":
        mask = torch.rand(BATCH, length, generator=random) < 0.7
        return mask, mask[:, None].expand(-1, length, -1)
    mask = torch.rand(BATCH, length, length, generator=random) < 0.6
    return mask, mask


LAYOUTS = ("blocks", "backwards", "mixed", "ragged")
layout = pytest.mark.parametrize("kind", LAYOUTS)


@layout
@pytest.mark.parametrize("masked", [None, "padding", "rows"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("merge", "length"),
    [
        # How the two parts are merged does not depend on their length.
        pytest.param(merge, length, marks=pytest.mark.slow if length == LONG and merge in ("gate", "concat") else [])
        for merge in ("mass", "gate", "sum", "concat")
        for length in (SHORT, LONG)
    ],
)
def test_output_against_loops(kind, length, masked, is_causal, merge):
    query, key, value = random_heads(length)
    modality, (mask, seen) = random_labels(kind, length), build_masks(masked, length)
    if is_causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    gate = (
        torch.randn(HEADS, generator=torch.Generator().manual_seed(3), dtype=torch.float64) if merge == "gate" else None
    )
    expected, own, cross = modular(query, key, value, modality, seen=seen, merge=merge, gate=gate)
    result = modular_attention(
        query, key, value, modality=modality, mask=mask, is_causal=is_causal, merge=merge,
        gate=None if gate is None else gate[:, None],
    )  # fmt: skip
    torch.testing.assert_close(result.output, expected, **EXACT)
    torch.testing.assert_close(result.own.lse, own, **EXACT)
    torch.testing.assert_close(result.cross.lse, cross, **EXACT)


@layout
@pytest.mark.parametrize("masked", [None, "padding", "rows"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_mass_without_pseudo_attention_is_ordinary_attention(kind, masked, is_causal):
    inputs, mask = [x.requires_grad_() for x in random_heads()], build_masks(masked)[0]
    result = modular_attention(*inputs, modality=random_labels(kind), mask=mask, is_causal=is_causal).output
    plain = attend(*inputs, mask=mask, is_causal=is_causal).output
    torch.testing.assert_close(result, plain, **EXACT)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradients = (torch.autograd.grad(output, inputs, grad) for output in (result, plain))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_single_precision_equals_the_kernel_up_to_rounding():
    query, key, value = random_heads(dtype=torch.float32, dim=8)
    plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    result = modular_attention(query, key, value, modality=random_labels("blocks")).output
    # Reference value.
    assert (result - plain).norm() / plain.norm() < 2e-7


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("count", ["causal", "all_masked"])
@pytest.mark.parametrize("masked", [None, "padding", "rows"])
@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["blocks", "ragged"])
def test_pseudo_attention_equals_explicit_masked_positions(length, count, masked, decay, kind):
    query, key, value = random_heads(length)
    modality, (mask, seen) = random_labels(kind, length), build_masks(masked, length)
    padding = ~seen.any(1)
    seen = seen & torch.ones(length, length, dtype=torch.bool).tril()

    rows, invisible, padded = (modality.expand(BATCH, -1).tolist(), (~seen).tolist(), padding.tolist())

    @functools.cache
    def hidden(b, i, own):
        row, total = rows[b], 0
        for j in range(length):
            counts = invisible[b][i][j] and (count == "all_masked" or (j > i and not padded[b][j]))
            total += counts and ((row[i] >= 0 and row[j] == row[i]) == own)
        return total

    for merge in ("mass", "sum"):
        expected, *_ = modular(
            query, key, value, modality, seen=seen, merge=merge, pseudo=(decay, -0.3, hidden)
        )  # fmt: skip
        result = modular_attention(
            query, key, value, modality=modality, mask=mask, is_causal=True, merge=merge,
            pseudo=PseudoAttention(decay, -0.3, count),
        )  # fmt: skip
        torch.testing.assert_close(result.output, expected, **EXACT)


def test_pseudo_attention_logit():
    result = pseudo_logit(torch.tensor(6), PseudoAttention(0.7), torch.float64)
    torch.testing.assert_close(result, torch.tensor(0.6712318555, dtype=torch.float64), rtol=1e-9, atol=0)
    for decay in (0.0, 0.3, 2.0):
        for n in range(5):
            assert float(pseudo_logit(torch.tensor(n), PseudoAttention(decay, 0.4), torch.float64)) == pytest.approx(
                logit(n, decay, 0.4)
            )


def test_mass_with_pseudo_attention_is_an_additional_key():
    query, key, value = random_heads()
    modality = random_labels("blocks")
    result = modular_attention(query, key, value, modality=modality, is_causal=True, pseudo=PseudoAttention(0.7))
    plain = attend(query, key, value, is_causal=True).output
    n = torch.stack([(torch.arange(LONG) > i) for i in range(LONG)])
    same = modality[:, None] == modality
    rows = [[logit(int((n & s)[i].sum()), 0.7) for i in range(LONG)] for s in (same, ~same)]
    b = torch.tensor(rows, dtype=torch.float64)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(DIM)
    z = scores.masked_fill(n, -math.inf).exp().sum(-1)
    torch.testing.assert_close(result.output, plain * (z / (z + b.exp().sum(0)))[..., None], **EXACT)


def test_base_of_minus_infinity_equals_masking():
    query, key, value = random_heads()
    given = {"modality": random_labels("mixed"), "is_causal": True}
    plain = modular_attention(query, key, value, **given).output
    result = modular_attention(query, key, value, pseudo=PseudoAttention(base=-math.inf), **given).output
    torch.testing.assert_close(result, plain, **EXACT)


@pytest.mark.parametrize("merge", ["mass", "gate", "sum", "concat"])
@pytest.mark.parametrize("pseudo", [None, PseudoAttention(0.7)])
def test_decoding_equals_one_pass(merge, pseudo):
    query, key, value = random_heads()
    modality = torch.tensor([1] * 3 + [0] * 9 + [1] * 25)
    if pseudo is not None:
        pseudo = PseudoAttention(0.7, reference=41)
    given = {"merge": merge, "pseudo": pseudo, "gate": torch.zeros(HEADS, 1).double() if merge == "gate" else None}
    full = modular_attention(query, key, value, modality=modality, is_causal=True, **given).output
    for start, stop in ((17, 18), (18, 36), (0, 35)):
        result = modular_attention(
            query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], modality=modality[:stop],
            query_modality=modality[start:stop], is_causal=True, offset=start, **given,
        ).output  # fmt: skip
        torch.testing.assert_close(result, full[:, :, start:stop], **EXACT)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), merge=st.sampled_from(["mass", "gate", "sum", "concat"]))
def test_no_information_from_later_keys(seed, merge):
    query, key, value = random_heads(seed=seed)
    modality = random_labels("ragged", seed=seed)
    index = int(torch.randint(1, LONG, (), generator=torch.Generator().manual_seed(seed)))
    given = {"modality": modality, "is_causal": True, "merge": merge, "pseudo": PseudoAttention(0.7),
             "gate": torch.zeros(HEADS, 1) if merge == "gate" else None}  # fmt: skip
    before = modular_attention(query, key, value, **given).output
    for x in (query, key, value):
        x[:, :, index:] += 3.0
    after = modular_attention(query, key, value, **given).output
    torch.testing.assert_close(after[:, :, :index], before[:, :, :index], **EXACT)
    assert not torch.allclose(after[:, :, index:], before[:, :, index:])


@settings(max_examples=20, deadline=None)
@given(places=st.lists(st.integers(0, LONG), min_size=1, max_size=5), is_causal=st.booleans())
def test_padding_position_has_no_effect(places, is_causal):
    query, key, value = random_heads()
    modality = random_labels("ragged")
    real = [True] * LONG
    for index in places:
        real.insert(index, False)
    mask = torch.tensor(real)

    def padded(x, dim, fill):
        wide = x.new_full([len(real) if d == dim else n for d, n in enumerate(x.shape)], fill)
        return wide.index_copy(dim, mask.nonzero()[:, 0], x)

    wide = modular_attention(
        *(padded(x, 2, 7.0) for x in (query, key, value)), modality=padded(modality, 1, -1),
        mask=mask.expand(BATCH, -1), is_causal=is_causal, pseudo=PseudoAttention(),
    ).output  # fmt: skip
    narrow = modular_attention(
        query, key, value, modality=modality, is_causal=is_causal, pseudo=PseudoAttention()
    ).output
    torch.testing.assert_close(wide[:, :, mask], narrow, **EXACT)


@pytest.mark.parametrize("merge", ["mass", "gate", "sum", "concat"])
@pytest.mark.parametrize("kind", ["blocks", "ragged"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(merge, kind, is_causal):
    query, key, value = (x[:, :2, :, :3].clone().requires_grad_() for x in random_heads(34))
    gate = torch.randn(2, 1, dtype=torch.float64, requires_grad=True) if merge == "gate" else None
    base = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    mask = build_masks("padding", 34)[0]

    def outputs(*inputs):
        result = modular_attention(
            *inputs[:3], modality=random_labels(kind, 34), mask=mask, is_causal=is_causal, merge=merge,
            gate=inputs[4] if merge == "gate" else None, pseudo=PseudoAttention(0.7, inputs[3]),
        )  # fmt: skip
        return result.output, result.own.lse.clamp(min=-9), result.cross.output

    inputs = (query, key, value, base, *(() if gate is None else (gate,)))
    assert gradcheck(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("merge", ["mass", "gate", "sum", "concat"])
@pytest.mark.parametrize("pseudo", [None, PseudoAttention()])
def test_query_without_keys_is_zero_with_zero_gradient(length, merge, pseudo):
    inputs = [x.requires_grad_() for x in random_heads(length)]
    mask = torch.ones(BATCH, length, length, dtype=torch.bool)
    mask[0, 3], mask[1] = False, False
    result = modular_attention(
        *inputs, modality=random_labels("blocks", length), mask=mask, is_causal=True, merge=merge, pseudo=pseudo,
        gate=torch.zeros(HEADS, 1) if merge == "gate" else None,
    )  # fmt: skip
    assert not result.output[0, :, 3].any()
    assert not result.output[1].any()
    result.output.square().sum().backward()
    for x in inputs:
        assert x.grad.isfinite().all()
        assert not x.grad[1].any()
        assert x.grad[0].any()


@pytest.mark.parametrize("keys", [0, 1])
def test_few_keys(keys):
    query, key, value = random_heads()
    result = modular_attention(
        query, key[:, :, :keys], value[:, :, :keys], modality=torch.zeros(keys, dtype=torch.int64),
        query_modality=random_labels("mixed"), pseudo=PseudoAttention(count="all_masked"),
    )  # fmt: skip
    expected = value[:, :, :1].repeat_interleave(2, 1).expand(-1, -1, LONG, -1) if keys else torch.zeros(1).double()
    torch.testing.assert_close(result.output, expected.expand_as(result.output), **EXACT)


def test_fallback_without_a_kernel(monkeypatch):
    query, key, value = random_heads()
    given = {
        "modality": random_labels("ragged"),
        "is_causal": True,
        "mask": build_masks("rows")[0],
        "pseudo": PseudoAttention(),
    }
    fused = modular_attention(query, key, value, **given)
    assert sdpa_kernels.kernel_for(query.device, query.dtype) is not None
    monkeypatch.setattr(parts_module, "kernel_for", lambda *_: None)
    written = modular_attention(query, key, value, **given)
    torch.testing.assert_close(written.output, fused.output, **EXACT)
    torch.testing.assert_close(written.own.lse, fused.own.lse, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype):
    query, key, value = random_heads(dtype=dtype)
    given = {"modality": random_labels("ragged"), "is_causal": True, "pseudo": PseudoAttention()}
    exact = modular_attention(query.double(), key.double(), value.double(), **given).output
    result = modular_attention(query, key, value, **given).output
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, **{k: 2 * v for k, v in TOL[dtype].items()})


def test_autocast_dtype():
    query, key, value = random_heads(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = modular_attention(query, key, value, modality=random_labels("blocks"))
    assert result.output.dtype == torch.bfloat16
    assert result.own.lse.dtype == torch.float32


def test_dropout_drops_weights_within_parts():
    query, key, value = random_heads()
    ones = torch.ones_like(value)
    torch.manual_seed(0)
    result = modular_attention(query, key, ones, modality=random_labels("blocks"), dropout=0.5, merge="sum").output
    assert result.std() > 0.1
    torch.testing.assert_close(result.mean(), torch.tensor(2.0).double(), rtol=0.1, atol=0)


@layout
@pytest.mark.parametrize("valid", [False, True])
def test_block_layout_round_trip(kind, valid):
    modality = random_labels(kind)
    mask = build_masks("padding")[0] if valid else None
    x = random_heads()[0].requires_grad_()
    blocks = blocks_of(modality, mask)
    parts = into_blocks(x, blocks)
    assert [part.shape[2] for part in parts] == list(blocks.lengths)
    rows = modality.expand(BATCH, -1)
    for b in range(BATCH):
        for label, part in zip(blocks.labels, parts, strict=True):
            own = x[b][:, rows[b] == label]
            if kind != "ragged":
                assert torch.equal(part[b], own)
            elif not valid:
                assert torch.equal(part[b][:, : own.shape[1]], own)
    back = out_of_blocks(parts, blocks)
    assert torch.equal(back, x)
    grad = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(back, x, grad)[0], grad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"modality": [0, 1]}, ShapeError, "modular_attention modality: expected a tensor of integer labels, got list"),
        ({"modality": torch.zeros(3).long()}, ShapeError, r"attention modality: expected shape \(key,\) = \(11,\)"),
        ({"merge": "mas"}, ConfigError, "modular_attention: expected a known merge, got 'mas'. Did you mean 'mass'"),
        ({"merge": "gate"}, ConfigError, "expected a gate with merge='gate' and none otherwise, got gate = None"),
        ({"gate": torch.zeros(4, 1)}, ConfigError, "got gate = a tensor with merge = 'mass'"),
        ({"merge": "gate", "gate": torch.zeros(3, 1)}, ShapeError, r"gate: expected a shape that broadcasts.*\(3, 1\)"),
        ({"query_modality": torch.zeros(3).long()}, ShapeError, r"query_modality: expected integer labels.*\(11,\)"),
        ({"query_modality": torch.zeros(11)}, ShapeError, "query_modality: expected integer labels.*float32"),
        ({"offset": -1}, ShapeError, "modular_attention offset: expected offset >= 0, got -1"),
        ({"dropout": 1.0}, ShapeError, "modular_attention dropout: expected a probability"),
        ({"mask": torch.ones(11, 11).bool()}, ShapeError, r"modular_attention mask: expected \(batch, key\)"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    query, key, value = random_heads(SHORT)
    with pytest.raises(error, match=message):
        modular_attention(query, key, value, **{"modality": random_labels("blocks", SHORT), **call})


def test_errors_of_queries_and_pseudo_attention():
    query, key, value = random_heads(SHORT)
    with pytest.raises(
        ShapeError, match=r"expected labels of the queries: 1 queries and 11 keys, got None\. With a cache"
    ):
        modular_attention(query[:, :, :1], key, value, modality=random_labels("blocks", SHORT))
    with pytest.raises(ConfigError, match="PseudoAttention: expected a finite decay >= 0, got decay = -1"):
        PseudoAttention(-1)
    with pytest.raises(
        ConfigError, match=r"PseudoAttention: expected a known count, got 'all'\. Choose one of: all_masked"
    ):
        PseudoAttention(count="all")
