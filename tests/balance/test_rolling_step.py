"""The formula of RollingQ against its equations: values, closed forms, properties, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.errors import ConfigError, ShapeError
from equipoise.geometry import cosine
from helpers.tolerance import TOL
from oracles.rollingq import rotation_row, step

EXACT = TOL[torch.float64]
NAMES = ("audio", "image", "text", "depth", "touch")
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def unit_vector(radians):
    return doubles(math.cos(radians), math.sin(radians))


def random_query_and_keys(seed, number, d):
    """A mean query, and mean keys with random cosines to it."""
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(number + 1, d, generator=random, dtype=torch.float64)
    lean = torch.rand(number, generator=random, dtype=torch.float64)
    return vectors[0], {NAMES[m]: vectors[m + 1] + lean[m] * vectors[0] for m in range(number)}


def cosines(query, keys):
    return {name: float(query @ key / (query.norm() * key.norm())) for name, key in keys.items()}


A2_QUERY, A2_KEYS = doubles(3, 4, 0), {"audio": doubles(2, 0, 0), "video": doubles(0, 0, 5)}


def test_worked_example():
    result = eq.balance.rolling_query(A2_QUERY, A2_KEYS, rho=1.0)
    assert result.air["audio"] == pytest.approx(0.6, abs=1e-12)
    assert result.air["video"] == pytest.approx(-0.6, abs=1e-12)
    assert result.spread == pytest.approx(0.6, abs=1e-12)
    assert result.weights["audio"] == pytest.approx(0.2314752165, abs=1e-10)
    assert result.weights["video"] == pytest.approx(0.7685247835, abs=1e-10)
    torch.testing.assert_close(result.anchor, doubles(1.4419838461, 0, 4.7875549697), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.anchor, A2_QUERY @ result.rotation, **EXACT)
    column = doubles([0.6733, -0.1444, -0.7252], [-0.6059, 0.4544, -0.6530], [0.4238, 0.8790, 0.2184])
    torch.testing.assert_close(result.rotation.mT, column, rtol=0, atol=5e-5)
    assert result.rotates


def test_anchor_has_query_norm_unlike_the_paper():
    mixed = 0.2314752165 * doubles(1, 0, 0) + 0.7685247835 * doubles(0, 0, 1)
    assert float(mixed.norm()) == pytest.approx(0.8026276339, abs=1e-10)
    assert float(eq.balance.rolling_query(A2_QUERY, A2_KEYS, rho=1.0).anchor.norm()) == pytest.approx(5.0, abs=1e-12)


@pytest.mark.parametrize(
    ("rho", "alpha", "after"),
    [(0.0, 0.5, 0.0), (1.0, 0.1026277905, -1.3090819730), (5.0, 1.95638e-5, -1.4161306601)],
)
def test_values_in_the_plane(rho, alpha, after):
    query, keys = unit_vector(0.3), {"audio": unit_vector(0.0), "video": unit_vector(2.0)}
    result = eq.balance.rolling_query(query, keys, rho=rho)
    assert result.air["audio"] == pytest.approx(1.0841809834, abs=1e-10)
    assert result.weights["audio"] == pytest.approx(alpha, rel=1e-5)
    turned = cosines(query @ eq.geometry.rotation_between(query, result.anchor), keys)
    assert turned["audio"] - turned["video"] == pytest.approx(after, abs=1e-9)


def test_unrescaled_anchor_of_the_plane():
    result = eq.balance.rolling_query(unit_vector(0.3), {"audio": unit_vector(0.0), "video": unit_vector(2.0)}, rho=0.0)
    mixed = result.weights["audio"] * unit_vector(0.0) + result.weights["video"] * unit_vector(2.0)
    assert float(mixed.norm()) == pytest.approx(0.5403, abs=5e-5)
    torch.testing.assert_close(result.anchor, unit_vector(1.0), **EXACT)


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("rho", [0.0, 0.7, 5.0])
def test_equals_the_oracle(number, rho):
    query, keys = random_query_and_keys(number, number, 11)
    air, alpha, anchor, rotation = step(
        query.numpy(), {n: k.numpy() for n, k in keys.items()}, cosines(query, keys), rho
    )
    result = eq.balance.rolling_query(query, keys, rho=rho)
    assert result.air == pytest.approx(air, abs=1e-12)
    assert result.weights == pytest.approx(alpha, abs=1e-12)
    torch.testing.assert_close(result.anchor, torch.from_numpy(anchor), **EXACT)
    torch.testing.assert_close(result.rotation, torch.from_numpy(rotation), **EXACT)
    assert result.spread == pytest.approx(max(cosines(query, keys).values()) - min(cosines(query, keys).values()))


@quick
@given(seeds, st.floats(0, 5))
def test_closed_form_for_two_modalities(seed, rho):
    query, keys = random_query_and_keys(seed, 2, 7)
    result = eq.balance.rolling_query(query, keys, rho=rho)
    a, b = (key / key.norm() for key in keys.values())
    kappa, alpha = float(a @ b), result.weights["audio"]
    s = math.sqrt(alpha**2 + (1 - alpha) ** 2 + 2 * alpha * (1 - alpha) * kappa)
    turned = cosines(query @ result.rotation, keys)
    assert turned["audio"] == pytest.approx((alpha + (1 - alpha) * kappa) / s, abs=1e-9)
    assert turned["image"] == pytest.approx((alpha * kappa + 1 - alpha) / s, abs=1e-9)
    after = -math.tanh(rho * result.air["audio"]) * (1 - kappa) / s
    assert turned["audio"] - turned["image"] == pytest.approx(after, abs=1e-9)


@quick
@given(seeds, st.sampled_from([2, 3, 5]), st.floats(0, 5))
def test_closed_form_for_many_modalities(seed, number, rho):
    query, keys = random_query_and_keys(seed, number, 13)
    result = eq.balance.rolling_query(query, keys, rho=rho)
    units = torch.stack([key / key.norm() for key in keys.values()])
    gram, alpha = units @ units.T, doubles(*result.weights.values())
    expected = gram @ alpha / (alpha @ gram @ alpha).sqrt()
    torch.testing.assert_close(
        doubles(*cosines(query @ result.rotation, keys).values()), expected, rtol=1e-9, atol=1e-9
    )


@quick
@given(seeds, st.sampled_from([2, 3, 5]), st.floats(0, 5), st.randoms())
def test_order_and_norms_do_not_matter(seed, number, rho, random):
    query, keys = random_query_and_keys(seed, number, 7)
    result = eq.balance.rolling_query(query, keys, rho=rho)
    shuffled = list(keys)
    random.shuffle(shuffled)
    other = eq.balance.rolling_query(3.0 * query, {name: 0.2 * keys[name] for name in shuffled}, rho=rho)
    torch.testing.assert_close(other.rotation, result.rotation, rtol=1e-9, atol=1e-9)
    assert other.weights == pytest.approx(result.weights)
    assert other.air == pytest.approx(result.air, abs=1e-12)


@quick
@given(seeds, st.sampled_from([2, 3, 5]), st.floats(0.01, 5))
def test_weights_sum_to_one_and_are_ordered(seed, number, rho):
    query, keys = random_query_and_keys(seed, number, 7)
    result = eq.balance.rolling_query(query, keys, rho=rho)
    assert sum(result.air.values()) == pytest.approx(0.0, abs=1e-12)
    assert sum(result.weights.values()) == pytest.approx(1.0)
    assert all(0 < weight < 1 for weight in result.weights.values())
    by_attention = sorted(keys, key=cosines(query, keys).get)
    by_weight = sorted(keys, key=result.weights.get, reverse=True)
    assert by_attention == by_weight
    raised = {name: c + 0.3 for name, c in cosines(query, keys).items()}
    assert eq.balance.rolling_query(query, keys, rho=rho, imbalance=raised).weights == pytest.approx(result.weights)


@quick
@given(st.floats(-1, 1), st.floats(0.01, 1), st.floats(0.1, 5))
def test_weight_decreases_with_attention(c, more, rho):
    def alpha(imbalance):
        measured = {"audio": imbalance, "video": 0.0}
        return eq.balance.rolling_query(A2_QUERY, A2_KEYS, rho=rho, imbalance=measured).weights["audio"]

    assert alpha(c + more) < alpha(c)
    assert alpha(0.0) == pytest.approx(0.5, abs=1e-15)
    assert alpha(c) == pytest.approx(0.5 * (1 + math.tanh(-rho * c)), abs=1e-12)


@quick
@given(seeds, st.floats(0.01, 5))
def test_two_modalities_swap_dominance(seed, rho):
    query, keys = random_query_and_keys(seed, 2, 5)
    result = eq.balance.rolling_query(query, keys, rho=rho)
    turned = cosines(query @ result.rotation, keys)
    assert (turned["audio"] - turned["image"]) * result.air["audio"] < 0


@quick
@given(seeds, st.sampled_from([2, 3, 5, 11]))
def test_rotation_is_orthogonal_and_reaches_the_anchor(seed, d):
    query, keys = random_query_and_keys(seed, 3, d)
    result = eq.balance.rolling_query(query, keys, rho=1.0)
    rotation, eye = result.rotation, torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.mT, eye, **EXACT)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0)
    torch.testing.assert_close(query @ rotation, result.anchor, **EXACT)
    back = torch.from_numpy(rotation_row(result.anchor.numpy(), query.numpy()))
    torch.testing.assert_close(rotation @ back, eye, rtol=1e-6, atol=1e-8)
    plane = torch.linalg.qr(torch.stack([query, result.anchor]).mT).Q
    rest = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rest = rest - plane @ (plane.mT @ rest)
    torch.testing.assert_close(rest @ rotation, rest, rtol=1e-9, atol=1e-9)


def test_large_rho_selects_the_least_attended_modality():
    query, keys = random_query_and_keys(3, 3, 7)
    least = min(keys, key=cosines(query, keys).get)
    result = eq.balance.rolling_query(query, keys, rho=1e4)
    assert result.weights[least] == pytest.approx(1.0)
    torch.testing.assert_close(result.anchor / result.anchor.norm(), keys[least] / keys[least].norm(), **EXACT)


def test_given_weights_replace_rho():
    result = eq.balance.rolling_query(A2_QUERY, A2_KEYS, rho=5.0, weights={"audio": 3 / 7, "video": 4 / 7})
    torch.testing.assert_close(result.anchor, doubles(3, 0, 4), **EXACT)
    assert result.air["audio"] == pytest.approx(0.6)


def test_svd_rotation_reaches_the_anchor():
    query, keys = random_query_and_keys(5, 2, 13)
    result = eq.balance.rolling_query(query, keys, rho=1.0, rotation="svd")
    torch.testing.assert_close(query @ result.rotation, result.anchor, **EXACT)
    assert float(torch.linalg.det(result.rotation)) == pytest.approx(1.0)
    minimal = eq.balance.rolling_query(query, keys, rho=1.0)
    eye = torch.eye(13, dtype=torch.float64)
    assert float((result.rotation - eye).norm()) > float((minimal.rotation - eye).norm())


def test_random_rotation_has_the_angle_of_the_minimal_one():
    query, keys = random_query_and_keys(5, 2, 13)
    minimal = eq.balance.rolling_query(query, keys, rho=1.0)
    first, again, other = (
        eq.balance.rolling_query(query, keys, rho=1.0, rotation="random", seed=seed) for seed in (0, 0, 1)
    )
    torch.testing.assert_close(query @ first.rotation, first.anchor, **EXACT)
    torch.testing.assert_close(query @ first.anchor, query @ minimal.anchor, **EXACT)
    assert torch.equal(first.rotation, again.rotation)
    assert abs(float(cosine(first.anchor, other.anchor))) < 0.99
    assert float(cosine(first.anchor, minimal.anchor)) < 0.99
    torch.testing.assert_close(first.rotation @ first.rotation.mT, torch.eye(13, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_float64(dtype):
    query, keys = random_query_and_keys(1, 2, 7)
    low = query.to(dtype)
    result = eq.balance.rolling_query(low, {name: key.to(dtype) for name, key in keys.items()}, rho=1.0)
    exact = eq.balance.rolling_query(
        low.double(), {name: key.to(dtype).double() for name, key in keys.items()}, rho=1.0
    )
    assert result.rotation.dtype == dtype
    assert result.air == exact.air
    torch.testing.assert_close(result.rotation, exact.rotation.to(dtype), rtol=0, atol=0)


ZERO = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("query", "keys", "rho", "why"),
    [
        (ZERO, A2_KEYS, 1.0, "mean query is zero"),
        (A2_QUERY, {"audio": ZERO, "video": doubles(0, 0, 5)}, 1.0, "mean key of 'audio' is zero"),
        (A2_QUERY, {"audio": doubles(1, 0, 0), "video": doubles(-2, 0, 0)}, 0.0, "cancel each other"),
        (doubles(1, 1, 0), {"audio": doubles(2, 0, 0), "video": doubles(0, 5, 0)}, 1.0, "already points at the anchor"),
    ],
)
def test_degenerate_inputs_give_a_reason(query, keys, rho, why):
    result = eq.balance.rolling_query(query, keys, rho=rho)
    assert why in result.reason
    assert not result.rotates
    assert torch.equal(result.rotation, torch.eye(3, dtype=torch.float64))
    assert torch.equal(result.anchor, query)


def test_query_opposite_to_anchor_rotates_by_180_degrees():
    query = doubles(-1, -1, 0)
    result = eq.balance.rolling_query(query, {"audio": doubles(2, 0, 0), "video": doubles(0, 5, 0)}, rho=0.0)
    assert result.rotates
    torch.testing.assert_close(query @ result.rotation, -query, **EXACT)
    assert float(torch.linalg.det(result.rotation)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("query", "keys", "rho", "error", "message"),
    [
        (A2_QUERY, {"audio": A2_QUERY}, 1.0, ConfigError, r"expected two or more modalities, got keys of \['audio'\]"),
        (A2_QUERY, A2_KEYS, -0.5, ConfigError, r"expected rho >= 0 and finite, got rho = -0\.5"),
        (A2_QUERY, A2_KEYS, math.inf, ConfigError, r"expected rho >= 0 and finite, got rho = inf"),
        (A2_QUERY, A2_KEYS, math.nan, ConfigError, r"expected rho >= 0 and finite, got rho = nan"),
        (doubles(1), {"a": doubles(1), "b": doubles(2)}, 1.0, ShapeError, r"with d >= 2, got shape \(1,\)"),
        (doubles([1, 2]), A2_KEYS, 1.0, ShapeError, r"a mean query of shape \(d,\).*once per head"),
        (
            A2_QUERY,
            {**A2_KEYS, "video": unit_vector(1.0)},
            1.0,
            ShapeError,
            r"'video': expected shape \(d,\) = \(3,\), got",
        ),
        (doubles(1, math.nan, 0), A2_KEYS, 1.0, ShapeError, "query: expected finite numbers, got NaN"),
        (A2_QUERY, {**A2_KEYS, "video": doubles(0, 0, math.inf)}, 1.0, ShapeError, "'video': expected finite numbers"),
    ],
)
def test_invalid_arguments_raise(query, keys, rho, error, message):
    with pytest.raises(error, match=message):
        eq.balance.rolling_query(query, keys, rho=rho)


@pytest.mark.parametrize(
    ("query", "keys"),
    [(torch.tensor([3, 4, 0]), A2_KEYS), (A2_QUERY, {**A2_KEYS, "video": torch.tensor([0, 0, 5])})],
)
def test_integer_inputs_raise(query, keys):
    with pytest.raises(ShapeError, match=r"expected floating point numbers, got torch\.int64\. Use vector\.float\(\)"):
        eq.balance.rolling_query(query, keys, rho=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": "1"}, r"expected rho >= 0 and finite, got rho = '1'"),
        ({"rotation": "minimum"}, r"expected a known rotation, got 'minimum'\. Did you mean 'minimal'"),
        (
            {"weights": {"audio": 1.0}},
            r"weights: expected one number for each of audio, video, got numbers for \['audio'\]",
        ),
        ({"weights": {"audio": 0.5, "video": 0.4, "text": 0.1}}, r"got numbers for \['audio', 'video', 'text'\]"),
        ({"weights": {"audio": 1.5, "video": -0.5}}, r"expected weights >= 0 that sum to 1, got \{'audio': 1\.5"),
        ({"weights": {"audio": 0.6, "video": 0.8}}, r"that sum to 1, got .*\. Divide them by their sum"),
        ({"weights": {"audio": math.nan, "video": 1.0}}, r"weights: expected finite numbers, got \{'audio': nan"),
        ({"imbalance": {"audio": 0.1, "vidoe": 0.2}}, r"imbalance: expected one number for each of audio, video, got"),
        ({"imbalance": {}}, r"imbalance: expected one number for each of audio, video, got numbers for \[\]"),
        ({"imbalance": {"audio": math.inf, "video": 0.2}}, r"imbalance: expected finite numbers"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        eq.balance.rolling_query(A2_QUERY, A2_KEYS, **{"rho": 1.0, **options})
