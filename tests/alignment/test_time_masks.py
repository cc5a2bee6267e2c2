"""Time windows, biases, rotations, lags and time warping against loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.alignment.metrics.dtw import dtw_cost, dtw_path
from equipoise.errors import ConfigError, ShapeError
from equipoise.nn.attention import attend
from equipoise.nn.attention.time_masks import (
    TimeBias,
    rotate_by_time,
    time_bias,
    time_causal,
    time_differences,
    time_window,
)
from equipoise.tokens.token_batch import Tokens, pack
from helpers.tolerance import TOL
from oracles import align as slow

EXACT = TOL[torch.float64]
QUERY = torch.tensor([[0.0, 1.0, 2.5, 9.0, 4.0], [3.0, 3.5, -1.0, 0.25, 7.0]], dtype=torch.float64)
KEY = torch.tensor([[0.5, 1.75, 2.0, 5.0, 5.5, 6.0, 2.5], [3.0, 3.0, 4.0, 4.0, 20.0, -2.0, 0.0]], dtype=torch.float64)
VALID = torch.tensor([[True] * 5 + [False] * 2, [False, True, True, False, True, True, True]])


def loop_mask(allowed, empty, valid=None):
    """Computes the rows of the mask in loops."""
    rows = []
    for b in range(2):
        for i in range(5):
            there = [j for j in range(7) if valid is None or valid[b][j]]
            seen = {j for j in there if allowed(float(QUERY[b, i]), float(KEY[b, j]))[0]}
            if not seen and empty == "nearest":
                distance = {j: allowed(float(QUERY[b, i]), float(KEY[b, j]))[1] for j in there}
                seen = {min(there, key=lambda j: (distance[j], j))}
            rows.append([j in seen for j in range(7)])
    return torch.tensor(rows).view(2, 5, 7)


@pytest.mark.parametrize("empty", ["nearest", "zero"])
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("lag", [0.0, 0.75])
def test_windows(empty, valid, lag):
    for width in (0.0, 0.5, 2.0):
        result = time_window(QUERY, KEY, width=width, lag=lag, valid=valid, empty=empty)
        expected = loop_mask(lambda t, s, width=width: (abs(t - s - lag) <= width, abs(t - s - lag)), empty, valid)
        assert torch.equal(result, expected)
    for slack in (0.0, 1.0):
        result = time_causal(QUERY, KEY, slack=slack, lag=lag, valid=valid, empty=empty)
        expected = loop_mask(lambda t, s, slack=slack: (s <= t - lag + slack, s - t + lag), empty, valid)
        assert torch.equal(result, expected)


def test_empty_window_gives_zero_or_the_nearest_token():
    query, key, value = torch.randn(1, 1, 1, 3), torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 3)
    times = torch.tensor([[9.0]]), torch.tensor([[0.0, 1.0]])
    nothing = time_window(*times, width=1.0, empty="zero")
    assert torch.equal(attend(query, key, value, mask=nothing).output, torch.zeros(1, 1, 1, 3))
    nearest = time_window(*times, width=1.0)
    assert torch.equal(attend(query, key, value, mask=nearest).output[0, 0, 0], value[0, 0, 1])
    assert not time_window(*times, width=1.0, valid=torch.tensor([[False, False]])).any()
    assert time_window(times[0], times[0][:, :0], width=1.0).shape == (1, 1, 0)


def test_unknown_times():
    query, key = QUERY.clone(), KEY.clone()
    query[0, 3] = key[1, 4] = math.nan
    result = time_window(query, key, width=0.5)
    assert result[0, 3].all()
    assert result[1, :, 4].all()
    bias = time_bias(query, key)
    assert float(bias[0, 3].abs().max()) == float(bias[1, :, 4].abs().max()) == 0.0
    assert bias.isfinite().all()


@pytest.mark.parametrize("kind", ["gaussian", "linear"])
def test_biases(kind):
    result = time_bias(QUERY, KEY, kind=kind, width=0.8, lag=0.3)
    for b in range(2):
        for i in range(5):
            for j in range(7):
                apart = float(QUERY[b, i] - KEY[b, j]) - 0.3
                expected = -(apart**2) / (2 * 0.8**2) if kind == "gaussian" else -abs(apart) / 0.8
                assert float(result[b, i, j]) == pytest.approx(expected, rel=EXACT["rtol"], abs=EXACT["atol"])


def test_gradients_of_width_and_lag():
    width, lag = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, 0.3))
    for kind in ("gaussian", "linear"):
        assert torch.autograd.gradcheck(
            lambda w, s, k=kind: time_bias(QUERY, KEY, kind=k, width=w, lag=s), (width, lag)
        )
    unknown = QUERY.clone()
    unknown[0, 0] = math.nan
    time_bias(unknown, KEY, width=width, lag=lag).sum().backward()
    assert width.grad.isfinite()
    assert lag.grad.isfinite()


def random_heads(seed, count, dtype=torch.float64):
    return torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=25, deadline=None)
@given(st.floats(-1e6, 1e6), st.sampled_from([1.0, 0.04]))
def test_masks_depend_on_time_differences_only(shift, unit):
    query, key = random_heads(0, 5), random_heads(1, 7)

    def logits(by):
        turned = (rotate_by_time(x, times + by, unit=unit) for x, times in ((query, QUERY), (key, KEY)))
        return torch.einsum("bhqd,bhkd->bhqk", *turned)

    torch.testing.assert_close(logits(shift), logits(0.0), rtol=1e-7, atol=1e-7)
    assert not torch.allclose(logits(0.0), query @ key.mT)


def test_rotation_by_pairs_of_features():
    x = random_heads(0, 5)
    result = rotate_by_time(x, QUERY, theta=100.0, unit=2.0)
    for b in range(2):
        for i in range(5):
            for k in range(2):
                angle = 100.0 ** (-2 * k / 4) * float(QUERY[b, i]) / 2.0
                for h in range(3):
                    pair = complex(*x[b, h, i, 2 * k : 2 * k + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
                    assert result[b, h, i, 2 * k : 2 * k + 2].tolist() == pytest.approx([pair.real, pair.imag])
    torch.testing.assert_close(result.norm(dim=-1), x.norm(dim=-1), **EXACT)
    assert rotate_by_time(x, None) is x
    assert torch.equal(rotate_by_time(x, torch.full((2, 5), math.nan)), x)


def test_unix_times_in_single_precision():
    """Times need float64, values do not."""
    query, key = random_heads(0, 5, torch.float32), random_heads(1, 7, torch.float32)
    result = [
        torch.einsum("bhqd,bhkd->bhqk", rotate_by_time(query, QUERY + by), rotate_by_time(key, KEY + by))
        for by in (0.0, 1.7e9)
    ]
    torch.testing.assert_close(result[1], result[0], rtol=1e-4, atol=1e-4)


def build_tokens():
    return {
        "sound": Tokens(torch.zeros(2, 5, 3, dtype=torch.float64), times=QUERY),
        "picture": Tokens(torch.zeros(2, 7, 3, dtype=torch.float64), times=KEY),
    }


@pytest.mark.parametrize("kind", ["gaussian", "linear"])
def test_lags_of_pairs(kind):
    bias, both = TimeBias(("sound", "picture"), kind=kind, width=0.8).double(), build_tokens()
    plain = time_bias(QUERY, KEY, kind=kind, width=0.8)
    torch.testing.assert_close(bias(*both.values(), *both), plain, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        bias.lags[0, 1], bias.lags[1, 0], bias.lags[0, 0] = 0.5, -0.1, 7.0
    assert float(bias.lag("sound", "picture").detach()) == pytest.approx(0.3)
    assert float(bias.lag("picture", "sound").detach()) == pytest.approx(-0.3)
    assert float(bias.lag("sound", "sound").detach()) == 0.0
    lagged = time_bias(QUERY, KEY, kind=kind, width=0.8, lag=0.3)
    torch.testing.assert_close(bias(*both.values(), *both), lagged, rtol=1e-6, atol=1e-6)
    packed = pack(both, cls=torch.zeros(3, dtype=torch.float64))
    full = bias(packed, packed)
    torch.testing.assert_close(full[:, 1:6, 6:], lagged, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(full[:, 6:, 1:6], lagged.mT, rtol=1e-6, atol=1e-6)
    assert full.shape == (2, 13, 13)


def test_lag_is_learned():
    """The audio lags behind the image by 0.4 seconds; attention by time only learns the lag."""
    torch.manual_seed(0)
    times = torch.arange(12.0, dtype=torch.float64)[None] * 0.5
    code = torch.randn(1, 12, 4, dtype=torch.float64)
    picture, sound = Tokens(code, times=times), Tokens(code, times=times + 0.4)
    bias = TimeBias(("sound", "picture"), width=0.3).double()
    optimizer = torch.optim.Adam(bias.parameters(), lr=0.02)
    for _ in range(80):
        mask = bias(sound, picture, "sound", "picture")[:, None]
        read = attend(torch.zeros(1, 1, 12, 4).double(), torch.zeros(1, 1, 12, 4).double(), code[:, None], mask=mask)
        loss = (read.output[:, 0] - code).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(bias.lag("sound", "picture").detach()) == pytest.approx(0.4, abs=0.1)
    assert float(bias.lag("picture", "sound").detach()) == pytest.approx(-0.4, abs=0.1)


def test_learning_can_be_disabled():
    assert not any(parameter.requires_grad for parameter in TimeBias(("a",), learn=False).parameters())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_dynamic_time_warping(rows, columns, seed):
    cost = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result, path = float(dtw_cost(cost)), dtw_path(cost)
    assert result == pytest.approx(slow.warping(cost.tolist()), rel=EXACT["rtol"])
    assert sum(float(cost[i, j]) for i, j in path.tolist()) == pytest.approx(result, rel=EXACT["rtol"])
    assert path[0].tolist() == [0, 0]
    assert path[-1].tolist() == [rows - 1, columns - 1]
    steps = path.diff(dim=0)
    assert ((steps >= 0) & (steps <= 1)).all()
    assert (steps.sum(dim=1) >= 1).all()


def test_soft_dynamic_time_warping():
    cost = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hard = dtw_cost(cost)
    assert hard.shape == (2,)
    assert (dtw_cost(cost, softness=1.0) < hard).all()
    torch.testing.assert_close(dtw_cost(cost, softness=1e-3), hard, rtol=1e-2, atol=1e-2)
    assert torch.autograd.gradcheck(lambda c: dtw_cost(c, softness=0.5), cost.requires_grad_())
    # Two paths with equal cost: lower by g log 2.
    square = torch.zeros(1, 2, dtype=torch.float64)
    assert float(dtw_cost(square, softness=0.5)) == 0.0
    assert float(dtw_cost(torch.zeros(2, 2, dtype=torch.float64), softness=0.5)) == pytest.approx(-0.5 * math.log(3))


def test_errors():
    with pytest.raises(
        ShapeError, match=r"time_differences key_times: expected \(batch, token\) with batch = 2, got \(1, 7\)"
    ):
        time_differences(QUERY, KEY[:1])
    with pytest.raises(ConfigError, match=r"time_window: expected width >= 0 seconds, got -1.0"):
        time_window(QUERY, KEY, width=-1.0)
    with pytest.raises(ConfigError, match="time_causal: expected a known treatment of empty windows, got 'mean'"):
        time_causal(QUERY, KEY, empty="mean")
    with pytest.raises(ShapeError, match=r"time_window valid: expected a boolean mask \(batch, key\) = \(2, 7\)"):
        time_window(QUERY, KEY, width=1.0, valid=VALID[:, :3])
    with pytest.raises(ConfigError, match="time_bias: expected a known kind, got 'cubic'"):
        time_bias(QUERY, KEY, kind="cubic")
    with pytest.raises(ConfigError, match=r"time_bias: expected width > 0 seconds, got 0.0"):
        time_bias(QUERY, KEY, width=0.0)
    with pytest.raises(ShapeError, match=r"rotate_by_time: expected .* with an even dim"):
        rotate_by_time(torch.zeros(1, 1, 2, 3), torch.zeros(1, 2))
    with pytest.raises(ShapeError, match=r"rotate_by_time times: expected \(batch, token\) = \(1, 2\), got \(1, 3\)"):
        rotate_by_time(torch.zeros(1, 1, 2, 4), torch.zeros(1, 3))
    with pytest.raises(ConfigError, match=r"rotate_by_time: expected theta > 0 and unit > 0, got 0.0 and 1.0"):
        rotate_by_time(torch.zeros(1, 1, 2, 4), torch.zeros(1, 2), theta=0.0)
    with pytest.raises(ConfigError, match="TimeBias: expected at least one name and width > 0"):
        TimeBias(())
    with pytest.raises(ConfigError, match="TimeBias: expected a known kind"):
        TimeBias(("a",), kind="cubic")
    bias, (sound, picture) = TimeBias(("sound", "picture")), build_tokens().values()
    with pytest.raises(ConfigError, match=r"TimeBias: expected a known modality, got 'soun'. Did you mean 'sound'"):
        bias(sound, picture, "soun", "picture")
    with pytest.raises(ConfigError, match="TimeBias: expected names, or packed tokens with labels, got neither"):
        bias(sound, picture)
    with pytest.raises(ShapeError, match="TimeBias: expected tokens with times, got times=None"):
        bias(Tokens(sound.values), picture, "sound", "picture")
    with pytest.raises(ShapeError, match=r"warping_cost: expected costs .* at least one of each, got"):
        dtw_cost(torch.zeros(0, 3))
    with pytest.raises(ConfigError, match="warping_cost: expected softness >= 0"):
        dtw_cost(torch.zeros(1, 3), softness=-1.0)
    with pytest.raises(ShapeError, match="warping_path: expected one matrix"):
        dtw_path(torch.zeros(1, 1, 3))
