"""Time-aware attention: formula, perturbations, shifts of all times."""

import math

import pytest
import torch

from equipoise.alignment.connectors.timed_attention import TimedAttention
from equipoise.errors import ConfigError, ShapeError
from equipoise.nn.transformer import Attention
from equipoise.recording import watch
from equipoise.tokens.token_batch import Tokens, pack
from helpers.tolerance import TOL

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
DIM, NAMES = 8, ("sound", "picture", "text")
TIMES = {"sound": [0.0, 0.5, 1.0, 7.0], "picture": [0.25, 2.0, 3.0], "text": [5.0, 0.75]}


def build_tokens(names=NAMES[:2], shift=0.0, masks=()):
    result = {}
    for seed, name in enumerate(names):
        random = torch.Generator().manual_seed(seed)
        count = len(TIMES[name])
        values = torch.randn(2, count, DIM, generator=random, dtype=torch.float64)
        times = torch.tensor([TIMES[name], [1.5 * t for t in TIMES[name]]], dtype=torch.float64) + shift
        mask = torch.arange(count).expand(2, -1) > 0 if name in masks else None
        result[name] = Tokens(values, mask=mask, times=times)
    return result


def build_layer(names=NAMES[:2], seed=0, **options):
    torch.manual_seed(seed)
    result = TimedAttention(DIM, 2, names=names, **options).double()
    if result.bias is not None:
        with torch.no_grad():
            result.bias.lags.normal_()
    return result


def test_without_times_equals_attention():
    layer, (sound, picture) = build_layer(bias=None), build_tokens().values()
    plain = Attention(DIM, 2).double()
    plain.load_state_dict(layer.state_dict())
    expected = plain(sound.values, picture.values).output
    torch.testing.assert_close(layer(sound, picture).output, expected, **EXACT)
    masked = build_tokens(masks=("picture",))["picture"]
    expected = plain(sound.values, picture.values, mask=masked.mask).output
    torch.testing.assert_close(layer(sound, masked).output, expected, **EXACT)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_formula(rotate, causal):
    layer = build_layer(width=0.7, window=1.2, causal=causal, rotate=rotate, empty="zero", unit=0.5)
    sound, picture = build_tokens(masks=("picture",)).values()
    result = layer(sound, picture, "sound", "picture").output
    lag = float(layer.bias.lag("sound", "picture"))
    width = float(layer.bias.log_widths[0, 1].exp())
    query, key, value = layer.query(sound.values), layer.key(picture.values), layer.value(picture.values)

    def pairs(x, time):
        turned = []
        for k in range(2):
            angle = 10000.0 ** (-2 * k / 4) * time / 0.5 if rotate else 0.0
            turned.append(complex(*x[2 * k : 2 * k + 2].tolist()) * complex(math.cos(angle), math.sin(angle)))
        return turned

    for b in range(2):
        for i in range(4):
            row = torch.zeros(DIM, dtype=torch.float64)
            for h in range(2):
                part = slice(4 * h, 4 * h + 4)
                weights = {}
                for j in range(1, 3):
                    apart = float(sound.times[b, i] - picture.times[b, j]) - lag
                    if abs(apart) > 1.2 or (causal and apart < 0):
                        continue
                    one, other = (
                        pairs(query[b, i, part], sound.times[b, i]),
                        pairs(key[b, j, part], picture.times[b, j]),
                    )
                    logit = sum((p * q.conjugate()).real for p, q in zip(one, other, strict=True)) / 2
                    weights[j] = math.exp(logit - apart**2 / (2 * width**2))
                for j, weight in weights.items():
                    row[part] += weight / sum(weights.values()) * value[b, j, part]
            torch.testing.assert_close(result[b, i], layer.out(row), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"bias": "linear", "window": 2.0}, {"rotate": True, "causal": True}])
def test_output_depends_on_time_differences_only(options):
    layer = build_layer(**options)
    result = [layer(*build_tokens(shift=shift).values(), "sound", "picture").output for shift in (0.0, 1000.0)]
    torch.testing.assert_close(result[1], result[0], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_causal_by_time():
    sound, picture = build_tokens().values()
    for options in ({}, {"window": 0.1}):
        layer = build_layer(bias=None, causal=True, **options)
        for index in range(3):
            values = picture.values.clone()
            values[:, index] += 1.0
            moved = layer(sound, Tokens(values, times=picture.times)).output - layer(sound, picture).output
            ahead = sound.times < picture.times[:, index, None]
            assert float(moved[ahead].abs().sum()) == 0.0
            if not options:
                assert (moved.abs().amax(dim=-1) > 0).equal(~ahead)


def test_empty_window():
    layer, (sound, picture) = build_layer(bias=None, window=0.3), build_tokens().values()
    nearest = (sound.times[:, :, None] - picture.times[:, None]).abs().argmin(dim=2)
    result = layer(sound, picture).output
    expected = layer.out(layer.value(picture.values))
    torch.testing.assert_close(result[0, 3], expected[0, nearest[0, 3]], **EXACT)
    nothing = build_layer(bias=None, window=0.3, empty="zero")(sound, picture).output
    torch.testing.assert_close(nothing[0, 3], layer.out.bias, **EXACT)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_packed_tokens_of_any_number_of_modalities(count):
    names = NAMES[:count]
    layer, both = build_layer(names, window=1.0), build_tokens(names)
    packed = pack(both, cls=torch.ones(DIM, dtype=torch.float64))
    result = layer(packed)
    assert result.output.shape == packed.values.shape
    assert result.share.shape == (2, 2, len(packed), count)
    with watch(layer) as seen:
        layer(packed)
    torch.testing.assert_close(seen.share(seen.layers[0]), result.share.mean(dim=2).to(torch.float32), **SINGLE)
    # The class token attends to all tokens, regardless of its time.
    far = pack(build_tokens(names, shift=100.0), cls=torch.ones(DIM, dtype=torch.float64))
    torch.testing.assert_close(layer(far).output, result.output, rtol=1e-8, atol=1e-8)
    masked = pack(build_tokens(names, masks=names))
    assert layer(masked).output.isfinite().all()


def test_gradients_reach_lag_and_width():
    layer, (sound, picture) = build_layer(window=2.0), build_tokens().values()
    layer(sound, picture, "sound", "picture").output.square().sum().backward()
    assert float(layer.bias.lags.grad[0, 1].abs()) > 0
    assert float(layer.bias.log_widths.grad[0, 1].abs()) > 0
    assert float(layer.query.weight.grad.abs().max()) > 0


def test_errors():
    sound, picture = build_tokens().values()
    with pytest.raises(ConfigError, match=r"TimedAttention: expected window >= 0 seconds or None, got -1.0"):
        build_layer(window=-1.0)
    with pytest.raises(ConfigError, match="TimedAttention: expected names, for the lags of the bias, got none"):
        TimedAttention(DIM)
    with pytest.raises(ConfigError, match="TimedAttention: expected a known treatment of empty windows, got 'mean'"):
        build_layer(empty="mean")
    with pytest.raises(ShapeError, match=r"TimedAttention: expected tokens with times, dim = 8, got dim = 8, no times"):
        build_layer()(Tokens(sound.values), picture, "sound", "picture")
    with pytest.raises(ShapeError, match=r"TimedAttention: expected tokens with times, dim = 8, got dim = 3, times"):
        build_layer()(sound, Tokens(picture.values[..., :3], times=picture.times), "sound", "picture")
    with pytest.raises(ShapeError, match=r"rotate_by_time: expected .* with an even dim"):
        TimedAttention(6, 2, bias=None, rotate=True)(
            *(Tokens(x.values[..., :6].float(), times=x.times) for x in (sound, picture))
        )
