"""Damage by loops over single numbers, and the curve of a model against runs on inputs damaged by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.diagnostics.corruption_test import corruption_curve
from equipoise.diagnostics.input_corruption import AUDIO_RUN, KINDS, TIMESERIES_RUN, corrupt
from equipoise.diagnostics.noise_test import input_statistics
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from helpers.fusion import batch, joint_model
from helpers.steps import attention_model
from helpers.tasks import TASKS, batch_for
from helpers.tolerance import TOL
from oracles.task_scores import slow_score

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
SHAPE = (5, 13, 3)


def random_inputs(seed=0, dtype=torch.float64, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_runs(starts, length):
    """A step is dropped when a run starts there, or at one of the steps before it that the run is long."""
    return [any(starts[max(0, step - length + 1) : step + 1]) for step in range(len(starts))]


def slow_corrupt(values, level, kind, seed, std):
    """One number after the other, from the same draws in the order in which ``corrupt`` names them."""
    samples, steps, features = values.shape
    random, result = generator(seed), values.clone()

    def normal(*shape):
        return torch.randn(shape, generator=random).double()

    def chance(*shape):
        return (torch.rand(shape, generator=random) < level).tolist()

    if kind in ("additive", "mix"):
        noise = normal(samples, steps, features)
    elif kind == "prob":
        noise, hit = normal(samples, steps, features), chance(samples)
    elif kind == "multibench_audio":
        hit, way = chance(samples), torch.randint(3, (samples,), generator=random).tolist()
        noise, dropped, starts = normal(samples, steps, features), chance(samples, steps), chance(samples, steps)
    else:
        noise, dropped, starts = normal(samples, steps), chance(samples, steps, features), chance(samples, steps)
    for i in range(samples):
        for t in range(steps):
            for f in range(features):
                x = float(values[i, t, f])
                if kind == "additive":
                    x = x + level * std * float(noise[i, t, f])
                elif kind == "mix":
                    x = (1 - level) * x + level * std * float(noise[i, t, f])
                elif kind == "prob":
                    x = std * float(noise[i, t, f]) if hit[i] else x
                elif kind == "multibench_audio" and hit[i]:
                    gone = [False, dropped[i][t], slow_runs(starts[i], 10)[t]][way[i]]
                    x = 0.0 if gone else x + level * float(noise[i, t, f]) * (way[i] == 0)
                elif kind == "multibench_timeseries":
                    gone = dropped[i][t][f] or slow_runs(starts[i], 3)[t]
                    x = 0.0 if gone else x + level * float(noise[i, t])
                result[i, t, f] = x
    return result


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 1), st.integers(0, 1000), st.floats(0, 5))
def test_against_loops(kind, level, seed, std):
    values = random_inputs(seed)
    result = corrupt(values, level, kind, generator(seed), std)
    torch.testing.assert_close(result, slow_corrupt(values, level, kind, seed, std), **EXACT)
    assert torch.equal(values, random_inputs(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_level_zero_is_the_identity(kind, dtype):
    values = random_inputs(dtype=dtype)
    values[0, 0], values[1, 1] = -0.0, math.nan
    result = corrupt(values, 0, kind, generator())
    assert torch.equal(result.view(torch.uint8), values.view(torch.uint8))
    assert corrupt(random_inputs(dtype=dtype), 0.5, kind, generator()).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_axes(kind):
    for shape in ((7, 5), (7, 5, 3, 2)):
        values = random_inputs(shape=shape)
        result = corrupt(values, 0.5, kind, generator())
        assert result.shape == shape
        assert not torch.equal(result, values)
        assert result.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 1), st.floats(0.01, 1))
def test_higher_levels_extend_the_corruption(kind, seed, first, second):
    values, (low, high) = random_inputs(seed), sorted((first, second))
    less, more = (corrupt(values, level, kind, generator(seed)) for level in (low, high))
    if kind in ("additive", "prob", "mix"):
        # Every number moves along one line, from itself to the noise.
        assert ((more - values).abs() >= (less - values).abs() - EXACT["atol"]).all()
    assert ((more == 0) >= (less == 0)).all()


def test_extreme_levels():
    values, noise = random_inputs(), torch.randn(SHAPE, generator=generator()).double()
    torch.testing.assert_close(corrupt(values, 1, "additive", generator(), 2.0), values + 2 * noise, **EXACT)
    torch.testing.assert_close(corrupt(values, 1, "mix", generator(), 2.0), 2 * noise, **EXACT)
    torch.testing.assert_close(corrupt(values, 1, "prob", generator(), 2.0), 2 * noise, **EXACT)
    assert not corrupt(values, 1, "multibench_timeseries", generator()).any()
    full = corrupt(values, 1, "multibench_audio", generator())
    noisy = full.flatten(1).any(dim=1)
    assert noisy.any()
    assert not noisy.all()
    assert (AUDIO_RUN, TIMESERIES_RUN) == (10, 3)


def test_corruption_rates():
    values = torch.ones(20011, 1)
    for level in (0.25, 0.75):
        hit = corrupt(values, level, "prob", generator()) != 1
        assert float(hit.double().mean()) == pytest.approx(level, abs=0.02)
        sound = corrupt(values, level, "additive", generator(), 3.0)
        assert float(sound.std()) == pytest.approx(3 * level, rel=0.02)
    wide = corrupt(torch.ones(20011, 1, 2), 0.25, "multibench_timeseries", generator())
    # A single value stays with probability 1 - p, and its step is not in a run with probability 1 - p.
    assert float((wide != 0).double().mean()) == pytest.approx(0.75**2, abs=0.02)


def result_values(result):
    return [*result.accuracy, *result.drop, result.area, *(result.share or ())]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("names", [("image",), ("audio", "image"), ("audio", "image", "text")], ids=len)
def test_on_a_model(task, names):
    model = attention_model(names, task=task, unimodal="none")
    batches = [batch_for(task, names, seed=seed, missing=names[1:]) for seed in range(3)]
    result = corruption_curve(model, batches, modality="image", kind="mix", levels=(1, 0, 0.3), seed=5, std=2.0)
    model.eval()
    for index, level in enumerate((1, 0, 0.3)):
        outputs = []
        for number, part in enumerate(batches):
            noise = torch.randn(part["image"].shape, generator=generator(5 * 1_000_003 + number))
            damaged = (1 - level) * part["image"] + level * 2 * noise.double()
            with torch.no_grad():
                outputs.append(model({**part, "image": damaged}))
        logits = torch.cat([output.logits for output in outputs]).tolist()
        target = torch.cat([part["target"] for part in batches]).tolist()
        share = torch.cat([output.share for output in outputs])[..., names.index("image")]
        assert result.accuracy[index] == pytest.approx(slow_score(logits, target, task), abs=SINGLE["atol"])
        assert result.share[index] == pytest.approx(float(share.mean()), rel=SINGLE["rtol"])
        assert result.drop[index] == result.accuracy[1] - result.accuracy[index]
    assert result.area == pytest.approx(sum(result.accuracy) / 3)
    assert (result.levels, result.modality, result.kind) == ((1.0, 0.0, 0.3), "image", "mix")


def test_drop_is_relative_to_clean_input():
    model, batches = attention_model(task="regression", unimodal="none"), [batch_for("regression")]
    full = corruption_curve(model, batches, modality="audio", levels=(0, 0.5, 1))
    part = corruption_curve(model, lambda: batches, modality="audio", levels=[0.5, 1])
    assert part.drop == full.drop[1:]
    assert part.area == pytest.approx((part.accuracy[0] + part.accuracy[1]) / 2)
    assert full.drop[0] == 0
    assert full.drop[2] != 0


def test_default_std_is_that_of_the_data():
    model, batches = (
        attention_model(task="regression", unimodal="none"),
        [batch_for("regression", seed=seed) for seed in range(2)],
    )
    std = torch.cat([part["audio"].flatten() for part in batches]).std(correction=0)
    assert float(std) == pytest.approx(input_statistics(batches, "audio", who="test")[1])
    default, given = (corruption_curve(model, batches, modality="audio", std=value) for value in (None, float(std)))
    assert result_values(default) == pytest.approx(result_values(given))
    assert default.drop != corruption_curve(model, batches, modality="audio", std=2 * float(std)).drop


def test_noise_depends_on_seed_and_batch_index():
    model, batches = attention_model(task="regression", unimodal="none"), [batch_for("regression")] * 2
    first = corruption_curve(model, batches, modality="audio", seed=1, levels=(0.5,))
    # The same batch as number 0 and 1 has different noise; noise of number 0 does not hang on what follows.
    alone = corruption_curve(model, batches[:1], modality="audio", seed=1, levels=(0.5,))
    assert first.accuracy != alone.accuracy
    torch.manual_seed(99)
    assert result_values(corruption_curve(model, batches, modality="audio", seed=1, levels=(0.5,))) == result_values(
        first
    )
    assert corruption_curve(model, batches, modality="audio", seed=2, levels=(0.5,)).accuracy != first.accuracy
    # A level has the same noise whichever other levels there are.
    more = corruption_curve(model, batches, modality="audio", seed=1, levels=(1, 0.5))
    assert more.accuracy[1] == first.accuracy[0]


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_on_a_static_fusion(kind):
    model = attention_model(fusion=eq.fusion.Concat(12), task="regression", unimodal="none")
    result = corruption_curve(model, [batch_for("regression")], modality="audio", kind=kind)
    assert result.share is None
    assert result.levels == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert len(set(result.accuracy)) > 2


def test_errors():
    model = joint_model()
    with pytest.raises(
        ConfigError, match=r"corruption_curve: expected a known modality, got 'imag'. Did you mean 'ima"
    ):
        corruption_curve(model, [batch()], modality="imag")
    with pytest.raises(ConfigError, match=r"corruption_curve: expected a known kind, got 'mixed'. Did you mean 'mix'"):
        corruption_curve(model, [batch()], modality="image", kind="mixed")
    with pytest.raises(ConfigError, match="corruption_curve: expected one or more levels, got none"):
        corruption_curve(model, [batch()], modality="image", levels=())
    for level in (-0.1, 1.5, math.nan):
        with pytest.raises(ConfigError, match=f"corruption_curve: expected a level from 0 to 1, got {level}"):
            corruption_curve(model, [batch()], modality="image", levels=(0, level))
    with pytest.raises(ShapeError, match=r"corruption_curve 'image': expected a floating tensor .* got NoneType"):
        corruption_curve(model, [{**batch(), "image": None}], modality="image")
    with pytest.raises(ShapeError, match=r"at least one batch, got none. Is the split empty, or the loader used up"):
        corruption_curve(model, iter([batch()]), modality="image")
    without = {name: value for name, value in batch().items() if name != "target"}
    with pytest.raises(ShapeError, match="corruption_curve: expected a target for each of 5 samples, got 0"):
        corruption_curve(model, [without], modality="image")
    broken = {**batch(), "audio": torch.full((5, 7, 3), math.nan).double()}
    with pytest.raises(NonFiniteError, match="corruption_curve: expected logits without NaN, got NaN for 5 of 5"):
        corruption_curve(model, [broken], modality="image")
    nameless = torch.nn.Linear(2, 3)
    with pytest.raises(ConfigError, match=r"read: expected a FusionModel, .* got Linear without names"):
        corruption_curve(nameless, [batch()], modality="image")


def test_errors_of_the_formula():
    with pytest.raises(ConfigError, match="corrupt: expected a known kind, got 'white'"):
        corrupt(random_inputs(), 0.5, "white", generator())
    with pytest.raises(ConfigError, match="corrupt: expected a level from 0 to 1, got 2"):
        corrupt(random_inputs(), 2, "mix", generator())
    with pytest.raises(
        ShapeError, match=r"corrupt: expected floating values \(sample, \.\.\.\) for 'mix', got .*int64"
    ):
        corrupt(torch.zeros(2, 3).long(), 0.5, "mix", generator())
    with pytest.raises(ShapeError, match=r"\(sample, step, \.\.\.\) for 'multibench_audio', got shape \(7,\)"):
        corrupt(torch.zeros(7), 0.5, "multibench_audio", generator())
