"""Static and joint fusion against loops, and all of their errors."""

import itertools

import pytest
import torch

import equipoise as eq
from equipoise.errors import ConfigError, ShapeError
from equipoise.fusion import Concat, FiLM, Gated, JointAttention, Unimodal
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import BATCH, DIM, EXACT, FUSIONS, NAMES, OUTPUTS, SINGLE, STATIC, build_fusion, random_tokens
from oracles.fusion import joint_attention, mean_pool, state_as_float64, static


def values_and_masks(tokens):
    return [(part.values, part.mask) for part in tokens.values()]


# Static fusion


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cls", [False, True])
def test_static_fusion(kind, count, masked, cls):
    tokens = random_tokens(NAMES[:count], masked=masked, cls=cls)
    fusion = build_fusion(STATIC[kind], NAMES[:count])
    head = fusion.head(OUTPUTS).double()
    vectors = [mean_pool(part.values, part.mask, cls) for part in tokens.values()]
    output = fusion(tokens)
    expected = static(kind, state_as_float64(fusion), state_as_float64(head), vectors)
    torch.testing.assert_close(head(output.features), expected, **EXACT)
    assert output.features.shape == (BATCH, fusion.out_dim)
    assert output.share is None
    assert output.names == NAMES[:count]


@pytest.mark.parametrize("kind", ["film", "gated", "unimodal"])
def test_source_order(kind):
    tokens, option = random_tokens(NAMES[:3]), "modality" if kind == "unimodal" else "source"
    fusion = build_fusion(STATIC[kind], NAMES[:3], **{option: "image"})
    head = fusion.head(OUTPUTS).double()
    vectors = [mean_pool(part.values, None) for part in tokens.values()]
    expected = static(kind, state_as_float64(fusion), state_as_float64(head), vectors, source=1)
    torch.testing.assert_close(head(fusion(tokens).features), expected, **EXACT)


def test_concat_with_zero_weights_is_unimodal_and_logits_are_additive():
    tokens = random_tokens(NAMES[:3])
    fusion = build_fusion(Concat, NAMES[:3])
    head, f = fusion.head(OUTPUTS).double(), fusion(tokens).features
    blocks = head.weight.chunk(3, dim=1)
    per_modality = [f[:, m * DIM : (m + 1) * DIM] @ blocks[m].T + head.bias / 3 for m in range(3)]
    torch.testing.assert_close(head(f), sum(per_modality), **EXACT)

    alone = build_fusion(Unimodal, NAMES[:3], modality="image")
    head_alone = alone.head(OUTPUTS).double()
    with torch.no_grad():
        head.weight.zero_()
        blocks[1].copy_(head_alone.weight)
        head.bias.copy_(head_alone.bias)
    torch.testing.assert_close(head(f), head_alone(alone(tokens).features), **EXACT)


# Joint attention


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("include_cls_key", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
def test_joint_attention(heads, count, masked, include_cls_key, shortcut):
    tokens = random_tokens(NAMES[:count], masked=masked)
    fusion = build_fusion(
        JointAttention, NAMES[:count], heads=heads, include_cls_key=include_cls_key, shortcut=shortcut
    )
    output = fusion(tokens)
    features, share = joint_attention(
        state_as_float64(fusion), values_and_masks(tokens), heads=heads, include_cls_key=include_cls_key
    )
    torch.testing.assert_close(output.features, features, **EXACT)
    torch.testing.assert_close(output.share.double(), share, **SINGLE)
    if not masked:
        total = output.share.sum(dim=-1).double()
        assert (total < 1).all() if include_cls_key else torch.allclose(total, torch.ones_like(total))


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shortcut", [True, False])
def test_deep_joint_attention(depth, masked, shortcut):
    tokens = random_tokens(NAMES[:2], masked=masked)
    fusion = build_fusion(JointAttention, NAMES[:2], heads=2, depth=depth, shortcut=shortcut)
    output = fusion(tokens)
    features, share = joint_attention(state_as_float64(fusion), values_and_masks(tokens), heads=2, depth=depth)
    torch.testing.assert_close(output.features, features, **EXACT)
    torch.testing.assert_close(output.share.double(), share, **SINGLE)


@pytest.mark.parametrize("depth", [1, 3])
def test_shortcut_equals_the_full_computation_with_gradients(depth):
    tokens, results = random_tokens(NAMES[:2], masked=True), []
    for shortcut in (True, False):
        fusion = build_fusion(JointAttention, NAMES[:2], heads=2, depth=depth, shortcut=shortcut)
        output = fusion(tokens)
        (output.features.square().sum() + output.share.square().sum()).backward()
        results.append([output.features, output.share, *(p.grad for p in fusion.parameters())])
    for short, full in zip(*results, strict=True):
        torch.testing.assert_close(short, full, **(EXACT if short.dtype == torch.float64 else SINGLE))


def test_active_depth_equals_a_shallower_model_and_is_saved():
    tokens = random_tokens(NAMES[:2])
    fusion = build_fusion(JointAttention, NAMES[:2], depth=3)
    full = fusion(tokens).features
    for depth in (1, 2, 3):
        fusion.use_depth(depth)
        assert fusion.attention is fusion.layers[depth - 1]
        assert [layer.readout for layer in fusion.layers] == [n == depth for n in (1, 2, 3)]
    torch.testing.assert_close(fusion(tokens).features, full, **EXACT)
    fusion.use_depth(2)
    other = JointAttention(DIM, depth=3).build(NAMES[:2]).double().eval()
    other.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(other(tokens).features, fusion(tokens).features, **EXACT)
    assert not torch.allclose(other(tokens).features, full)


def test_modality_embedding_is_added_to_the_tokens_of_its_modality():
    tokens = random_tokens(NAMES[:2])
    fusion = build_fusion(JointAttention, NAMES[:2], modality_embedding=True)
    moved = [(part.values + fusion.embedding[m].detach(), None) for m, part in enumerate(tokens.values())]
    features, share = joint_attention(state_as_float64(fusion), moved, heads=1)
    torch.testing.assert_close(fusion(tokens).features, features, **EXACT)
    torch.testing.assert_close(fusion(tokens).share.double(), share, **SINGLE)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_permuting_modalities_permutes_shares_but_not_features(depth, order):
    tokens = random_tokens(NAMES[:3], masked=True)
    permuted = tuple(NAMES[m] for m in order)
    one = build_fusion(JointAttention, NAMES[:3], heads=2, depth=depth)
    other = JointAttention(DIM, heads=2, depth=depth).build(permuted).double().eval()
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(tokens).features, one(tokens).features, **EXACT)
    torch.testing.assert_close(other(tokens).share, one(tokens).share[..., list(order)], **SINGLE)
    assert other(tokens).names == permuted


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: Unimodal(DIM, modality="adio").build(NAMES),
            ConfigError,
            r"Unimodal: expected a known modality, got 'adio'\. Did you mean 'audio'",
        ),
        (lambda: FiLM(DIM, source="x").build(NAMES), ConfigError, r"FiLM: expected a known modality, got 'x'"),
        (lambda: Gated(DIM, source="x").build(NAMES), ConfigError, r"Gated: expected a known modality, got 'x'"),
        (lambda: JointAttention(DIM, depth=0), ConfigError, r"JointAttention: expected depth >= 1, got depth = 0"),
        (lambda: JointAttention(DIM, heads=3), ConfigError, r"expected dim = 10 divisible by heads, got heads = 3"),
        (
            lambda: JointAttention(DIM, depth=2, include_cls_key=False),
            ConfigError,
            r"expected include_cls_key=True at depth >= 2",
        ),
        (
            lambda: JointAttention(DIM, depth=2).use_depth(3),
            ConfigError,
            r"JointAttention\.use_depth: expected 1 <= depth <= 2, got 3",
        ),
        (
            lambda: build_fusion(Concat, NAMES[:2])(
                {"audio": Tokens(torch.zeros(2, 3, DIM)), "image": Tokens(torch.zeros(3, 3, DIM))}
            ),
            ShapeError,
            r"Concat 'image': expected batch = 2 as 'audio' has, got 3",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_public_names_match_the_package():
    assert all(getattr(eq, name) is kind for name, kind in FUSIONS.items() if hasattr(eq, name))
