"""MODA: equal to MidFusion at initialization, loops over merges, attention of the class token, options, errors."""

import pytest
import torch

import equipoise as eq
from equipoise import fusion as package
from equipoise.errors import ConfigError
from equipoise.fusion import MODA, MidFusion
from equipoise.io.class_registry import available_classes
from equipoise.nn.attention.modular import modular_attention
from equipoise.nn.duplex import DuplexAligner
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import DIM, EXACT, NAMES, SINGLE, build_fusion, check_gradients, random_tokens

MERGES = ("mass", "gate", "sum", "concat")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"fuse": "add"}, {"basis": "covariance", "norm": "spectral", "mix": "learned"}]
)
def test_equals_mid_fusion_at_initialization(count, dtype, options):
    names = NAMES[:count]
    tokens = random_tokens(names, masked=True, dtype=dtype)
    torch.manual_seed(0)
    plain = MidFusion(DIM, depth=2, heads=2).build(names).eval().to(dtype)
    moda = MODA(DIM, depth=2, heads=2, **options).build(names).eval().to(dtype)
    missing = moda.load_state_dict(plain.state_dict(), strict=False)
    assert all(".aligner." in name for name in missing.missing_keys)
    assert not missing.unexpected_keys
    one, other = plain(tokens), moda(tokens)
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.share, other.share)


def expected_features(fusion, tokens):
    """Computes the features of one sample without padding from separately tested components."""
    values = torch.cat([fusion.cls[None, None], *(part.values for part in tokens.values())], dim=1)
    labels = torch.tensor([-1] + [n for n, part in enumerate(tokens.values()) for _ in range(len(part))])
    for number, block in enumerate(fusion.blocks):
        layer, normed = block.attention, block.norm_attention(values)
        query, key, value = (
            part(normed).view(1, -1, layer.heads, layer.head_dim).transpose(1, 2)
            for part in (layer.query, layer.key, layer.value)
        )
        key = layer.aligner(key, value, modality=labels).key
        last = number + 1 == len(fusion.blocks)
        merge = "mass" if last else layer.merge
        result = modular_attention(
            query, key, value, modality=labels, merge=merge, gate=layer.gate if merge == "gate" else None
        ).output
        result = result @ layer.join if merge == "concat" else result
        values = values + layer.out(result.transpose(1, 2).flatten(2))
        values = values + block.mlp(block.norm_mlp(values))
    return fusion.norm(values[:, 0])


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_its_components(merge, count):
    names = NAMES[:count]
    fusion, tokens = build_fusion(MODA, names, merge=merge, heads=2, depth=3), random_tokens(names)
    features = fusion(tokens).features
    for sample in range(3):
        alone = {name: Tokens(part.values[sample : sample + 1]) for name, part in tokens.items()}
        torch.testing.assert_close(features[sample : sample + 1], expected_features(fusion, alone), **EXACT)


@pytest.mark.parametrize("merge", MERGES)
def test_every_merge_is_trainable_and_ignores_padding(merge):
    names = NAMES[:2]
    fusion, tokens = build_fusion(MODA, names, merge=merge, fuse="add"), random_tokens(names, masked=True)
    features = fusion(tokens).features
    features.square().sum().backward()
    silent = {n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.any()}
    assert not silent
    other = {n: Tokens(p.values.masked_fill(~p.mask[..., None], 9.0), mask=p.mask) for n, p in tokens.items()}
    torch.testing.assert_close(fusion(other).features, features, **EXACT)


def test_gradients():
    assert check_gradients(build_fusion(MODA, NAMES[:2], heads=2, merge="gate"))


def test_order_permutes_shares_but_not_features():
    tokens, order = random_tokens(NAMES[:3], masked=True), (2, 0, 1)
    one = build_fusion(MODA, NAMES[:3])
    other = MODA(DIM).build(tuple(NAMES[m] for m in order)).double().eval()
    state = {name: value[list(order)] if ".aligner." in name else value for name, value in one.state_dict().items()}
    other.load_state_dict(state)
    torch.testing.assert_close(other(tokens).features, one(tokens).features, **EXACT)
    torch.testing.assert_close(other(tokens).share, one(tokens).share[..., list(order)], **SINGLE)


def test_pseudo_attention_of_hidden_keys():
    tokens = random_tokens(NAMES[:2], masked=True)
    plain, soaked = (build_fusion(MODA, NAMES[:2], pseudo=pseudo) for pseudo in ("none", "all_masked"))
    assert not torch.allclose(plain(tokens).features, soaked(tokens).features)
    full = random_tokens(NAMES[:2])
    torch.testing.assert_close(plain(full).features, soaked(full).features, **EXACT)


def test_directions_by_name():
    fusion = build_fusion(MODA, NAMES[:3], directions=("text",))
    aligners = [part for part in fusion.modules() if isinstance(part, DuplexAligner)]
    assert [part.directions for part in aligners] == [(2,), (2,)]


def test_watch_records_aligned_keys_and_their_share():
    fusion, tokens = build_fusion(MODA, NAMES[:2], heads=2), random_tokens(NAMES[:2])
    model = eq.FusionModel({n: torch.nn.Identity() for n in NAMES[:2]}, fusion, 3).double().eval()
    with eq.watch(model) as seen:
        output = model({name: part.values for name, part in tokens.items()})
    torch.testing.assert_close(seen.share("fusion.blocks.1.attention").double(), output.share.double(), **SINGLE)


def test_rollingq_attaches():
    fusion = build_fusion(MODA, NAMES[:2], dtype=torch.float32)
    model = eq.FusionModel({n: torch.nn.Linear(4, DIM) for n in NAMES[:2]}, fusion, 3)
    balancer = eq.balance.RollingQ(model.fusion.attention, rho=1.0, beta=0.0)
    model.train()
    model({name: torch.randn(5, 3, 4) for name in NAMES[:2]})
    assert "air" in " ".join(balancer.end_epoch())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MODA(DIM, depth=0), r"MODA: expected depth >= 1, got depth = 0"),
        (lambda: MODA(DIM, merge="mas"), r"MODA: expected a known merge, got 'mas'\. Did you mean 'mass'"),
        (lambda: MODA(DIM, pseudo="all"), r"MODA: expected a known pseudo, got 'all'"),
        (lambda: MODA(DIM, basis="x"), r"DuplexAligner: expected a known basis, got 'x'"),
        (
            lambda: MODA(DIM, directions=("txt",)).build(NAMES[:3]),
            r"MODA directions: expected a known modality, got 'txt'\. Did you mean 'text'",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_recipe_name():
    assert available_classes(package, eq.fusion.Fusion)["moda"] is MODA
