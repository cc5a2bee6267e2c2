"""Duplex alignment: loops in float64, properties of the basis, identity at initialization, causality, decoding,
errors.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from equipoise.errors import ConfigError, ShapeError
from equipoise.nn.duplex import DuplexAligner, basis_of
from helpers.tolerance import TOL
from oracles.moda import aligned

BATCH, HEADS, LENGTH, DIM = 2, 3, 17, 5
EXACT = TOL[torch.float64]
BASES, NORMS = ("gram", "key_value", "covariance"), ("row", "fro", "spectral", "trace", "none")
KINDS = [pair for pair in itertools.product(BASES, NORMS) if pair != ("key_value", "trace")]
kinds = pytest.mark.parametrize(("basis", "norm"), KINDS)
scopes = pytest.mark.parametrize("scope", ["all", "prefix", "causal"])


def random_inputs(count=3, *, ragged=True, dtype=torch.float64, seed=0, length=LENGTH):
    random = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(BATCH, HEADS, length, DIM, generator=random, dtype=torch.float64) for _ in range(2))
    modality = torch.randint(-1, count, (BATCH, length) if ragged else (length,), generator=random)
    mask = torch.rand(BATCH, length, generator=random) < 0.8
    return key.to(dtype), value.to(dtype), modality, mask


def build_trained(count=3, *, seed=0, **options):
    torch.manual_seed(seed)
    aligner = DuplexAligner(DIM, count, **options).double()
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return aligner


def allowed_length(scope, modality, mask, prefix=None):
    """Returns the number of positions that a key may depend on."""
    rows = modality.expand(BATCH, -1)

    def upto(b, j):
        if scope == "causal":
            return j + 1
        if prefix is not None:
            return int(prefix[b])
        seen = [i for i in range(LENGTH) if mask[b, i] and rows[b, i] >= 0]
        others = [i for i in seen if rows[b, i] != rows[b, seen[-1]]]
        return others[-1] + 1 if others else 0

    return None if scope == "all" else upto


@kinds
@pytest.mark.parametrize("fuse", ["concat", "add"])
@scopes
def test_basis_against_loops(basis, norm, fuse, scope):
    key, value, modality, mask = random_inputs()
    aligner = build_trained(basis=basis, norm=norm, fuse=fuse, basis_scope=scope, mix="learned")
    result = aligner(key, value, modality=modality, mask=mask).key
    expected = aligned(
        key, value, modality, mask, aligner.state_dict(), count=3, kind=basis, norm_kind=norm,
        upto=allowed_length(scope, modality, mask),
    )  # fmt: skip
    seen = mask[:, None, :, None].expand_as(result)
    torch.testing.assert_close(result[seen], expected[seen], **EXACT)


@scopes
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_any_number_of_modalities_against_loops(scope, count, normalize):
    key, value, modality, mask = random_inputs(count, ragged=False)
    aligner = build_trained(count, basis_scope=scope, normalize_keys=normalize, mix="learned")
    prefix = torch.tensor([7, 11])
    result = aligner(key, value, modality=modality, mask=mask, prefix=prefix).key
    expected = aligned(
        key, value, modality, mask, aligner.state_dict(), count=count, normalize=normalize,
        upto=allowed_length(scope, modality, mask, prefix),
    )  # fmt: skip
    seen = mask[:, None, :, None].expand_as(result)
    torch.testing.assert_close(result[seen], expected[seen], **EXACT)


@kinds
@pytest.mark.parametrize("fuse", ["concat", "add"])
@scopes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_initialization(basis, norm, fuse, scope, dtype):
    key, value, modality, mask = random_inputs(dtype=dtype)
    aligner = DuplexAligner(DIM, 3, basis=basis, norm=norm, fuse=fuse, basis_scope=scope, mix="learned")
    assert torch.equal(aligner(key, value, modality=modality, mask=mask).key, key)


@pytest.mark.parametrize("directions", [(0,), (2, 1)])
@scopes
def test_directions_change_only_selected_keys(directions, scope):
    key, value, modality, _ = random_inputs()
    aligner = build_trained(directions=directions, basis_scope=scope)
    assert aligner.weight.shape == (len(directions), 2 * DIM, DIM)
    result = aligner(key, value, modality=modality).key
    changed = (result != key).any(dim=(1, 3))
    assert torch.equal(changed, torch.isin(modality, torch.tensor(directions)))


@scopes
@pytest.mark.parametrize("gone", [0, 1])
def test_missing_modality_has_the_identity_basis(scope, gone):
    key, value, modality, _ = random_inputs(2, ragged=False)
    modality = modality.masked_fill(modality == gone, -1)
    aligner = build_trained(2, basis_scope=scope)
    result = aligner(key, value, modality=modality, prefix=LENGTH).key
    keep, mapped = aligner.weight[1 - gone].split(DIM)
    here = modality == 1 - gone
    torch.testing.assert_close(result[:, :, here], key[:, :, here] @ (keep + mapped), **EXACT)


def test_no_tokens_and_no_samples():
    aligner = build_trained()
    for shape in ((BATCH, HEADS, 0, DIM), (0, HEADS, 3, DIM)):
        for scope in ("all", "prefix", "causal"):
            aligner.basis_scope = scope
            key = torch.zeros(shape, dtype=torch.float64)
            assert aligner(key, key, modality=torch.zeros(shape[2], dtype=torch.int64)).key.shape == shape


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_scope_depends_on_causality(is_causal):
    key, value, modality, _ = random_inputs()
    result = build_trained()(key, value, modality=modality, is_causal=is_causal).key
    message = build_trained(basis_scope="prefix" if is_causal else "all")(key, value, modality=modality).key
    assert torch.equal(result, message)


@kinds
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 99), index=st.integers(1, LENGTH - 1))
def test_no_information_from_later_keys(basis, norm, seed, index):
    key, value, modality, mask = random_inputs(seed=seed)
    future = [torch.cat([x[:, :, :index], x[:, :, index:] + 3.0], dim=2) for x in (key, value)]
    for scope, messages in (("causal", None), ("prefix", index)):
        aligner = build_trained(basis=basis, norm=norm, basis_scope=scope)
        before = aligner(key, value, modality=modality, mask=mask, prefix=messages).key[:, :, :index]
        after = aligner(*future, modality=modality, mask=mask, prefix=messages).key[:, :, :index]
        torch.testing.assert_close(after, before, **EXACT)


def test_scope_all_uses_later_keys_as_published():
    key, value, _, _ = random_inputs(2)
    modality = torch.tensor([0] * 9 + [1] * 8)
    aligner = build_trained(2, basis_scope="all")
    before = aligner(key, value, modality=modality).key[:, :, 0]
    key[:, :, -1] += 3.0
    assert not torch.allclose(aligner(key, value, modality=modality).key[:, :, 0], before)


@kinds
@pytest.mark.parametrize("scope", ["prefix", "causal"])
def test_decoding_equals_one_pass(basis, norm, scope):
    key, value, modality, mask = random_inputs()
    aligner = build_trained(basis=basis, norm=norm, basis_scope=scope)
    full = aligner(key, value, modality=modality, mask=mask, prefix=7).key
    parts, state = [], None
    for start, stop in ((0, 7), (7, 8), (8, 15), (15, 17)):
        here = slice(start, stop)
        part, state = aligner(
            key[:, :, here], value[:, :, here], modality=modality[:, here], mask=mask[:, here], prefix=7, state=state
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2)[mask[:, None, :, None].expand_as(key)],
                               full[mask[:, None, :, None].expand_as(key)], **EXACT)  # fmt: skip


@kinds
@scopes
def test_gradients(basis, norm, scope):
    key, value, modality, mask = random_inputs(length=7)
    aligner = build_trained(basis=basis, norm=norm, basis_scope=scope, mix="learned", fuse="add")
    parameters = tuple(aligner.parameters())

    def keys(key, value, *_):
        return aligner(key, value, modality=modality, mask=mask, prefix=5).key

    assert gradcheck(keys, (key.requires_grad_(), value.requires_grad_(), *parameters), fast_mode=True)
    keys(key, value).square().sum().backward()
    assert all(parameter.grad.any() for parameter in parameters)


@pytest.mark.parametrize("norm", NORMS)
@scopes
def test_equal_keys_have_no_covariance_and_finite_gradients(norm, scope):
    key, value, modality, _ = random_inputs(2)
    key = key[:, :, :1].expand_as(key).float().clone().requires_grad_()
    aligner = build_trained(2, basis="covariance", norm=norm, basis_scope=scope).float()
    result = aligner(key, value.float(), modality=modality, prefix=LENGTH).key
    result.square().sum().backward()
    assert result.isfinite().all()
    assert key.grad.isfinite().all()
    assert key.grad.abs().max() < 1e4


class TestBasis:
    keys = torch.randn(7, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    @pytest.mark.parametrize("basis", ["gram", "covariance"])
    @pytest.mark.parametrize("norm", ["fro", "spectral", "trace", "none"])
    def test_is_symmetric_positive_semidefinite(self, basis, norm):
        result = basis_of(self.keys, basis=basis, norm=norm)
        torch.testing.assert_close(result, result.T, **EXACT)
        assert torch.linalg.eigvalsh(result).min() > -EXACT["rtol"]

    @kinds
    def test_order_of_tokens_does_not_matter(self, basis, norm):
        order = torch.tensor([3, 1, 4, 0, 6, 5, 2])
        before, after = (basis_of(k, k + 1, basis=basis, norm=norm) for k in (self.keys, self.keys[order]))
        torch.testing.assert_close(after, before, **EXACT)

    @pytest.mark.parametrize("norm", NORMS)
    def test_basis_rotates_with_the_keys(self, norm):
        turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(6), dtype=torch.float64))[
            0
        ]
        before, after = (basis_of(k, norm=norm) for k in (self.keys, self.keys @ turn))
        same = torch.allclose(after, turn.T @ before @ turn, **EXACT)
        assert same == (norm != "row")

    @kinds
    def test_duplicated_tokens_give_the_same_map(self, basis, norm):
        before, after = (basis_of(k, k + 1, basis=basis, norm=norm) for k in (self.keys, self.keys.repeat(2, 1)))
        torch.testing.assert_close(after, 2 * before if norm == "none" else before, **EXACT)

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 999), tokens=st.integers(1, 13))
    def test_spectral_norm_does_not_increase_key_norms(self, seed, tokens):
        random = torch.Generator().manual_seed(seed)
        keys, others = (torch.randn(n, DIM, generator=random, dtype=torch.float64) for n in (tokens, 11))
        mapped = others @ basis_of(keys, norm="spectral", normalize_keys=False)
        assert (mapped.norm(dim=-1) <= others.norm(dim=-1) * (1 + EXACT["rtol"])).all()

    def test_half_precision_does_not_overflow(self):
        result = basis_of(torch.full((70000, 2), 250.0, dtype=torch.float16), norm="fro", normalize_keys=False)
        torch.testing.assert_close(result, torch.full((2, 2), 0.5), **TOL[torch.float32])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DuplexAligner(0), r"expected dim >= 1 and num_modalities >= 1, got dim = 0, num_modalities = 2"),
        (lambda: DuplexAligner(5, basis="gramm"), r"expected a known basis, got 'gramm'\. Did you mean 'gram'"),
        (lambda: DuplexAligner(5, norm="l2"), r"expected a known norm, got 'l2'\. Choose one of: fro, none, row"),
        (lambda: DuplexAligner(5, fuse="ad"), r"expected a known fuse, got 'ad'\. Did you mean 'add'"),
        (lambda: DuplexAligner(5, mix="x"), r"expected a known mix, got 'x'"),
        (lambda: DuplexAligner(5, basis_scope="x"), r"expected a known basis_scope, got 'x'"),
        (
            lambda: DuplexAligner(5, basis="key_value", norm="trace"),
            r"expected a norm that is defined for every matrix",
        ),
        (lambda: DuplexAligner(5, directions=(2,)), r"expected different directions from 0 to 1, or None for all"),
        (lambda: DuplexAligner(5, directions=(0, 0)), r"expected different directions.*got \(0, 0\)"),
        (lambda: DuplexAligner(5, directions=()), r"expected different directions.*got \(\)"),
    ],
)
def test_errors_of_options(call, message):
    with pytest.raises(ConfigError, match=f"DuplexAligner: {message}"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"key": torch.zeros(2, 3, 17, 4)}, r"DuplexAligner key: expected width = dim = 5, got 4"),
        ({"modality": torch.zeros(7).long()}, r"modality: expected shape \(key,\) = \(17,\).*got shape \(7,\)"),
        ({"modality": torch.full((17,), 3)}, r"expected labels from -1 to num_modalities - 1 = 2, got 3"),
        ({"mask": torch.ones(2, 17)}, r"mask: expected a boolean tensor.*got torch.float32"),
        ({"mask": torch.ones(17).bool()}, r"mask: expected a boolean tensor of shape \(batch, key\) = \(2, 17\)"),
        ({"value": torch.zeros(2, 3, 17, 4)}, r"value: expected the shape of the keys, \(2, 3, 17, 5\), got.*use "
                                              r"basis='gram'"),
    ],
)  # fmt: skip
def test_errors_of_shapes(call, message):
    key, value, modality, mask = random_inputs()
    given = {"key": key, "value": value, "modality": modality, "mask": mask, **call}
    with pytest.raises(ShapeError, match=message):
        build_trained(basis="key_value")(**given)


def test_repr_lists_options():
    assert repr(DuplexAligner(5, 3, norm="fro")) == "DuplexAligner(5, 3, basis='gram', norm='fro', fuse='concat')"
