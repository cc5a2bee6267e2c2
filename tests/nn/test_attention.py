"""attend on every code path against oracles.attention; masks, dtypes and errors."""

import doctest
import functools
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise.nn.attention.key_layout as layout
import equipoise.nn.attention.sdpa_kernels as kernels
import equipoise.nn.attention.segments as segments
from equipoise.errors import ShapeError
from equipoise.nn.attention import attend
from helpers.tolerance import TOL
from oracles import attention as oracles

# The module and its function have the same name.
attention = importlib.import_module("equipoise.nn.attention.fused_share")

B, H, Q, K, D = 2, 6, 5, 13, 8
ROUTES = ("segments", "two passes", "explicit")
GRAINS = {"segments": 1, "segments with strays": 4}


def _raise_wrong_route(*_args, **_kwargs):
    raise AssertionError("the wrong route was taken")


def _raise_missing_operator(*_args, **_kwargs):
    raise AttributeError("no such operator")


@pytest.fixture(params=[*GRAINS, *ROUTES[1:]])
def route(request, monkeypatch):
    """Forces one code path for all sizes; the private operator is removed to test the public one."""
    chosen = ROUTES[0] if request.param in GRAINS else request.param
    monkeypatch.setattr(attention, "GRAIN", GRAINS.get(request.param, 1))
    monkeypatch.setattr(attention, "FEW_QUERIES", 10**9 if chosen == "explicit" else 0)
    monkeypatch.setattr(layout, "SAMPLE_WORK", 0)
    monkeypatch.setattr(layout, "SHORTEST_RUN", 0)
    functions = {"segments": "SegmentedAttention", "two passes": "_share_by_columns", "explicit": "_explicit"}
    for other in set(ROUTES) - {chosen}:
        monkeypatch.setattr(attention, functions[other], _raise_wrong_route)
    if chosen == "two passes":
        monkeypatch.setattr(kernels, "CPU", kernels.Kernel(_raise_missing_operator, _raise_missing_operator))
    kernels._tested_kernel.cache_clear()
    yield chosen
    kernels._tested_kernel.cache_clear()


def _heads(dtype=torch.float64, *, queries=Q, keys=K, key_heads=H, dim=D, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, queries, D), (B, key_heads, keys, D), (B, key_heads, keys, dim))
    result = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(grad) for tensor in result]


BLOCKS = torch.tensor([-1] + [0] * 5 + [1] * 3 + [2] * 4)
MIXED = torch.tensor([2, 0, 0, 1, -1, 0, 2, 2, 1, 0, -1, 1, 2])
MODALITIES = {
    "blocks": BLOCKS,
    "interleaved": MIXED,
    "empty modality": torch.tensor([0] * 6 + [2] * 7),
    "one modality": torch.zeros(K, dtype=torch.int64),
    "alike": torch.stack([BLOCKS, BLOCKS]),
    "ragged": torch.stack([BLOCKS, MIXED]),
    "only special": torch.full((K,), -1),
}


def _masks():
    generator = torch.Generator().manual_seed(1)
    key = torch.rand(B, K, generator=generator) < 0.7
    key[1, :6] = False
    pair = torch.rand(B, Q, K, generator=generator) < 0.6
    pair[0, 2] = False
    additive = torch.randn(B, H, Q, K, generator=generator, dtype=torch.float64).masked_fill(~pair[:, None], -math.inf)
    return {
        "no mask": (None, None),
        "key": (key, key[:, None, None]),
        "sample without keys": (
            key & torch.tensor([[True], [False]]),
            (key & torch.tensor([[True], [False]]))[:, None, None],
        ),
        "pair": (pair, pair[:, None]),
        "additive": (additive, additive),
        "per head": (additive[:1, :, :1], additive[:1, :, :1]),
        "column": (pair[:, None, :, :1], pair[:, None, :, :1]),
    }


MASKS = _masks()


PICKS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


@functools.cache
def _expected(modality, mask, is_causal, queries, key_heads, dim, scale):
    """Returns output, share and special mass of the oracle, weights of a mixed loss, and its gradients."""
    inputs = _heads(queries=queries, key_heads=key_heads, dim=dim, grad=True)
    output, share, special = oracles.attend(*inputs, MODALITIES[modality], 3, MASKS[mask][1], is_causal, scale)
    weights = [torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(2)) for t in (output, share)]
    gradients = [_gradients(output, share, weights, pick, inputs) for pick in PICKS]
    return output.detach(), share.detach(), special.detach(), weights, gradients


def _compare(modality, mask, *, is_causal=False, queries=Q, key_heads=H, dim=D, scale=None):
    """Compares output, share, special mass and the gradients of a mixed loss with the oracle in float64."""
    inputs = _heads(queries=queries, key_heads=key_heads, dim=dim, grad=True)
    output, share = attend(
        *inputs, modality=MODALITIES[modality], num_modalities=3, mask=MASKS[mask][0], is_causal=is_causal, scale=scale
    )
    expected, wanted_share, special, weights, gradients = _expected(
        modality, mask, is_causal, queries, key_heads, dim, scale
    )
    torch.testing.assert_close(output, expected, **TOL[torch.float64])
    torch.testing.assert_close(share, wanted_share, **TOL[torch.float64])
    alive = (share.sum(-1) + special).round().bool()
    torch.testing.assert_close(share.sum(-1) + special, alive.double(), **TOL[torch.float64])
    for pick, theirs in zip(PICKS, gradients, strict=True):
        ours = _gradients(output, share, weights, pick, inputs)
        for got, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, right, **TOL[torch.float64])


def _gradients(output, share, weights, pick, inputs):
    parts = [c * (w * t).sum() for c, w, t in zip(pick, weights, (output, share), strict=True) if c]
    result = torch.autograd.grad(sum(parts), inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(result, inputs, strict=True)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_equals_the_oracle(route, modality, mask, is_causal):
    _compare(modality, mask, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "sizes", [{"queries": 1}, {"queries": 17}, {"queries": K}, {"key_heads": 2}, {"key_heads": 1, "dim": 3},
              {"dim": 11}, {"scale": 0.7}, {"queries": 17, "key_heads": 3, "dim": 11}], ids=str,
)  # fmt: skip
def test_sizes(route, sizes, is_causal):
    for modality in ("blocks", "interleaved"):
        _compare(modality, "no mask", is_causal=is_causal, **sizes)


@pytest.mark.parametrize("mask", ["key", "additive"])
def test_shared_heads_under_a_mask(route, mask):
    _compare("ragged", mask, key_heads=2, dim=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(route, dtype):
    """The share of half-precision inputs is as accurate as that of float32 inputs."""
    inputs = _heads(dtype, grad=True)
    twins = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output, share = attend(*inputs, modality=MIXED, num_modalities=3, mask=MASKS["key"][0])
    expected, wanted_share, _ = oracles.attend(*twins, MIXED, 3, MASKS["key"][1])
    assert output.dtype == dtype
    assert share.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, **TOL[dtype])
    torch.testing.assert_close(share.double(), wanted_share, **TOL[torch.float32])
    weights = [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view(t.shape) for t in (output, share)]
    ours = _gradients(output, share, weights, (1.0, 1.0), inputs)
    theirs = _gradients(expected, wanted_share, weights, (1.0, 1.0), twins)
    # A gradient sums many rounded terms: rounding is relative to the largest of them.
    for got, right in zip(ours, theirs, strict=True):
        size = right.abs().max()
        torch.testing.assert_close(got.double() / size, right / size, **TOL[dtype])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["no mask", "key", "pair"])
def test_gradcheck(route, mask, is_causal):
    inputs = _heads(key_heads=2, dim=3, grad=True)

    def function(*heads):
        return tuple(attend(*heads, modality=MIXED, num_modalities=3, mask=MASKS[mask][0], is_causal=is_causal))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_row_without_keys_is_zero_with_zero_gradient(route):
    inputs = _heads(torch.float32, grad=True)
    mask = torch.ones(B, Q, K, dtype=torch.bool)
    mask[1, 3] = False
    output, share = attend(*inputs, modality=BLOCKS, mask=mask)
    assert not output[1, :, 3].any()
    assert not share[1, :, 3].any()
    grad_query, grad_key, grad_value = torch.autograd.grad(output[1, :, 3].sum() + share[1, :, 3].sum(), inputs)
    assert not grad_query.any()
    assert not grad_key.any()
    assert not grad_value.any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_row_without_keys_is_zero_without_modality(is_causal):
    inputs = _heads(grad=True)
    for passed, plain in (MASKS["sample without keys"], MASKS["additive"]):
        output, share = attend(*inputs, mask=passed, is_causal=is_causal)
        expected, _, _ = oracles.attend(*inputs, BLOCKS, 3, plain, is_causal)
        assert share is None
        torch.testing.assert_close(output, expected, **TOL[torch.float64])
        ours, theirs = (torch.autograd.grad(t.square().sum(), inputs) for t in (output, expected))
        for got, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, right, **TOL[torch.float64])


def test_without_modality_equals_torch():
    query, key, value = _heads(torch.float32, key_heads=H)
    for is_causal in (False, True):
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        assert torch.equal(attend(query, key, value, is_causal=is_causal).output, expected)


@pytest.mark.parametrize("shape", [(B, 0, K), (0, Q, K), (B, Q, 0)])
@pytest.mark.parametrize("with_modality", [False, True])
def test_no_keys(shape, with_modality):
    batch, queries, keys = shape
    query = torch.ones(batch, H, queries, D, requires_grad=True)
    key = torch.ones(batch, H, keys, D)
    modality = torch.zeros(keys, dtype=torch.int64) if with_modality else None
    output, share = attend(query, key, key, modality=modality, num_modalities=2)
    assert output.shape == query.shape
    assert not output.any()
    assert share is None or share.shape == (batch, H, queries, 2)
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert not grad.any()


def test_dropout_affects_only_the_output():
    inputs = _heads(torch.float32, queries=211, keys=K)
    still = attend(*inputs, modality=BLOCKS)
    torch.manual_seed(0)
    shaken = attend(*inputs, modality=BLOCKS, dropout=0.3)
    torch.testing.assert_close(shaken.share, still.share, **TOL[torch.float32])
    assert not torch.allclose(shaken.output, still.output)
    # Dropout keeps the mean: a value of ones gives 1 on average, with a spread that n = B H Q rows make small.
    query, key, _ = inputs
    mean = attend(query, key, torch.ones_like(key), modality=BLOCKS, dropout=0.3).output[..., 0].mean()
    assert abs(mean - 1) < 5 / math.sqrt(B * H * 211)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_share_only(route, modality, is_causal):
    query, key, value = _heads(queries=37, key_heads=1)
    labels = MODALITIES[modality]
    options = {"modality": labels, "num_modalities": 3, "is_causal": is_causal, "scale": 0.3}
    torch.testing.assert_close(
        attention.shares(query, key, **options), attend(query, key, value, **options).share, **TOL[torch.float64]
    )


def test_dropout_without_modality():
    query, key, value = _heads(torch.float32)
    calm = attention._two_passes(query, key, value, BLOCKS, 3, None, False, 0.3, 0.0)
    shaken = attention._two_passes(query, key, value, BLOCKS, 3, None, False, 0.3, 0.9)
    assert torch.equal(shaken.share, calm.share)
    assert not torch.allclose(shaken.output, calm.output)


def test_learned_mask_has_a_gradient():
    query, key, value = _heads(queries=37)
    learned = torch.zeros(1, H, 37, K, dtype=torch.float64, requires_grad=True)

    def function(mask):
        return tuple(attend(query, key, value, modality=MIXED, num_modalities=3, mask=mask))

    assert torch.autograd.gradcheck(function, (learned,), fast_mode=True)
    assert learned.grad is None


def test_more_modalities_than_head_width(route):
    modality = torch.arange(K)
    query, key, value = _heads()
    share = attend(query, key, value, modality=modality).share
    attention_matrix = (query @ key.transpose(-1, -2) * D**-0.5).softmax(-1)
    torch.testing.assert_close(share, attention_matrix, **TOL[torch.float64])


def test_tiling_does_not_change_results(monkeypatch):
    monkeypatch.setattr(attention, "FEW_QUERIES", 0)
    inputs = _heads(key_heads=2)
    full = attend(*inputs, modality=MIXED, mask=MASKS["additive"][0])
    monkeypatch.setattr(segments, "ROWS_PER_THREAD", 1)
    monkeypatch.setattr(segments, "TILES", 10**9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pieces = attend(*inputs, modality=MIXED, mask=MASKS["additive"][0])
    assert len(list(segments._tiles(inputs[0], inputs[1]))) == B * 2
    torch.testing.assert_close(pieces.output, full.output, **TOL[torch.float64])
    torch.testing.assert_close(pieces.share, full.share, **TOL[torch.float64])


def test_segments_are_attention_within_a_modality():
    query, key, value = _heads()
    kernel = kernels.kernel_for(query.device, query.dtype)
    (group,) = layout.plan_segments(BLOCKS, None, is_causal=False, sample_work=0)
    parts = segments.segment_attention(kernel, query, key, value, group.runs, None, False, D**-0.5)
    assert [run.label for run in group.runs] == [-1, 0, 1, 2]
    for run, part in zip(group.runs, parts, strict=True):
        here = slice(run.start, run.stop)
        scores = query @ key[:, :, here].transpose(-1, -2) * D**-0.5
        torch.testing.assert_close(part.output, scores.softmax(-1) @ value[:, :, here], **TOL[torch.float64])
        torch.testing.assert_close(part.lse, scores.logsumexp(-1), **TOL[torch.float64])


def test_padded_samples_share_one_layout():
    """Rows of ``pack`` that differ only in padding form one group; other rows form one group per sample."""
    kept = MASKS["key"][0]
    bias = torch.zeros(B, 1, 1, K).masked_fill(~kept[:, None, None], -math.inf)
    packed = torch.stack([BLOCKS, BLOCKS]).masked_fill(~kept, -1)
    assert len(layout.plan_segments(packed, bias, is_causal=False, sample_work=0)) == 1
    assert layout.plan_segments(packed, None, is_causal=False, sample_work=0) is None
    assert len(layout.plan_segments(packed, None, is_causal=False, sample_work=layout.SAMPLE_WORK)) == B


def test_causal_fragments_use_another_path():
    assert layout.plan_segments(MIXED, None, is_causal=True, sample_work=0) is None
    assert layout.plan_segments(MIXED, None, is_causal=False, sample_work=0) is not None


def test_autocast():
    query, key, value = _heads(torch.float32, queries=37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, share = attend(query, key.bfloat16(), value, modality=BLOCKS)
        plain = attend(query, key.bfloat16(), value).output
    assert output.dtype == plain.dtype == torch.bfloat16
    assert share.dtype == torch.float32
    torch.testing.assert_close(output, plain, **TOL[torch.bfloat16])


@pytest.mark.parametrize("queries", [1, 37])
def test_under_compile(queries):
    inputs = _heads(torch.float32, queries=queries)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(query, key, value):
        return attend(query, key, value, modality=MIXED, num_modalities=3)

    got, expected = compiled(*inputs), attend(*inputs, modality=MIXED, num_modalities=3)
    torch.testing.assert_close(got.output, expected.output, **TOL[torch.float32])
    torch.testing.assert_close(got.share, expected.share, **TOL[torch.float32])


def test_functional_gradients(route):
    query, key, value = _heads()

    def loss(query):
        output, share = attend(query, key, value, modality=MIXED, num_modalities=3)
        return output.sum() + share[..., 0].square().sum()

    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(query), expected, **TOL[torch.float64])


def test_strided_inputs(route):
    """Heads that are split from one projection, and an expanded gradient, as from a mean."""
    packed = torch.randn(B, K, 3, H, D, dtype=torch.float64, requires_grad=True)
    query, key, value = packed.unbind(2)
    output, share = attend(*(t.transpose(1, 2) for t in (query, key, value)), modality=BLOCKS)
    (grad,) = torch.autograd.grad(output.mean() + share[..., 1].mean(), packed)
    twins = [t.detach().transpose(1, 2).clone().requires_grad_() for t in (query, key, value)]
    expected, wanted_share, _ = oracles.attend(*twins, BLOCKS, 3)
    torch.testing.assert_close(output, expected, **TOL[torch.float64])
    right = torch.autograd.grad(expected.mean() + wanted_share[..., 1].mean(), twins)
    torch.testing.assert_close(grad, torch.stack([g.transpose(1, 2) for g in right], dim=2), **TOL[torch.float64])


def test_incorrect_kernel_is_not_used(monkeypatch):
    def halved(*args):
        output, lse = kernels._cpu_forward(*args)
        return output / 2, lse

    monkeypatch.setattr(kernels, "CPU", kernels.Kernel(halved, kernels._cpu_backward))
    kernels._tested_kernel.cache_clear()
    try:
        assert kernels.kernel_for(torch.device("cpu"), torch.float32) is None
    finally:
        kernels._tested_kernel.cache_clear()
    assert kernels.kernel_for(torch.device("meta"), torch.float32) is None


labels = st.lists(st.integers(-1, 2), min_size=K, max_size=K).map(torch.tensor)
few = settings(max_examples=25, deadline=None)


@given(labels, st.permutations(range(3)), st.booleans())
@few
def test_permuting_the_modalities_permutes_the_columns(modality, order, is_causal):
    inputs = _heads(queries=37)
    permuted = torch.where(modality < 0, -1, torch.tensor(order)[modality])
    before = attend(*inputs, modality=modality, num_modalities=3, is_causal=is_causal)
    after = attend(*inputs, modality=permuted, num_modalities=3, is_causal=is_causal)
    torch.testing.assert_close(after.share[..., list(order)], before.share, **TOL[torch.float64])
    torch.testing.assert_close(after.output, before.output, **TOL[torch.float64])


@given(labels, st.integers(1, 7), st.integers(-1, 2))
@few
def test_padding_keys_has_no_effect(modality, amount, label):
    query, key, value = _heads(queries=37)
    before = attend(query, key, value, modality=modality, num_modalities=3)
    padded = [F.pad(t, (0, 0, 0, amount), value=7.0) for t in (key, value)]
    mask = (torch.arange(K + amount) < K).expand(B, -1)
    after = attend(query, *padded, modality=F.pad(modality, (0, amount), value=label), num_modalities=3, mask=mask)
    torch.testing.assert_close(after, before, **TOL[torch.float64])


@given(labels)
@few
def test_merging_modalities_adds_their_shares(modality):
    inputs = _heads(queries=37)
    apart = attend(*inputs, modality=modality, num_modalities=3).share
    together = attend(*inputs, modality=modality.clamp(max=1), num_modalities=2).share
    expected = torch.stack([apart[..., 0], apart[..., 1] + apart[..., 2]], dim=-1)
    torch.testing.assert_close(together, expected, **TOL[torch.float64])


@given(labels, st.integers(0, 2**16))
@few
def test_shares_and_special_mass_sum_to_one(modality, seed):
    inputs = _heads(torch.float32, queries=37, seed=seed)
    share = attend(*inputs, modality=modality + 1, num_modalities=4).share
    torch.testing.assert_close(share.sum(-1), torch.ones(B, H, 37), **TOL[torch.float32])


def test_hand_computed_two_keys():
    """With scores 0 and log 3, the second key receives three quarters."""
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    output, share = attend(query, key, torch.tensor([4.0, 8.0]).view(1, 1, 2, 1), modality=torch.tensor([0, 1]))
    torch.testing.assert_close(share.flatten(), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(output.flatten(), torch.tensor([7.0]))


def _bad(**changes):
    query, key, value = _heads(torch.float32)
    arguments = {"query": query, "key": key, "value": value, "modality": BLOCKS} | changes
    return arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(B, Q, D)}, r"attend query: expected .* shape \(batch, head, query, dim\)"),
        ({"key": torch.ones(B, H, K, D, dtype=torch.int64)}, "attend key: expected a floating tensor"),
        ({"value": torch.ones(B, H, K, D).double()}, "attend value: expected torch.float32 on cpu, as the query"),
        ({"key": torch.ones(B, H, K, D + 1)}, r"attend key: expected \(batch, width\) = \(2, 8\)"),
        ({"value": torch.ones(B, H, K + 1, D)}, r"attend value: expected \(batch, key head, key\) = \(2, 6, 13\)"),
        (
            {"key": torch.ones(B, 4, K, D), "value": torch.ones(B, 4, K, D)},
            "attend key: expected a number of heads that divides the query's, heads = 6, got 4",
        ),
        ({"dropout": 1.5}, r"attend dropout: expected a probability in \[0, 1\), got 1.5"),
        (
            {"modality": BLOCKS.tolist()},
            r"attend modality: expected a tensor of integer labels, got list\. Use torch\.tensor\(",
        ),
        ({"modality": BLOCKS.float()}, "attend modality: expected integer labels, got dtype torch.float32"),
        ({"modality": BLOCKS[1:]}, r"attend modality: expected shape \(key,\) = \(13,\) or .* got shape \(12,\)"),
        ({"num_modalities": 2}, "attend modality: expected labels from -1 to num_modalities - 1 = 1, got .* -1 to 2"),
        ({"modality": BLOCKS - 1}, "got labels from -2 to 1"),
        ({"mask": torch.ones(Q, K, dtype=torch.bool)}, r"Pass a \(query, key\) mask as mask\[None, None\]"),
        ({"mask": torch.ones(K, dtype=torch.bool)}, r"attend mask: .* got shape \(13,\)"),
        ({"mask": torch.ones(B, H, Q, K + 1)}, r"broadcasts to \(batch, head, query, key\) = \(2, 6, 5, 13\)"),
        ({"mask": torch.ones(B, K, dtype=torch.int64)}, "attend mask: expected dtype torch.bool or floating, got"),
    ],
)  # fmt: skip
def test_errors(changes, message):
    query, key, value, options = _bad(**changes)
    with pytest.raises(ShapeError, match=message):
        attend(query, key, value, **options)


def test_masks_with_the_lowest_finite_value():
    """Some callers use the lowest finite number instead of minus infinity; a row of it has no visible keys."""
    inputs = _heads(torch.float32, queries=37)
    hidden = MASKS["key"][0] & torch.tensor([[True], [False]])
    lowest = torch.zeros(B, K).masked_fill(~hidden, torch.finfo(torch.float32).min)
    torch.testing.assert_close(
        attend(*inputs, modality=MIXED, mask=lowest), attend(*inputs, modality=MIXED, mask=hidden), **TOL[torch.float32]
    )


def test_docstring_examples():
    assert doctest.testmod(attention).failed == 0
