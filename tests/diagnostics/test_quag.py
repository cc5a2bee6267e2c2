"""QUAG written out and without its matrix, against loops in float64."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise.diagnostics.quag_operators import operators, quag_attention, quag_output
from equipoise.errors import ConfigError, ShapeError
from equipoise.recording import AttentionCall
from helpers.tolerance import TOL
from oracles import quag as slow

EXACT = TOL[torch.float64]
BATCH, HEADS, KEYHEADS, ROWS, KEYS, WIDTH, DIM = 2, 6, 3, 5, 11, 7, 13
NAMES = ("audio", "image", "text")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_labels(count, batch, tokens, seed=0):
    """Random labels, special ones among them."""
    return torch.randint(-1, count, (batch, tokens), generator=torch.Generator().manual_seed(seed + 17))


def random_tensors(rows=ROWS, keys=KEYS, *, seed=0, dtype=torch.float64, keyheads=KEYHEADS):
    return (
        normal(BATCH, HEADS, rows, WIDTH, seed=seed, dtype=dtype),
        normal(BATCH, keyheads, keys, WIDTH, seed=seed + 1, dtype=dtype),
        normal(BATCH, keyheads, keys, DIM, seed=seed + 2, dtype=dtype),
    )


def random_mask(*shape, seed=3):
    """A random mask; the first query of every sample sees nothing where rows have masks of their own."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    if shape[2] > 1:
        mask[:, :, 0] = False
    return mask


MASKS = {
    "none": lambda rows, keys: None,
    "padding": lambda rows, keys: random_mask(BATCH, 1, 1, keys),
    "padding of each head": lambda rows, keys: random_mask(BATCH, HEADS, 1, keys),
    "for each query": lambda rows, keys: random_mask(BATCH, 1, rows, keys),
    "one for all samples": lambda rows, keys: random_mask(1, 1, rows, keys),
    "for each head": lambda rows, keys: random_mask(1, HEADS, rows, keys),
    "for each query, keys alike": lambda rows, keys: random_mask(BATCH, 1, rows, 1),
    "added": lambda rows, keys: normal(BATCH, 1, rows, keys, seed=5).masked_fill(
        ~random_mask(BATCH, 1, rows, keys), torch.finfo(torch.float64).min
    ),
}


def every_operator(count):
    """(name as the library has it, as the oracle has it)."""
    return [
        ("unimodal", "unimodal"), ("crossmodal", "crossmodal"), ("all", "all"),
        *((f"avg-{name}", number) for number, name in enumerate(NAMES[:count])),
    ]  # fmt: skip


def expected_output(call, columns, rows, pairs):
    attention = slow.matrix(
        call.query, call.key, mask=call.mask, is_causal=call.is_causal, scale=call.scale, softcap=call.softcap,
        sinks=call.sinks,
    )  # fmt: skip
    seen = slow.visible(call.mask, call.is_causal, attention.shape)
    rows, columns = rows.expand(BATCH, -1), columns.expand(BATCH, -1)
    return slow.output(slow.quag(attention, rows, columns, pairs, seen), call.value)


@pytest.mark.parametrize("cls_rows", ["keys", "skip", "all"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_operators(count, cls_rows):
    result = operators(NAMES[:count], cls_rows=cls_rows)
    assert len(result) == 3 + count
    for name, expected in every_operator(count):
        assert set(result[name]) == slow.pairs_of(expected, count, cls_rows)
        assert len(set(result[name])) == len(result[name])


def test_hand_computed_operators():
    result = operators(("audio", "image"))
    assert result["unimodal"] == ((0, 0), (1, 1))
    assert result["crossmodal"] == ((0, 1), (1, 0))
    assert result["avg-audio"] == ((0, 0), (1, 0), (-1, 0))
    assert set(result["all"]) == {(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (-1, 1)}
    assert operators(("audio", "image"), cls_rows="skip")["avg-audio"] == ((0, 0), (1, 0))
    assert operators(("audio", "image"), cls_rows="all")["crossmodal"] == ((0, 1), (1, 0), (-1, 0), (-1, 1))
    assert operators(("audio",))["crossmodal"] == ()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_matrix_against_loops(count, masked):
    seen = random_mask(BATCH, 1, ROWS, KEYS).expand(BATCH, HEADS, -1, -1) if masked else None
    full = torch.ones(BATCH, HEADS, ROWS, KEYS, dtype=torch.bool) if seen is None else seen
    attention = normal(BATCH, HEADS, ROWS, KEYS).masked_fill(~full, -1e9).softmax(-1) * full
    rows, columns = random_labels(count, BATCH, ROWS), random_labels(count, BATCH, KEYS, seed=1)
    for name, reference in every_operator(count):
        for cls_rows in ("keys", "skip", "all"):
            pairs = operators(NAMES[:count], cls_rows=cls_rows)[name]
            result = quag_attention(attention, rows, columns, pairs, visible=seen)
            expected = slow.quag(attention, rows, columns, slow.pairs_of(reference, count, cls_rows), full)
            torch.testing.assert_close(result, expected, **EXACT)


def test_hand_computed_matrix():
    attention = torch.tensor([[[[0.1, 0.5, 0.3, 0.1], [0.4, 0.0, 0.2, 0.4], [0.7, 0.1, 0.1, 0.1]]]])
    rows, columns = torch.tensor([-1, 0, 1]), torch.tensor([-1, 0, 0, 1])
    seen = torch.tensor([[True, True, True, True], [True, False, True, True], [True, True, True, True]])
    result = quag_attention(attention, rows, columns, [(0, 0), (1, 0)], visible=seen[None, None])
    torch.testing.assert_close(result[0, 0, 0], attention[0, 0, 0])
    torch.testing.assert_close(result[0, 0, 1], torch.tensor([0.4, 0.0, 0.2, 0.4]))
    torch.testing.assert_close(result[0, 0, 2], torch.tensor([0.7, 0.1, 0.1, 0.1]))
    result = quag_attention(attention, rows, columns, [(-1, 0), (0, 0)])
    torch.testing.assert_close(result[0, 0, 0], torch.tensor([0.1, 0.4, 0.4, 0.1]))
    torch.testing.assert_close(result[0, 0, 1], torch.tensor([0.4, 0.1, 0.1, 0.4]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["unimodal", "crossmodal", "avg-image", "all"]))
def test_properties_of_the_matrix(seed, name):
    attention = normal(1, 2, 5, 7, seed=seed).softmax(-1)
    rows, columns = random_labels(3, 1, 5, seed), random_labels(3, 1, 7, seed + 1)
    every = operators(NAMES, cls_rows="all")
    once = quag_attention(attention, rows, columns, every[name])
    torch.testing.assert_close(once.sum(-1), attention.sum(-1), **EXACT)
    torch.testing.assert_close(quag_attention(once, rows, columns, every[name]), once, **EXACT)
    for other, pairs in every.items():
        there = quag_attention(once, rows, columns, pairs)
        back = quag_attention(quag_attention(attention, rows, columns, pairs), rows, columns, every[name])
        torch.testing.assert_close(there, back, **EXACT)
        if other == "all":
            torch.testing.assert_close(there, quag_attention(attention, rows, columns, pairs), **EXACT)
    even = torch.full_like(attention, 1 / 7)
    torch.testing.assert_close(quag_attention(even, rows, columns, every[name]), even, **EXACT)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("mask", MASKS)
def test_output_without_explicit_matrix(mask, is_causal, monkeypatch):
    monkeypatch.setattr(importlib.import_module("equipoise.diagnostics.quag_operators"), "CHUNK", 2)
    call = AttentionCall(*random_tensors(), mask=MASKS[mask](ROWS, KEYS), is_causal=is_causal, scale=0.7)
    rows, columns = random_labels(3, BATCH, ROWS), random_labels(3, BATCH, KEYS, seed=1)
    for name, reference in every_operator(3):
        result = quag_output(call, columns, rows, 3, operators(NAMES, cls_rows="all")[name])
        expected = expected_output(call, columns, rows, slow.pairs_of(reference, 3, "all"))
        torch.testing.assert_close(result, expected, **EXACT)


@pytest.mark.parametrize("cls_rows", ["keys", "skip", "all"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both ways", "causal"])
def test_output_for_any_number_of_modalities(count, cls_rows, is_causal):
    call = AttentionCall(*random_tensors(seed=count), is_causal=is_causal)
    rows, columns = random_labels(count, 1, ROWS)[0], random_labels(count, 1, KEYS, seed=1)[0]
    for name, reference in every_operator(count):
        result = quag_output(call, columns, rows, count, operators(NAMES[:count], cls_rows=cls_rows)[name])
        expected = expected_output(call, columns, rows, slow.pairs_of(reference, count, cls_rows))
        torch.testing.assert_close(result, expected, **EXACT)


@pytest.mark.parametrize("options", [{"sinks": normal(HEADS, seed=9)}, {"softcap": 0.6}], ids=["sinks", "softcap"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both ways", "causal"])
def test_biased_and_scaled_scores(options, is_causal):
    call = AttentionCall(*random_tensors(), mask=random_mask(BATCH, 1, 1, KEYS), is_causal=is_causal, **options)
    rows, columns = random_labels(2, BATCH, ROWS), random_labels(2, BATCH, KEYS, seed=1)
    for name, reference in every_operator(2):
        result = quag_output(call, columns, rows, 2, operators(NAMES[:2])[name])
        expected = expected_output(call, columns, rows, slow.pairs_of(reference, 2, "keys"))
        torch.testing.assert_close(result, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "for each query"])
def test_enough_queries_for_kernels(mask, dtype):
    rows, keys = 37, 41
    call = AttentionCall(*random_tensors(rows, keys, dtype=dtype), mask=MASKS[mask](rows, keys), is_causal=True)
    who, columns = torch.arange(rows) // 13, torch.arange(keys) // 15
    for name, reference in every_operator(3):
        result = quag_output(call, columns, who, 3, operators(NAMES)[name])
        assert result.dtype == dtype
        expected = expected_output(call, columns, who, slow.pairs_of(reference, 3, "keys"))
        torch.testing.assert_close(result.double(), expected, **TOL[dtype])


def test_more_queries_than_keys():
    call = AttentionCall(*random_tensors(KEYS, ROWS), is_causal=True)
    rows, columns = random_labels(2, BATCH, KEYS), random_labels(2, BATCH, ROWS, seed=1)
    result = quag_output(call, columns, rows, 2, operators(NAMES[:2])["all"])
    torch.testing.assert_close(result, expected_output(call, columns, rows, slow.pairs_of("all", 2, "keys")), **EXACT)


class LargestTensor(TorchDispatchMode):
    """The most numbers that any operation put into one tensor."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and part.numel() > self.numbers:
                self.numbers = part.untyped_storage().nbytes() // part.element_size()
        return result


@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize("name", ["unimodal", "all"])
def test_no_matrix_is_built(mask, name):
    rows = 509
    call = AttentionCall(
        *random_tensors(rows, rows, dtype=torch.float32), mask=MASKS[mask](rows, rows), is_causal=mask == "none"
    )
    who = torch.arange(rows) // 170
    with LargestTensor() as largest:
        quag_output(call, who, who, 3, operators(NAMES)[name])
    # The output itself, at a kernel's width; a matrix or mask of some of the queries would be larger.
    assert largest.numbers <= BATCH * HEADS * rows * 16
    with LargestTensor() as largest:
        call.query @ call.key.repeat_interleave(2, 1).transpose(-1, -2)
    assert largest.numbers == BATCH * HEADS * rows * rows


def test_autocast_computes_means_in_float32():
    call = AttentionCall(*random_tensors(dtype=torch.float32))
    rows, columns = random_labels(2, BATCH, ROWS), random_labels(2, BATCH, KEYS, seed=1).clamp(min=0)
    plain = quag_output(call, columns, rows, 2, operators(NAMES[:2], cls_rows="all")["all"])
    with torch.autocast("cpu", torch.bfloat16):
        result = quag_output(call, columns, rows, 2, operators(NAMES[:2], cls_rows="all")["all"])
    torch.testing.assert_close(result, plain, **TOL[torch.float32])


def test_gradients_flow():
    parts = tuple(
        part[:1, :keyheads, :3, :5].clone().requires_grad_()
        for part, keyheads in zip(random_tensors(), (2, 1, 1), strict=True)
    )
    rows, columns = torch.tensor([0, 1, -1]), torch.tensor([1, 0, 1])
    pairs = operators(NAMES[:2])["avg-image"]
    assert torch.autograd.gradcheck(lambda *inputs: quag_output(AttentionCall(*inputs), columns, rows, 2, pairs), parts)


def test_errors():
    attention = torch.ones(BATCH, HEADS, ROWS, KEYS)
    rows, columns = random_labels(2, BATCH, ROWS), random_labels(2, BATCH, KEYS)
    with pytest.raises(ConfigError, match=r"quag: expected a known cls_rows, got 'key'. Did you mean 'keys'"):
        operators(NAMES, cls_rows="key")
    for pair in ((0, -1), (-2, 0)):
        with pytest.raises(
            ConfigError, match=r"quag: expected quadrants .* got \(.*Columns of special tokens are never"
        ):
            quag_attention(attention, rows, columns, [pair])
    with pytest.raises(ConfigError, match=r"columns from 0 to 1, rows also -1, got \(0, 2\)"):
        quag_output(AttentionCall(*random_tensors()), columns, rows, 2, [(0, 2)])
    with pytest.raises(ShapeError, match=r"quag_attention columns modality: expected integer labels .*\(2, 11\)"):
        quag_attention(attention, rows, columns[:, :3], [(0, 0)])
    with pytest.raises(ShapeError, match=r"quag_attention rows modality: expected integer labels .*\(2, 5\)"):
        quag_attention(attention, rows[:, :2], columns, [(0, 0)])
    # A modality that no token has is absent, and no error.
    assert torch.equal(quag_attention(attention, rows, columns, [(0, 7)]), attention)
