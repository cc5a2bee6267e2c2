"""MidFusion with a time bias: loops, shifts, lags, padding, unknown and missing times, recording, RollingQ."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import equipoise as eq
from equipoise.errors import ConfigError, ShapeError
from equipoise.fusion import MidFusion
from equipoise.fusion.subset_tokens import keep_modalities
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import BATCH, DIM, EXACT, LENGTHS, NAMES, OUTPUTS, SINGLE, build_fusion, random_tokens
from oracles.fusion import layer_norm, linear, state_as_float64

NAN = math.nan


def tokens_with_times(names, *, masked=False, unknown=False):
    random = torch.Generator().manual_seed(1)
    result = {}
    for name, part in random_tokens(names, masked=masked).items():
        times = 3 * torch.rand(BATCH, LENGTHS[name], generator=random, dtype=torch.float64)
        if unknown:
            times[0, 0] = NAN
        result[name] = replace(part, times=times)
    return result


def loop_block(state, prefix, rows, heads, scores):
    """A pre-norm block with a number added to each score, one query and head at a time."""
    normed = [layer_norm(state, f"{prefix}norm_attention.", row) for row in rows]
    q, k, v = (
        [linear(state, f"{prefix}attention.{part}.", row) for row in normed] for part in ("query", "key", "value")
    )
    width = len(rows[0]) // heads
    result = []
    for i, row in enumerate(rows):
        parts = []
        for h in range(heads):
            here = slice(h * width, (h + 1) * width)
            weights = [
                math.exp(float(q[i][here] @ k[j][here]) / math.sqrt(width) + scores(i, j)) for j in range(len(rows))
            ]
            parts.append(sum(w / sum(weights) * v[j][here] for j, w in enumerate(weights)))
        row = row + linear(state, f"{prefix}attention.out.", torch.cat(parts))
        inner = torch.nn.functional.gelu(linear(state, f"{prefix}mlp.0.", layer_norm(state, f"{prefix}norm_mlp.", row)))
        result.append(row + linear(state, f"{prefix}mlp.2.", inner))
    return result


def loop_features(state, tokens, *, heads, depth, kind):
    features = []
    for n in range(BATCH):
        rows, labels, times = [state["cls"]], [-1], [NAN]
        for m, part in enumerate(tokens.values()):
            for j in range(len(part)):
                if part.valid()[n, j]:
                    rows.append(part.values[n, j])
                    labels.append(m)
                    times.append(float(part.times[n, j]))
        for number in range(depth):

            def scores(i, j, number=number, labels=labels, times=times):
                if number == depth - 1 or math.isnan(times[i]) or math.isnan(times[j]):
                    return 0.0
                a, b = labels[i], labels[j]
                lags = state[f"biases.{number}.lags"]
                width = math.exp(float(state[f"biases.{number}.log_widths"][a, b]))
                difference = times[i] - times[j] - float(lags[a, b] - lags[b, a]) / 2
                return -(difference**2) / (2 * width**2) if kind == "gaussian" else -abs(difference) / width

            rows = loop_block(state, f"blocks.{number}.", rows, heads, scores)
        features.append(layer_norm(state, "norm.", rows[0]))
    return torch.stack(features)


@pytest.mark.parametrize("kind", ["gaussian", "linear"])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("count", "depth"), [(1, 2), (2, 2), (3, 3)])
def test_forward(kind, shortcut, masked, count, depth):
    tokens = tokens_with_times(NAMES[:count], masked=masked, unknown=True)
    fusion = build_fusion(
        MidFusion, NAMES[:count], depth=depth, heads=2, time_bias=kind, time_width=0.5, shortcut=shortcut
    )
    expected = loop_features(state_as_float64(fusion), tokens, heads=2, depth=depth, kind=kind)
    torch.testing.assert_close(fusion(tokens).features, expected, **EXACT)


@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-1000, 1000), kind=st.sampled_from(["gaussian", "linear"]))
def test_common_time_shift_has_no_effect(shift, kind):
    tokens, fusion = (
        tokens_with_times(NAMES[:2], masked=True, unknown=True),
        build_fusion(MidFusion, NAMES[:2], time_bias=kind),
    )
    moved = {name: replace(part, times=part.times + shift) for name, part in tokens.items()}
    torch.testing.assert_close(fusion(moved).features, fusion(tokens).features, rtol=1e-8, atol=1e-8)


def test_learned_lag_compensates_a_delayed_stream():
    tokens, fusion = tokens_with_times(NAMES[:2]), build_fusion(MidFusion, NAMES[:2], time_bias="gaussian")
    late = tokens | {"image": replace(tokens["image"], times=tokens["image"].times + 0.7)}
    before = fusion(tokens).features
    assert (fusion(late).features - before).abs().max() > 1e-3
    with torch.no_grad():
        # lag(audio, image) = (lags[0, 1] - lags[1, 0]) / 2 is that of audio relative to the image.
        fusion.biases[0].lags[0, 1] -= 0.7
        fusion.biases[0].lags[1, 0] += 0.7
    torch.testing.assert_close(fusion(late).features, before, **EXACT)


def test_wide_time_bias_has_no_effect():
    tokens, fusion = tokens_with_times(NAMES[:2]), build_fusion(MidFusion, NAMES[:2], time_bias="gaussian")
    plain = MidFusion(DIM).build(NAMES[:2]).double().eval()
    plain.load_state_dict({name: v for name, v in fusion.state_dict().items() if not name.startswith("biases")})
    with torch.no_grad():
        fusion.biases[0].log_widths.fill_(30.0)
    torch.testing.assert_close(fusion(tokens).features, plain(tokens).features, **EXACT)


@pytest.mark.parametrize("bad", [NAN, 1e30])
def test_times_of_padding_and_missing_samples_have_no_influence(bad):
    tokens, fusion = tokens_with_times(NAMES[:2], masked=True), build_fusion(MidFusion, NAMES[:2], time_bias="gaussian")
    changed = {name: replace(p, times=p.times.masked_fill(~p.valid(), bad)) for name, p in tokens.items()}
    expected = fusion(tokens)
    result = fusion(changed)
    assert torch.equal(result.features, expected.features)
    fusion(changed).features.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fusion.parameters())
    assert fusion.biases[0].lags.grad.any()


def test_modalities_missing_from_the_batch():
    tokens, fusion = tokens_with_times(NAMES[:2]), build_fusion(MidFusion, NAMES[:2], time_bias="gaussian")
    absent = replace(tokens["image"], mask=torch.zeros(BATCH, LENGTHS["image"], dtype=torch.bool))
    result = fusion(keep_modalities(tokens, ["audio"])).features
    torch.testing.assert_close(result, fusion(tokens | {"image": absent}).features, **EXACT)
    assert fusion(keep_modalities(tokens, [])).features.isfinite().all()


def test_gradients():
    fusion = build_fusion(MidFusion, NAMES[:2], time_bias="gaussian", heads=2)
    tokens = tokens_with_times(NAMES[:2])
    inputs = [part.values[:1].clone().requires_grad_() for part in tokens.values()]

    def features(*values):
        result = {name: Tokens(v, times=part.times[:1]) for v, (name, part) in zip(values, tokens.items(), strict=True)}
        return fusion(result).features

    assert gradcheck(features, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    fusion, tokens = build_fusion(MidFusion, NAMES[:2], time_bias="gaussian"), tokens_with_times(NAMES[:2], masked=True)
    low = {name: replace(part, values=part.values.to(dtype)) for name, part in tokens.items()}
    expected, result = fusion(tokens).features, fusion.to(dtype)(low).features
    assert result.dtype == dtype
    assert (result.double() - expected).norm() / expected.norm() < 0.05


def build_model(**options):
    torch.manual_seed(0)
    encoders = {
        "audio": eq.encoders.SequenceEncoder(3, max_length=7, dim=DIM, depth=1, heads=2),
        "image": torch.nn.Linear(5, DIM),
    }
    return eq.FusionModel(encoders, MidFusion(DIM, heads=2, **{"time_bias": "gaussian", **options}), OUTPUTS)


def random_batch():
    random = torch.Generator().manual_seed(3)
    return {
        "audio": torch.randn(4, 7, 3, generator=random),
        "image": torch.randn(4, 2, 5, generator=random),
        "times": {"audio": torch.rand(4, 7, generator=random), "image": torch.rand(4, 2, generator=random)},
        "target": torch.tensor([0, 1, 2, 3]),
    }


def test_model_passes_times_to_encoders_and_tokens():
    model, given = build_model().eval(), random_batch()
    tokens = model.encode(given)
    assert torch.equal(tokens["audio"].times[:, 1:], given["times"]["audio"])
    assert torch.equal(tokens["image"].times, given["times"]["image"])
    late = {**given, "times": {**given["times"], "image": given["times"]["image"] + 0.5}}
    assert not torch.allclose(model(late).logits, model(given).logits)


def test_watch_records_attention_that_depends_on_times():
    model, given = build_model().eval(), random_batch()
    with torch.no_grad():
        model.fusion.biases[0].log_widths.fill_(-3.0)
    late = {**given, "times": {**given["times"], "image": given["times"]["image"] + 100}}
    shares = []
    for each in (given, late):
        with eq.watch(model) as seen, torch.no_grad():
            model(each)
        layers = [layer for layer in seen.layers if "blocks.0" in layer and "fusion" in layer]
        assert len(layers) == 1
        assert any("blocks.1" in layer and "fusion" in layer for layer in seen.layers)
        shares.append(seen.share(layers[0]))
    assert not torch.allclose(shares[0], shares[1])


def test_rollingq_rotates_the_last_block_and_keeps_the_bias():
    model, given = build_model(), random_batch()
    balancer = eq.balance.RollingQ(model.fusion.attention, beta=0.0)
    model.train()
    model(given)
    before = model.eval()(given)
    balancer.end_epoch()
    after = model(given)
    assert not torch.allclose(after.share, before.share)
    late = {**given, "times": {**given["times"], "image": given["times"]["image"] + 0.5}}
    assert not torch.allclose(model(late).logits, after.logits)


def test_balancers_that_join_batches_keep_times():
    joined = eq.balance.balancer_list._joined_tokens
    parts = [Tokens(torch.zeros(2, n, 3), times=torch.full((2, n), float(n))) for n in (2, 4)]
    assert joined(parts).times.tolist() == [[2.0, 2.0, 0.0, 0.0]] * 2 + [[4.0] * 4] * 2
    assert joined([*parts, Tokens(torch.zeros(1, 0, 3))]).times.shape == (5, 4)
    assert joined([*parts, Tokens(torch.zeros(1, 2, 3))]).times is None


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: MidFusion(DIM, time_bias="gaussian")(tokens_with_times(NAMES[:1]) | random_tokens(NAMES[1:2])),
            ShapeError,
            r"MidFusion 'image': expected tokens with times, for the time bias, got times=None\. Pass batch",
        ),
        (
            lambda: MidFusion(DIM, depth=1, time_bias="gaussian"),
            ConfigError,
            r"MidFusion: expected depth >= 2 and time_width > 0 with a time bias, got depth = 1, time_width = 1\.0",
        ),
        (lambda: MidFusion(DIM, time_bias="linear", time_width=0.0), ConfigError, r"time_width = 0\.0"),
        (lambda: MidFusion(DIM, time_bias="gausian"), ConfigError, r"got 'gausian'\. Did you mean 'gaussian'"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_shares_come_from_the_last_block():
    tokens, fusion = tokens_with_times(NAMES[:2], masked=True), build_fusion(MidFusion, NAMES[:2], time_bias="gaussian")
    share = fusion(tokens).share
    assert share.shape == (BATCH, 1, 2)
    assert (share.sum(dim=-1) <= 1 + SINGLE["atol"]).all()
