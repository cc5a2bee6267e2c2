"""Sequence encoders with times: loops over frames, resampling, padding, unknown times, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.encoders import SequenceEncoder
from equipoise.errors import ConfigError, ShapeError
from equipoise.nn.time_features import group_times
from helpers.tolerance import TOL
from oracles.fusion import linear, state_as_float64, transformer

EXACT = TOL[torch.float64]
NAN = math.nan


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build_encoder(**options):
    torch.manual_seed(0)
    return SequenceEncoder(5, dim=14, depth=2, heads=2, **{"positions": "time", **options}).double().eval()


def loop_times(times, mask, stride):
    """Mean time of the valid frames of known time in each group, NaN for none."""
    result = []
    for row, valid in zip(times.tolist(), mask.tolist(), strict=True):
        groups = []
        for start in range(0, len(row), stride):
            known = [
                t
                for t, v in zip(row[start : start + stride], valid[start : start + stride], strict=True)
                if v and t == t
            ]
            groups.append(sum(known) / len(known) if known else NAN)
        result.append(groups)
    return torch.tensor(result, dtype=torch.float64)


def loop_features(time, dim, shortest, longest):
    features = []
    count = dim // 2
    for k in range(count):
        period = shortest * (longest / shortest) ** (k / (count - 1))
        angle = 2 * math.pi * time / period
        features += [math.sin(angle), math.cos(angle)]
    return torch.tensor(features if time == time else [0.0] * dim, dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_time_positions(stride, masked):
    layer = build_encoder(stride=stride, periods=(0.3, 20.0))
    frames, times = normal(2, 3, 11, 5), normal(3, 3, 11).cumsum(dim=1)
    mask = torch.ones(3, 11, dtype=torch.bool)
    if masked:
        mask[0, 4:], mask[1, [2, 5]], mask[2] = False, False, False
    times[1, 3] = NAN
    tokens = layer(frames, mask=mask if masked else None, times=times)
    state, stamps = state_as_float64(layer), loop_times(times, mask, stride)
    assert "positions" not in state
    for n, sample in enumerate(frames):
        rows, valid = [state["cls"]], [bool(mask[n].any())]
        for i, start in enumerate(range(0, 11, stride)):
            group = torch.zeros(stride, 5, dtype=torch.float64)
            part = sample[start : start + stride] * mask[n, start : start + stride, None]
            group[: len(part)] = part
            index = loop_features(float(stamps[n, i]), 14, 0.3, 20.0)
            rows.append(linear(state, "project.", group.flatten()) + index)
            valid.append(bool(mask[n, start : start + stride].any()))
        expected = transformer(state, "transformer.", torch.stack(rows), valid, 2, 2)
        torch.testing.assert_close(tokens.values[n], expected, **EXACT)
    assert tokens.times[:, 0].isnan().all()
    torch.testing.assert_close(tokens.times[:, 1:], stamps, equal_nan=True, **EXACT)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_mean_times_of_groups(data):
    batch, length, stride = (data.draw(st.integers(1, most)) for most in (3, 9, 4))
    number = st.floats(-50, 50) | st.just(NAN)
    times = torch.tensor(
        [data.draw(st.lists(number, min_size=length, max_size=length)) for _ in range(batch)], dtype=torch.float64
    )
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(batch)])
    result = group_times(times, mask, (batch, length), stride, "test")
    torch.testing.assert_close(result, loop_times(times, mask, stride), equal_nan=True, rtol=1e-10, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(factor=st.integers(2, 4), stride=st.integers(1, 3))
def test_sampling_rate_does_not_change_token_times(factor, stride):
    """Frames repeated at a higher rate, with the stride raised as much: times are those of the frames' centers."""
    times = torch.arange(6, dtype=torch.float64)[None] / 4
    fine = (times[..., None] + (torch.arange(factor) - (factor - 1) / 2) / (4 * factor)).flatten(1)
    frames = normal(4, 1, 6, 5)
    one, other = build_encoder(stride=stride), build_encoder(stride=stride * factor)
    with torch.no_grad():
        # The projection of repeated frames equals that of one frame.
        weight = one.project.weight.unflatten(1, (stride, 5)).repeat_interleave(factor, dim=1) / factor
        other.project.weight.copy_(weight.flatten(1))
        for name, value in one.state_dict().items():
            if name != "project.weight":
                other.state_dict()[name].copy_(value)
    before, after = one(frames, times=times), other(frames.repeat_interleave(factor, dim=1), times=fine)
    torch.testing.assert_close(after.times, before.times, equal_nan=True, **EXACT)
    torch.testing.assert_close(after.values, before.values, **EXACT)


def test_frame_order_matters_for_index_positions_only():
    frames, times, order = normal(5, 2, 7, 5), normal(6, 2, 7), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    layer = build_encoder()
    torch.testing.assert_close(
        layer(frames[:, order], times=times[:, order]).pooled(), layer(frames, times=times).pooled(), **EXACT
    )
    layer = build_encoder(positions="index", max_length=7)
    assert not torch.allclose(layer(frames[:, order]).pooled(), layer(frames).pooled())


@pytest.mark.parametrize("bad", [NAN, 1e30, -7.0])
@pytest.mark.parametrize("positions", ["index", "time"])
def test_times_of_padding_have_no_influence(positions, bad):
    layer = build_encoder(positions=positions, max_length=11, stride=3)
    frames, times = normal(3, 2, 7, 5), normal(7, 2, 7)
    padded = torch.cat([frames, torch.full((2, 4, 5), NAN, dtype=torch.float64)], dim=1)
    stamps = torch.cat([times, torch.full((2, 4), bad, dtype=torch.float64)], dim=1)
    longer = layer(padded, mask=torch.arange(11).expand(2, -1) < 7, times=stamps)
    expected = layer(frames, times=times)
    torch.testing.assert_close(longer.values[:, :4], expected.values, **EXACT)
    torch.testing.assert_close(longer.times[:, :4], expected.times, equal_nan=True, **EXACT)
    longer.pooled().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_index_positions_ignore_and_forward_times():
    layer = build_encoder(positions="index", max_length=7)
    frames, times = normal(3, 2, 7, 5), normal(7, 2, 7)
    assert layer(frames).times is None
    tokens = layer(frames, times=times)
    assert torch.equal(tokens.values, layer(frames).values)
    assert torch.equal(tokens.times[:, 1:], times)
    torch.manual_seed(0)
    assert list(SequenceEncoder(5, max_length=7, dim=14, heads=2).state_dict())[:2] == ["cls", "positions"]


def test_time_positions_need_no_maximum_length_and_keep_dtype():
    assert build_encoder()(normal(1, 1, 300, 5), times=normal(2, 1, 300)).values.shape == (1, 301, 14)
    half = build_encoder().to(torch.bfloat16)
    frames = normal(1, 2, 4, 5)
    assert half(frames.bfloat16(), times=torch.rand(2, 4)).values.dtype == torch.bfloat16
    # Unix timestamps in double precision: differences of 10 ms are visible.
    stamps = 1.7e9 + torch.arange(4, dtype=torch.float64)[None] / 100
    moved = stamps.clone()
    moved[0, 3] += 0.01
    one = build_encoder()
    assert not torch.allclose(one(frames[:1], times=moved).values, one(frames[:1], times=stamps).values)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: build_encoder()(normal(1, 2, 4, 5)),
            ShapeError,
            r"SequenceEncoder: expected times \(batch, frame\) in seconds, with positions=\"time\", got None\. "
            r"Set batch\['times'\]",
        ),
        (
            lambda: build_encoder()(normal(1, 2, 4, 5), times=normal(1, 2, 3)),
            ShapeError,
            r"SequenceEncoder times: expected \(batch, frame\) = \(2, 4\), floating-point seconds, got shape \(2, 3\)",
        ),
        (
            lambda: build_encoder()(normal(1, 2, 4, 5), times=torch.ones(2, 4, dtype=torch.long)),
            ShapeError,
            r"got shape \(2, 4\), torch\.int64",
        ),
        (
            lambda: build_encoder()(normal(1, 2, 0, 5), times=normal(1, 2, 0)),
            ShapeError,
            r"expected \(batch, frame >= 1, feature = 5\), got shape \(2, 0, 5\)",
        ),
        (
            lambda: build_encoder()(normal(1, 2, 4, 5), torch.ones(2, 4), normal(1, 2, 4)),
            ShapeError,
            r"SequenceEncoder mask: .*torch\.float32",
        ),
        (lambda: build_encoder(positions="tme"), ConfigError, r"got 'tme'\. Did you mean 'time'"),
        (
            lambda: build_encoder(positions="index"),
            ConfigError,
            r"SequenceEncoder: expected max_length with positions=\"index\", got None",
        ),
        *(
            (lambda periods=periods: build_encoder(periods=periods), ConfigError, r"0 < shortest <= longest, got \(")
            for periods in [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (NAN, 1.0), (1.0,)]
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
