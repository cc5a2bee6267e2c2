"""MBT: loops, information flow through the bottleneck, contributions to logits, errors."""

import itertools

import pytest
import torch

from equipoise.errors import ConfigError
from equipoise.fusion import MBT
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import BATCH, DIM, EXACT, NAMES, OUTPUTS, SINGLE, build_fusion, check_gradients, random_tokens
from oracles.fusion import linear, state_as_float64
from oracles.fusion_transformers import mbt


@pytest.mark.parametrize("exchange", ["bottleneck", "cross"])
@pytest.mark.parametrize(("masked", "cls"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_forward(exchange, masked, cls, count):
    tokens = random_tokens(NAMES[:count], masked=masked, cls=cls)
    fusion = build_fusion(MBT, NAMES[:count], depth=2, heads=5, bottlenecks=3, exchange=exchange)
    vectors = mbt(state_as_float64(fusion), tokens, depth=2, heads=5, exchange=exchange)
    output = fusion(tokens)
    torch.testing.assert_close(output.features, vectors.flatten(1), **EXACT)
    head = fusion.head(OUTPUTS).double()
    state = state_as_float64(head)
    # A shared head: the mean of the logits of the modalities if every sample has all of them.
    if not masked:
        scores = [[linear(state, "linear.", count * v) for v in sample] for sample in vectors]
        expected = torch.stack([sum(sample) / count for sample in scores])
        torch.testing.assert_close(head(output.features), expected, **EXACT)
    parts = fusion.contributions(output, head)
    assert tuple(parts) == NAMES[:count]
    torch.testing.assert_close(sum(parts.values()), head(output.features), **EXACT)
    for index, part in enumerate(parts.values()):
        rows = [sample[index] @ state["linear.weight"].mT + state["linear.bias"] / count for sample in vectors]
        torch.testing.assert_close(part, torch.stack(rows), **EXACT)
    assert fusion.contributions(output, torch.nn.Linear(fusion.out_dim, OUTPUTS)) is None


def test_contributions_after_autocast():
    fusion, tokens = build_fusion(MBT, NAMES[:2], dtype=torch.float32), random_tokens(NAMES[:2], dtype=torch.float32)
    head = fusion.head(OUTPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        output = fusion(tokens)
    narrow = output.with_(features=output.features.bfloat16())
    parts = fusion.contributions(narrow, head)
    assert all(part.dtype == torch.float32 for part in parts.values())
    torch.testing.assert_close(sum(parts.values()), head(narrow.features.float()), **SINGLE)


def audio_change(fusion):
    """Returns the largest change of the audio features when the image changes."""
    tokens = random_tokens(NAMES[:2])
    # Not a constant, which the norms would remove.
    changed = tokens | {"image": Tokens(-tokens["image"].values)}
    parts = [fusion(t).features[:, :DIM] for t in (tokens, changed)]
    return float((parts[0] - parts[1]).detach().abs().max())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_without_bottleneck_tokens_modalities_are_independent(depth):
    fusion = build_fusion(MBT, NAMES[:2], depth=depth, bottlenecks=0)
    assert audio_change(fusion) == 0
    assert "bottleneck" not in fusion.state_dict()
    tokens = random_tokens(NAMES[:2])
    expected = mbt(state_as_float64(fusion), tokens, depth=depth, heads=1).flatten(1)
    torch.testing.assert_close(fusion(tokens).features, expected, **EXACT)


@pytest.mark.parametrize(
    ("depth", "options", "crosses"),
    [(1, {}, False), (2, {}, True), (3, {}, True), (1, {"exchange": "cross"}, True), (2, {"bottlenecks": 1}, True)],
)
def test_exchange_between_modalities_needs_a_second_layer(depth, options, crosses):
    fusion, tokens = build_fusion(MBT, NAMES[:2], depth=depth, **options), random_tokens(NAMES[:2])
    for part in tokens.values():
        part.values.requires_grad_()
    # A loss of the audio features only.
    fusion(tokens).features[:, :DIM].square().sum().backward()
    assert bool(tokens["audio"].values.grad.any())
    grad = tokens["image"].values.grad
    assert (grad is not None and bool(grad.any())) == crosses
    assert (audio_change(fusion) > 1e-3) == crosses
    assert crosses or audio_change(fusion) == 0


def test_missing_modality_is_excluded_from_the_logits():
    both, alone = build_fusion(MBT, NAMES[:2]), MBT(DIM).build(NAMES[:1]).double().eval()
    own = {name: value for name, value in both.state_dict().items() if "image" not in name}
    alone.load_state_dict(own)
    tokens = random_tokens(NAMES[:2])
    gone = Tokens(tokens["image"].values, mask=torch.zeros(BATCH, 2, dtype=torch.bool))
    features = both(tokens | {"image": gone}).features
    torch.testing.assert_close(features[:, :DIM], alone({"audio": tokens["audio"]}).features, **EXACT)
    assert not features[:, DIM:].any()


@pytest.mark.parametrize("exchange", ["bottleneck", "cross"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_order_of_modalities_does_not_change_logits(exchange, order):
    tokens = random_tokens(NAMES[:3], masked=True)
    one = build_fusion(MBT, NAMES[:3], exchange=exchange)
    other = MBT(DIM, exchange=exchange).build(tuple(NAMES[m] for m in order)).double().eval()
    other.load_state_dict(one.state_dict())
    head = one.head(OUTPUTS).double()
    torch.testing.assert_close(head(other(tokens).features), head(one(tokens).features), **EXACT)


@pytest.mark.parametrize("exchange", ["bottleneck", "cross"])
def test_gradients(exchange):
    fusion = build_fusion(MBT, NAMES[:2], bottlenecks=1, exchange=exchange)
    assert check_gradients(fusion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, r"MBT: expected depth >= 1, .* got depth = 0, bottlenecks = 4, exchange = 'bottleneck'"),
        ({"bottlenecks": -1}, r"expected .*bottlenecks >= 0 .* got .*bottlenecks = -1"),
        ({"exchange": "mid"}, r"expected .*exchange 'bottleneck' or 'cross', got .*exchange = 'mid'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        MBT(DIM, **options)
