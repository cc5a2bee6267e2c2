"""Where the keys of modalities lie to each other, against loops; and nothing is left behind on the model."""

import json
import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.diagnostics.key_distributions import imbalance, key_geometry, overlap, wasserstein
from equipoise.diagnostics.key_plot_data import key_distribution
from equipoise.diagnostics.noise_test import input_statistics
from equipoise.diagnostics.prediction_collection import NoiseSource, collect_predictions
from equipoise.errors import ConfigError, ShapeError
from helpers.fusion import NAMES, batch, joint_model, oracle_samples
from helpers.tolerance import TOL
from oracles.plain import mean

EXACT = {"rel": TOL[torch.float64]["rtol"], "abs": TOL[torch.float64]["atol"]}
SINGLE = {"rel": TOL[torch.float32]["rtol"], "abs": TOL[torch.float32]["atol"]}


def slow_wasserstein(a, b):
    """The area between two cumulative distributions, interval by interval."""
    area = 0.0
    for left, right in pairwise(sorted([*a, *b])):
        parts = [sum(value <= left for value in values) / len(values) for values in (a, b)]
        area += (right - left) * abs(parts[0] - parts[1])
    return area


def expected_cosines(model, batches, count):
    """Of the class query and the mean key of each modality, over all samples and heads, from the parameters alone."""
    result = [[] for _ in range(count)]
    for query, key, labels, valid, _ in oracle_samples(model, batches):
        for head in range(query.shape[0]):
            for label in range(count):
                own = [k for k, m, v in zip(key[head], labels, valid, strict=True) if m == label and v]
                if own:
                    middle, row = sum(own) / len(own), query[head, 0]
                    length = math.sqrt(float(middle @ middle) * float(row @ row))
                    result[label].append(float(row @ middle) / length)
    return result


@pytest.mark.parametrize("count", [1, 2, 3])
def test_against_loops(count):
    names = NAMES[:count]
    model = joint_model(names)
    missing = ("image",) if count > 1 else ()
    batches = [batch(names, seed=seed, missing=missing) for seed in range(3)]
    result = key_geometry(model, batches)
    values = expected_cosines(model, batches, count)
    means = [mean(own) for own in values]
    assert result.distribution == key_distribution(collect_predictions(model, batches))
    for label, name in enumerate(names):
        others = [other for index, other in enumerate(means) if index != label]
        expected = means[label] - mean(others) if others else None
        assert result.air[name] == (expected if expected is None else pytest.approx(expected, rel=1e-4))
    assert result.range == pytest.approx(max(means) - min(means), **SINGLE)
    pairs = list(combinations(range(count), 2))
    assert [(gap.first, gap.second) for gap in result.gaps] == [(names[a], names[b]) for a, b in pairs]
    for gap, (a, b) in zip(result.gaps, pairs, strict=True):
        assert gap.wasserstein == pytest.approx(slow_wasserstein(values[a], values[b]), **SINGLE)
        bins = [[min(int((value + 1) / 0.05), 39) for value in values[index]] for index in (a, b)]
        common = sum(min(own.count(i) / len(own) for own in bins) for i in range(40))
        assert gap.overlap == pytest.approx(common, **EXACT)
    assert result.replaced is None
    assert result.shift == {}


@pytest.mark.parametrize("given", [None, {"image": (0.5, 2.0)}])
@pytest.mark.parametrize("count", [2, 3])
def test_noise_shifts_the_replaced_modality(count, given):
    names = NAMES[:count]
    model, batches = joint_model(names), [batch(names, seed=seed) for seed in range(3)]
    result = key_geometry(model, lambda: iter(batches), replaced="image", noise=given, seed=5)
    level = (0.5, 2.0) if given else input_statistics(batches, "image", who="test")
    noisy = [
        {**inputs, "image": NoiseSource("image", *level, seed=5).of(inputs["image"], number)}
        for number, inputs in enumerate(batches)
    ]
    before, after = expected_cosines(model, batches, count), expected_cosines(model, noisy, count)
    for label, name in enumerate(names):
        assert result.shift[name] == pytest.approx(mean(after[label]) - mean(before[label]), **SINGLE)
    # Linear encoders: the others' keys and the class query of the first layer stay as they were.
    assert {name for name, shift in result.shift.items() if shift} == {"image"}
    assert result.replaced == "image"
    assert result.distribution == key_geometry(model, batches).distribution


def test_to_dict():
    model, batches = joint_model(NAMES[:3]), [batch(NAMES[:3])]
    plain = key_geometry(model, batches).to_dict()
    made_of = json.loads(json.dumps(key_geometry(model, batches, replaced="text").to_dict(), allow_nan=False))
    assert plain["replaced"] is None
    assert plain["modalities"]["text"]["shift"] is None
    assert made_of["replaced"] == "text"
    assert made_of["modalities"]["text"]["shift"] != 0
    assert made_of["gaps"] == plain["gaps"]
    assert set(plain["gaps"][0]) == {"first", "second", "wasserstein", "overlap"}
    assert sum(plain["modalities"]["audio"]["cosine"]["counts"]) == 5 * 2
    assert sum(own["air"] for own in plain["modalities"].values()) == pytest.approx(0, abs=1e-6)


def test_modality_without_samples():
    model, lacking = joint_model(NAMES[:2]), [{**batch(), "image": None}]
    result = key_geometry(model, lacking)
    assert result.air == {"audio": None, "image": None}
    assert result.range == 0.0
    assert (result.gaps[0].wasserstein, result.gaps[0].overlap) == (None, None)
    json.dumps(result.to_dict(), allow_nan=False)
    assert key_geometry(model, lacking, replaced="audio").shift["image"] is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=13),
    st.lists(st.floats(-1, 1), min_size=1, max_size=11),
    st.floats(-1, 1),
)
def test_wasserstein(a, b, offset):
    left, right = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    result = wasserstein(left, right)
    assert result == pytest.approx(slow_wasserstein(a, b), **EXACT)
    assert wasserstein(right, left) == pytest.approx(result, **EXACT)
    assert wasserstein(left, left + offset) == pytest.approx(abs(offset), **EXACT)
    holes = torch.cat([left, torch.tensor([math.nan]).double()])
    assert wasserstein(holes[:, None], right) == pytest.approx(result, **EXACT)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=13), st.integers(1, 5))
def test_overlap(bins, factor):
    a, b = zip(*bins, strict=True)
    if not (sum(a) and sum(b)):
        assert math.isnan(overlap(a, b))
        return
    expected = sum(min(x / sum(a), y / sum(b)) for x, y in bins)
    assert overlap(a, b) == pytest.approx(expected, **EXACT)
    assert overlap([factor * x for x in a], torch.tensor(b)) == pytest.approx(expected, **EXACT)
    assert overlap(a, a) == pytest.approx(1.0, **EXACT)


def test_empty_samples_have_no_distance():
    assert math.isnan(wasserstein(torch.tensor([math.nan]), torch.tensor([1.0])))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=5))
def test_imbalance_sums_to_zero_and_matches_the_paper_for_two(means):
    result = imbalance({str(index): value for index, value in enumerate(means)})
    assert sum(result.values()) == pytest.approx(0, abs=1e-12)
    if len(means) == 2:
        assert result["0"] == means[0] - means[1]
    assert imbalance({"a": 0.5}) == {"a": None}


def test_errors():
    model = joint_model()
    encoders = {"audio": torch.nn.Linear(3, 12), "image": torch.nn.Linear(5, 12)}
    with pytest.raises(ConfigError, match=r"key_geometry: expected a model with attention.*, got a static fusion\. St"):
        key_geometry(eq.FusionModel(encoders, eq.fusion.Concat(12), 3).double(), [batch()])
    with pytest.raises(ConfigError, match=r"key_geometry: expected a known modality, got 'imag'. Did you mean 'image'"):
        key_geometry(model, [batch()], replaced="imag")
    with pytest.raises(ConfigError, match=r"key_geometry: expected a known entry of noise, got 'image'"):
        key_geometry(model, [batch()], replaced="image", noise={"audio": (0.0, 1.0)})
    with pytest.raises(ShapeError, match=r"expected at least one batch, got none"):
        key_geometry(model, [])
    with pytest.raises(ShapeError, match=r"expected at least one batch, got none. .* or the loader used up"):
        key_geometry(model, iter([batch()]), replaced="image")
    with pytest.raises(ShapeError, match=r"'image': expected a floating tensor or word ids in every batch"):
        key_geometry(model, [batch(), {**batch(), "image": None}], replaced="image")
    with pytest.raises(ShapeError, match=r"overlap: expected two histograms over the same bins, got \(2,\) and \(3,\)"):
        overlap([1, 2], [1, 2, 3])


class Broken(torch.nn.Linear):
    def forward(self, inputs):
        raise RuntimeError("no such sound")


@pytest.mark.parametrize("goes", ["well", "user error", "model error"])
def test_model_state_is_restored(goes):
    model = joint_model(dropout=0.5).train()
    model.fusion.eval()
    if goes == "model error":
        model.encoders["audio"] = Broken(3, 12)
    modules = list(model.modules())
    before = [module.training for module in modules]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in modules]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    if goes == "well":
        key_geometry(model, [batch()], replaced="audio")
    elif goes == "user error":
        with pytest.raises(ShapeError):
            key_geometry(model, [batch(), (1, 2)], replaced="audio")
    else:
        with pytest.raises(RuntimeError, match="no such sound"):
            key_geometry(model, [batch()], replaced="audio")
    assert [module.training for module in modules] == before
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in modules] == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
