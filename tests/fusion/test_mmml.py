"""MMML: loops, size of a layer, head, readout, order, errors; test_mult tests RollingQ on its readout."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from equipoise.errors import ConfigError
from equipoise.fusion import MMML
from equipoise.fusion.mmml import CrossModalLayer
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import DIM, EXACT, NAMES, OUTPUTS, SINGLE, build_fusion, random_tokens
from oracles.fusion import linear, state_as_float64
from oracles.fusion_transformers import mmml, readout, relu


@pytest.mark.parametrize("with_readout", [False, True])
@pytest.mark.parametrize(("masked", "cls"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (2, 2), (3, 1)])
def test_forward(with_readout, masked, cls, count, depth):
    tokens = random_tokens(NAMES[:count], masked=masked, cls=cls)
    fusion = build_fusion(MMML, NAMES[:count], depth=depth, heads=2, readout="attention" if with_readout else "none")
    expected, streams = mmml(state_as_float64(fusion), tokens, heads=2, depth=depth)
    output = fusion(tokens)
    if with_readout:
        read, share = readout(state_as_float64(fusion), streams)
        expected = torch.cat([read, expected], dim=1)
        torch.testing.assert_close(output.share.double(), share, **SINGLE)
    torch.testing.assert_close(output.features, expected, **EXACT)
    assert output.features.shape[1] == fusion.out_dim


def test_head():
    fusion = build_fusion(MMML, NAMES[:2], hidden=11)
    head, features = fusion.head(OUTPUTS).double().eval(), fusion(random_tokens(NAMES[:2])).features
    state = state_as_float64(head)
    rows = [relu(linear(state, "3.", relu(linear(state, "1.", row)))) for row in features]
    torch.testing.assert_close(head(features), torch.stack([linear(state, "5.", row) for row in rows]), **EXACT)
    assert [head[i].weight.shape for i in (1, 3, 5)] == [(DIM, 2 * DIM), (11, DIM), (OUTPUTS, 11)]
    head.train()
    assert not torch.equal(head(features), head(features))


def test_parameters_of_a_layer():
    layer = CrossModalLayer(NAMES[:2], 14, 7)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (16 * 14**2 + 19 * 14)


def test_both_streams_attend_to_the_inputs_of_the_layer():
    # With sequential updates, the second stream would attend to the updated first one.
    fusion, tokens = build_fusion(MMML, NAMES[:2]), random_tokens(NAMES[:2])
    layer = fusion.layers[0]
    backwards = layer(dict(reversed(tokens.items())))
    for name, part in layer(tokens).items():
        torch.testing.assert_close(backwards[name].values, part.values, **EXACT)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_order_permutes_shares_and_parts_of_the_features(order):
    tokens = random_tokens(NAMES[:3], masked=True)
    one = build_fusion(MMML, NAMES[:3], readout="attention")
    other = MMML(DIM, readout="attention").build(tuple(NAMES[m] for m in order)).double().eval()
    other.load_state_dict(one.state_dict())
    before, after = one(tokens), other(tokens)
    torch.testing.assert_close(after.share, before.share[..., list(order)], **SINGLE)
    places = torch.cat([torch.arange(DIM), *(DIM + m * DIM + torch.arange(DIM) for m in order)])
    torch.testing.assert_close(after.features, before.features[:, places], **EXACT)
    head = one.head(OUTPUTS).double().eval()
    logits = head(before.features)
    with torch.no_grad():
        head[1].weight.copy_(head[1].weight[:, places].clone())
    torch.testing.assert_close(head(after.features), logits, **EXACT)


def test_gradients():
    fusion = build_fusion(MMML, NAMES[:2], readout="attention")
    inputs = [part.values[:1].clone().requires_grad_() for part in random_tokens(NAMES[1:3]).values()]

    def features(*values):
        return fusion(dict(zip(NAMES[:2], map(Tokens, values), strict=True))).features

    assert gradcheck(features, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, r"MMML: expected depth >= 1 and hidden >= 1, got depth = 0, hidden = 512"),
        ({"hidden": 0}, r"MMML: expected depth >= 1 and hidden >= 1, got depth = 1, hidden = 0"),
        ({"readout": "all"}, r"MMML: expected a known readout, got 'all'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        MMML(DIM, **options)
