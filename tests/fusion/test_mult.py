"""MulT and its readout attention: loops, order, causality, RollingQ on the readout, errors."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.fusion import MulT
from equipoise.fusion.mult import CrossEncoder
from equipoise.tokens.token_batch import Tokens
from equipoise.training import method_factory
from equipoise.training.run import load_run_dataset
from helpers.fusion_cases import DIM, EXACT, NAMES, OUTPUTS, SINGLE, build_fusion, random_tokens
from helpers.runs import recipe
from oracles.fusion import state_as_float64
from oracles.fusion_transformers import mult, positions, readout, residual_head

SMALL = {"width": 6, "heads": 3}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("count", "depth", "causal"), [(1, 1, False), (2, 1, False), (2, 2, True), (3, 1, True), (2, 5, False)]
)
def test_forward(count, depth, causal, masked):
    tokens = random_tokens(NAMES[:count], masked=masked)
    fusion = build_fusion(MulT, NAMES[:count], depth=depth, causal=causal, **SMALL)
    expected, _ = mult(state_as_float64(fusion), tokens, heads=3, depth=depth, causal=causal)
    output = fusion(tokens)
    torch.testing.assert_close(output.features, expected, **EXACT)
    assert output.features.shape[1] == max(count - 1, 1) * count * 6
    assert output.share is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_readout_attends_to_the_final_streams(count, masked):
    tokens = random_tokens(NAMES[:count], masked=masked)
    fusion = build_fusion(MulT, NAMES[:count], readout="attention", readout_heads=2, **SMALL)
    pooled, streams = mult(state_as_float64(fusion), tokens, heads=3, depth=1)
    read, share = readout(state_as_float64(fusion), streams, heads=2)
    output = fusion(tokens)
    torch.testing.assert_close(output.features, torch.cat([read, pooled], dim=1), **EXACT)
    torch.testing.assert_close(output.share.double(), share, **SINGLE)
    assert output.features.shape[1] == fusion.out_dim


def test_head_is_a_residual_and_a_linear_layer():
    fusion = build_fusion(MulT, NAMES[:2], **SMALL)
    head, h = fusion.head(OUTPUTS).double(), fusion(random_tokens(NAMES[:2])).features
    torch.testing.assert_close(head(h), residual_head(state_as_float64(head), h), **EXACT)


def test_missing_source_does_not_depend_on_its_values():
    fusion = build_fusion(MulT, NAMES[:2], causal=True, **SMALL)
    tokens = random_tokens(NAMES[:2])
    absent = Tokens(tokens["image"].values, mask=torch.zeros(3, 2, dtype=torch.bool))
    expected, _ = mult(state_as_float64(fusion), tokens | {"image": absent}, heads=3, depth=1, causal=True)
    features = fusion(tokens | {"image": absent}).features
    torch.testing.assert_close(features, expected, **EXACT)
    assert not features[:, 6:].any()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_order_permutes_shares_and_parts_of_the_features(order):
    tokens = random_tokens(NAMES[:3], masked=True)
    permuted = tuple(NAMES[m] for m in order)
    one = build_fusion(MulT, NAMES[:3], readout="attention", **SMALL)
    other = MulT(DIM, readout="attention", **SMALL).build(permuted).double().eval()
    other.load_state_dict(one.state_dict())
    before, after = one(tokens), other(tokens)
    torch.testing.assert_close(after.share, before.share[..., list(order)], **SINGLE)
    # The readout comes first, then one part per modality; the weights of the head are permuted accordingly.
    w = one.stream_dim
    places = torch.cat([torch.arange(w), *(w + m * w + torch.arange(w) for m in order)])
    torch.testing.assert_close(after.features, before.features[:, places], **EXACT)
    head, moved = one.head(OUTPUTS).double(), other.head(OUTPUTS).double()
    with torch.no_grad():
        first, last = moved.hidden[0], moved.hidden[3]
        first.weight.copy_(head.hidden[0].weight[:, places])
        first.bias.copy_(head.hidden[0].bias)
        last.weight.copy_(head.hidden[3].weight[places])
        last.bias.copy_(head.hidden[3].bias[places])
        moved.out.weight.copy_(head.out.weight[:, places])
        moved.out.bias.copy_(head.out.bias)
    torch.testing.assert_close(moved(after.features), head(before.features), **EXACT)


def test_causal_attention():
    torch.manual_seed(0)
    encoder = CrossEncoder(6, 2, 3).double().eval()
    target, source = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    changed = source.clone()
    changed[:, 3] *= -1
    before = encoder(Tokens(target), Tokens(source), causal=True)
    after = encoder(Tokens(target), Tokens(changed), causal=True)
    torch.testing.assert_close(after[:, :3], before[:, :3], **EXACT)
    assert (after[:, 3:] - before[:, 3:]).abs().amax(dim=-1).gt(1e-3).all()
    # In a source that is 2 tokens longer, keys up to 2 positions ahead are visible.
    longer = torch.cat([changed, torch.randn(1, 2, 6, dtype=torch.float64)], dim=1)
    moved = longer.clone()
    moved[:, 3] *= -1
    difference = encoder(Tokens(target), Tokens(moved), causal=True) - encoder(
        Tokens(target), Tokens(longer), causal=True
    )
    assert difference.abs().amax(dim=-1).gt(1e-3).tolist() == [[False, True, True, True, True]]


def test_hand_computed_positions():
    # Width 5: two sines and two cosines with rates 1 and 1/10000, and a zero.
    fusion_table = eq.fusion.mult.sinusoids(torch.tensor([[1, 2]]), torch.zeros(1, 2, 5, dtype=torch.float64))
    expected = [0.8414709848078965, 1e-4, 0.5403023058681398, 1.0, 0.0]
    assert fusion_table[0, 0].tolist() == pytest.approx(expected, abs=1e-8)
    torch.testing.assert_close(fusion_table[0], positions(2, 5), **EXACT)


def test_gradients():
    fusion = build_fusion(MulT, NAMES[:2], readout="attention", width=4, heads=2)
    inputs = [part.values[:1].clone().requires_grad_() for part in random_tokens(NAMES[1:3]).values()]

    def features(*values):
        return fusion(dict(zip(NAMES[:2], map(Tokens, values), strict=True))).features

    assert gradcheck(features, inputs)


def test_dropout_in_training_only():
    fusion, tokens = build_fusion(MulT, NAMES[:2], dropout=0.0, embed_dropout=0.5, **SMALL), random_tokens(NAMES[:2])
    assert torch.equal(fusion(tokens).features, fusion(tokens).features)
    fusion.train()
    assert not torch.equal(fusion(tokens).features, fusion(tokens).features)


# RollingQ


def small_model(kind, **options):
    torch.manual_seed(0)
    encoders = {"audio": torch.nn.Linear(3, DIM), "image": torch.nn.Linear(5, DIM)}
    return eq.FusionModel(encoders, kind(DIM, **options), OUTPUTS)


@pytest.mark.parametrize("kind", [eq.fusion.MulT, eq.fusion.MMML])
def test_rollingq_rotates_the_readout(kind):
    model = small_model(kind, readout="attention")
    with torch.no_grad():
        # The initial class token is small; scaling it creates an imbalance.
        model.fusion.joint.cls.mul_(50)
    balancer = eq.balance.RollingQ(model.fusion.attention, rho=1.0, beta=0.0)
    batch = {"audio": torch.randn(4, 7, 3), "image": torch.randn(4, 2, 5)}
    model.train()
    model(batch)
    before = model.eval()(batch)
    assert before.share.shape == (4, 1, 2)
    balancer.end_epoch()
    after = model(batch)
    assert not torch.allclose(after.logits, before.logits)
    assert not torch.allclose(after.share, before.share)


@pytest.mark.parametrize("kind", [eq.fusion.MulT, eq.fusion.MMML])
def test_rollingq_without_readout_raises(kind):
    model = small_model(kind)
    assert not hasattr(model.fusion, "attention")
    with pytest.raises(AttributeError, match="no attribute 'attention'"):
        _ = model.fusion.attention
    assert model({"audio": torch.randn(4, 7, 3), "image": torch.randn(4, 2, 5)}).share is None


@pytest.mark.parametrize("name", ["mult", "mmml"])
def test_recipes(name):
    config = recipe()
    variant = {"fusion": name, "readout": "attention"}
    config = type(config)(**{**vars(config), "fusions": {**config.fusions, f"{name}_readout": variant}})
    model, balancers = method_factory.build_model(
        method_factory.parse_method(f"{name}_readout+rollingq", config), config, load_run_dataset(config, None)
    )
    assert isinstance(balancers[0], eq.balance.RollingQ)
    assert model.fusion.attention.names == ("audio", "image")
    with pytest.raises(
        ConfigError,
        match=rf"expected a fusion whose attention sees two or more modalities, got {name}\. Set readout: attention",
    ):
        method_factory.build_model(
            method_factory.parse_method(f"{name}+rollingq", config), config, load_run_dataset(config, None)
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MulT(DIM, width=0), r"MulT: expected width >= 1 and depth >= 1, got width = 0, depth = 1"),
        (lambda: MulT(DIM, depth=0), r"MulT: expected width >= 1 and depth >= 1, got width = 30, depth = 0"),
        (
            lambda: MulT(DIM, width=7),
            r"MulT: expected width = 7 divisible by heads, got heads = 5\. The width of the streams",
        ),
        (lambda: MulT(DIM, heads=0), r"MulT: expected width = 30 divisible by heads, got heads = 0"),
        (
            lambda: MulT(DIM, readout="atention"),
            r"MulT: expected a known readout, got 'atention'\. Did you mean 'attention'",
        ),
        (
            lambda: MulT(DIM, readout="attention", readout_heads=7).build(NAMES[:2]),
            r"expected dim = 30 divisible by heads, got heads = 7",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
