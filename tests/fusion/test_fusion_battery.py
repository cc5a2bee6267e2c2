"""Requirements on every fusion: sizes, padding, missing modalities, precision, saving, gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError
from equipoise.fusion import Unimodal
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import (
    BATCH,
    DIM,
    EXACT,
    FUSIONS,
    LENGTHS,
    NAMES,
    OUTPUTS,
    SINGLE,
    build_fusion,
    random_tokens,
)
from helpers.tolerance import TOL


def fusion_logits(fusion, tokens, head=None):
    torch.manual_seed(1)
    return (head or fusion.head(OUTPUTS).to(next(iter(tokens.values())).values.dtype))(fusion(tokens).features)


def insert_padding(part, places):
    """Returns the tokens with masked random values inserted at the given positions."""
    real = [True] * len(part)
    for index in places:
        real.insert(index, False)
    kept = [j for j, is_real in enumerate(real) if is_real]
    values = torch.full((BATCH, len(real), DIM), 77.0, dtype=part.values.dtype)
    mask = torch.zeros(BATCH, len(real), dtype=torch.bool)
    values[:, kept], mask[:, kept] = part.values, part.valid()
    return Tokens(values, mask=mask)


def used_modalities(fusion):
    """Returns the modalities that a fusion uses: all, except for unimodal fusions."""
    return (fusion.modality,) if isinstance(fusion, Unimodal) else fusion.names


def test_battery_covers_all_fusions():
    static = {"Concat", "Sum", "FiLM", "Gated", "Unimodal"}
    assert set(FUSIONS) >= static | {"JointAttention", "MulT", "MBT", "JMT", "MMML", "MidFusion"}


every = pytest.mark.parametrize("kind", FUSIONS.values(), ids=FUSIONS)


@every
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_modalities(kind, count):
    fusion = build_fusion(kind, NAMES[:count])
    output = fusion(random_tokens(NAMES[:count]))
    assert output.features.shape == (BATCH, fusion.out_dim)
    assert output.features.isfinite().all()
    assert output.names == NAMES[:count]
    assert fusion.head(OUTPUTS).double()(output.features).shape == (BATCH, OUTPUTS)
    if output.share is not None:
        assert output.share.shape[0] == BATCH
        assert output.share.shape[2] == count
        assert (output.share >= 0).all()
        assert (output.share.sum(dim=-1) <= 1 + SINGLE["atol"]).all()


@every
@settings(max_examples=10, deadline=None)
@given(places=st.lists(st.integers(0, 6), max_size=4), name=st.sampled_from(NAMES[:3]))
def test_padding_position_has_no_effect(kind, places, name):
    fusion, tokens = build_fusion(kind, NAMES[:3]), random_tokens(NAMES[:3], masked=True)
    before, after = fusion(tokens), fusion(tokens | {name: insert_padding(tokens[name], places)})
    torch.testing.assert_close(after.features, before.features, **EXACT)
    if before.share is not None:
        torch.testing.assert_close(after.share, before.share, **SINGLE)


@every
@pytest.mark.parametrize("name", NAMES[:3])
def test_modality_absent_from_the_batch_equals_absent_in_every_sample(kind, name):
    fusion, tokens = build_fusion(kind, NAMES[:3]), random_tokens(NAMES[:3])
    empty = Tokens(torch.zeros(BATCH, 0, DIM, dtype=torch.float64))
    masked = Tokens(tokens[name].values, mask=torch.zeros(BATCH, LENGTHS[name], dtype=torch.bool))
    output, same = fusion(tokens | {name: empty}), fusion(tokens | {name: masked})
    assert output.features.isfinite().all()
    torch.testing.assert_close(output.features, same.features, **EXACT)
    if output.share is not None:
        assert not output.share[..., NAMES.index(name)].any()
        torch.testing.assert_close(output.share, same.share, **SINGLE)


@every
def test_missing_modality_affects_only_its_sample(kind):
    fusion, tokens = build_fusion(kind, NAMES[:2]), random_tokens(NAMES[:2])
    present = torch.tensor([True, False, True])
    for name in NAMES[:2]:
        mask = present[:, None].expand(-1, LENGTHS[name])
        full, partly = fusion(tokens), fusion(tokens | {name: Tokens(tokens[name].values, mask=mask)})
        assert partly.features.isfinite().all()
        torch.testing.assert_close(partly.features[present], full.features[present], **EXACT)
        if name in used_modalities(fusion):
            assert not torch.allclose(partly.features[1], full.features[1])


@every
def test_empty_samples_have_finite_outputs_and_gradients(kind):
    fusion, tokens = build_fusion(kind, NAMES[:2]), random_tokens(NAMES[:2])
    for name, part in tokens.items():
        values = part.values.requires_grad_()
        tokens[name] = Tokens(values, mask=torch.zeros(BATCH, LENGTHS[name], dtype=torch.bool))
    features = fusion(tokens).features
    assert features.isfinite().all()
    if not features.requires_grad:
        return
    features.square().sum().backward()
    for part in tokens.values():
        assert part.values.grad is None or not part.values.grad.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fusion.parameters())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(kind, dtype):
    tokens = random_tokens(NAMES[:3], masked=True)
    low = {name: Tokens(part.values.to(dtype), mask=part.mask) for name, part in tokens.items()}
    output = build_fusion(kind, NAMES[:3])(tokens)
    rounded = build_fusion(kind, NAMES[:3]).to(dtype)(low)
    assert rounded.features.dtype == dtype
    # Rounding errors accumulate, so the error is relative to the largest feature.
    error = (rounded.features.double() - output.features).norm() / output.features.norm()
    assert error < 2 * TOL[torch.bfloat16]["rtol"]


@every
def test_save_and_load_gives_the_same_output(kind):
    tokens = random_tokens(NAMES[:3], masked=True)
    fusion = build_fusion(kind, NAMES[:3])
    torch.manual_seed(5)
    other = kind(DIM).build(NAMES[:3]).double().eval()
    if list(fusion.parameters()):
        assert not torch.equal(other(tokens).features, fusion(tokens).features)
    other.load_state_dict(fusion.state_dict())
    assert torch.equal(other(tokens).features, fusion(tokens).features)


@every
def test_deep_copy_is_equal_and_independent(kind):
    tokens = random_tokens(NAMES[:3])
    fusion = build_fusion(kind, NAMES[:3])
    twin, before = copy.deepcopy(fusion), fusion(tokens).features
    assert torch.equal(twin(tokens).features, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(fusion(tokens).features, before)


@every
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_reach_used_inputs_and_every_parameter(kind, count):
    names = NAMES[:count]
    tokens, fusion = random_tokens(names), build_fusion(kind, names)
    for part in tokens.values():
        part.values.requires_grad_()
    fusion_logits(fusion, tokens).square().sum().backward()
    for name in names:
        gradient = tokens[name].values.grad
        assert (gradient is not None and bool(gradient.any())) == (name in used_modalities(fusion))
    # A bias added to all keys does not change a softmax.
    learning = {n: p.grad for n, p in fusion.named_parameters() if not n.endswith("key.bias")}
    assert all(gradient is not None and gradient.any() for gradient in learning.values())


@every
def test_accumulated_batches_equal_one_batch(kind):
    tokens, gradients = random_tokens(NAMES[:2], masked=True), []
    for pieces in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):
        fusion = build_fusion(kind, NAMES[:2])
        torch.manual_seed(1)
        head = fusion.head(OUTPUTS).double().eval()
        for piece in pieces:
            cut = {name: Tokens(part.values[piece], mask=part.mask[piece]) for name, part in tokens.items()}
            (fusion_logits(fusion, cut, head).square().sum() / BATCH).backward()
        gradients.append([p.grad for p in (*fusion.parameters(), *head.parameters())])
    for full, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, full, **EXACT)


@every
def test_mapping_order_does_not_matter_after_build(kind):
    tokens, fusion = random_tokens(NAMES[:3]), build_fusion(kind, NAMES[:3])
    backwards = dict(reversed(tokens.items()))
    assert torch.equal(fusion(backwards).features, fusion(tokens).features)


@every
def test_first_call_builds_the_fusion(kind):
    fusion = kind(DIM)
    output = fusion(random_tokens(NAMES[:2], dtype=torch.float32))
    assert fusion.names == NAMES[:2]
    assert output.features.shape == (BATCH, fusion.out_dim)


@every
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda kind: kind(0), r"{}: expected dim >= 1, got dim = 0"),
        (lambda kind: kind(DIM).build(()), r"{}: expected one or more different modality names, got \(\)"),
        (
            lambda kind: kind(DIM).build(("a", "a")),
            r"{}: expected one or more different modality names, got \('a', 'a'\)",
        ),
        (
            lambda kind: kind(DIM).build(("a", "b")).build(("b", "a")),
            r"{}: expected the modalities it was built for, .*'a', 'b'.*Create a new fusion",
        ),
        (
            lambda kind: kind(DIM).build(("audio", "image"))(random_tokens(("audio",))),
            r"{}: expected tokens for audio, image, got tokens for audio\. A modality that is missing",
        ),
        (lambda kind: kind(DIM).build(("audio",))({}), r"{}: expected tokens for audio, got tokens for none"),
        (
            lambda kind: kind(DIM).build(("audio",))({"audio": Tokens(torch.zeros(2, 3, 7))}),
            r"{} 'audio': expected tokens of width dim = 10, got width 7.*torch\.nn\.Linear\(7, 10\)",
        ),
    ],
)
def test_errors_of_every_fusion(kind, call, message):
    with pytest.raises(EquipoiseError, match=message.format(kind.__name__)):
        call(kind)
