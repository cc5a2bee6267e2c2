"""Mid fusion: loops, initialization with trained blocks, RollingQ in the last block, order, errors."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import equipoise as eq
from equipoise import fusion as package
from equipoise.errors import ConfigError
from equipoise.fusion import MidFusion
from equipoise.io.class_registry import available_classes
from equipoise.nn.transformer import Transformer
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import DIM, EXACT, NAMES, OUTPUTS, SINGLE, build_fusion, random_tokens
from oracles.fusion import state_as_float64
from oracles.fusion_transformers import mid


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_forward(masked, shortcut, count, depth):
    tokens = random_tokens(NAMES[:count], masked=masked)
    fusion = build_fusion(MidFusion, NAMES[:count], depth=depth, heads=2, shortcut=shortcut)
    features, share = mid(state_as_float64(fusion), tokens, heads=2, depth=depth)
    output = fusion(tokens)
    torch.testing.assert_close(output.features, features, **EXACT)
    torch.testing.assert_close(output.share.double(), share, **SINGLE)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_order_permutes_shares_but_not_features(order):
    tokens = random_tokens(NAMES[:3], masked=True)
    one = build_fusion(MidFusion, NAMES[:3])
    other = MidFusion(DIM).build(tuple(NAMES[m] for m in order)).double().eval()
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(tokens).features, one(tokens).features, **EXACT)
    torch.testing.assert_close(other(tokens).share, one(tokens).share[..., list(order)], **SINGLE)


def test_start_from_reuses_trained_blocks():
    torch.manual_seed(0)
    encoder = eq.encoders.SequenceEncoder(3, max_length=5, dim=DIM, depth=3, heads=2).double().eval()
    fusion = MidFusion(DIM, depth=2, heads=2).build(("audio",)).double().eval()
    frames = torch.randn(2, 5, 3, dtype=torch.float64)
    full = encoder.transformer
    fusion.start_from(full)
    for fused, trained in zip(fusion.blocks, full.blocks[1:], strict=True):
        for name, value in trained.state_dict().items():
            assert torch.equal(fused.state_dict()[name], value)
    # Blocks 2 and 3 on the tokens after block 1, without the class token of the fusion, equal the original encoder.
    expected = encoder(frames).values[:, 0]
    del full.blocks[-2:]
    full.norm = torch.nn.Identity()
    values = encoder(frames).values
    for block in fusion.blocks:
        values = block(values).output
    torch.testing.assert_close(fusion.norm(values[:, 0]), expected, **EXACT)
    # The weights are copied, not shared.
    assert not {id(p) for p in fusion.parameters()} & {id(p) for p in encoder.parameters()}


def test_rollingq_rotates_the_last_block():
    torch.manual_seed(0)
    encoders = {"audio": torch.nn.Linear(3, DIM), "image": torch.nn.Linear(5, DIM)}
    model = eq.FusionModel(encoders, MidFusion(DIM, heads=2), OUTPUTS)
    assert model.fusion.attention is model.fusion.blocks[-1].attention
    assert model.fusion.attention.readout
    assert not model.fusion.blocks[0].attention.readout
    balancer = eq.balance.RollingQ(model.fusion.attention, beta=0.0)
    batch = {"audio": torch.randn(4, 7, 3), "image": torch.randn(4, 2, 5)}
    model.train()
    model(batch)
    before = model.eval()(batch)
    balancer.end_epoch()
    assert not torch.allclose(model(batch).share, before.share)


def test_gradients():
    fusion = build_fusion(MidFusion, NAMES[:2])
    inputs = [part.values[:1].clone().requires_grad_() for part in random_tokens(NAMES[1:3]).values()]

    def features(*values):
        return fusion(dict(zip(NAMES[:2], map(Tokens, values), strict=True))).features

    assert gradcheck(features, inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MidFusion(DIM, depth=0), r"MidFusion: expected depth >= 1, got depth = 0"),
        (
            lambda: MidFusion(DIM, depth=2).start_from(Transformer(DIM, 1)),
            r"start_from: expected 2 blocks with \(dim, heads, hidden\) = \(10, 1, 40\), got 1 with \(10, 1, 40\)",
        ),
        (lambda: MidFusion(DIM).start_from(Transformer(DIM, 2, 2)), r"got 2 with \(10, 2, 40\)\. Use the encoder"),
        (lambda: MidFusion(DIM).start_from(Transformer(DIM, 0)), r"got 0 with nothing"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_recipe_names():
    known = available_classes(package, eq.fusion.Fusion)
    expected = {
        "mult": eq.fusion.MulT,
        "mbt": eq.fusion.MBT,
        "jmt": eq.fusion.JMT,
        "mmml": eq.fusion.MMML,
        "mid": eq.fusion.MidFusion,
    }
    assert {name: known[name] for name in expected} == expected
