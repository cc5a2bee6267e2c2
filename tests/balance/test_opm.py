"""OPM against its equations: rates, what is dropped and how the rest is scaled, that draws repeat, errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.common.unimodal_terms import discrepancy_ratio
from equipoise.balance.opm import drop_rates
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_a import mean_scores, opm

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def build(names=("audio", "image"), *, make=additive_model, model=(), **options):
    result = make(names, **dict(model))
    balancer = eq.balance.OPM(result, **options)
    return result.train(), balancer, eq.BalancerList(result, [balancer])


def set_rates(balancer, *rates):
    balancer.rates = doubles(*rates)


def dropped_mask(output):
    """(batch, modality) where a modality takes no part."""
    return torch.stack([~part.present() for part in output.tokens.values()], dim=1)


def test_rates_by_hand():
    # rho = 2 and 1/2; tanh(1) = 0.761594.
    result = drop_rates(doubles(0.6, 0.3), q_base=0.4, alpha=0.5)
    torch.testing.assert_close(result, doubles(0.4 * (1 + 0.5 * 0.7615941559557649), 0), **EXACT)
    assert drop_rates(doubles(0.6, 0.3), q_base=4.0, alpha=0.5).tolist() == [1.0, 0.0]


@quick
@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=5), st.floats(0, 2), st.floats(0, 2))
def test_rates_equal_the_oracle(scores, q_base, alpha):
    result = drop_rates(doubles(*scores), q_base=q_base, alpha=alpha)
    for rate, slow, ratio in zip(result.tolist(), opm(scores, q_base, alpha), discrepancy_ratio(doubles(*scores)),
                                 strict=True):  # fmt: skip
        # At a ratio of 1 but for rounding, either side of the jump is right.
        if abs(float(ratio) - 1) > 1e-12:
            assert rate == pytest.approx(slow, abs=1e-9)
    # At least one modality is kept, so the rest can be scaled.
    assert float(result.mean()) < 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("make", [additive_model, attention_model])
def test_rates_use_scores_of_the_previous_step(task, make):
    model, balancer, balancing = build(NAMES[:3], make=make, model={"task": task})
    inputs = batch_for(task, NAMES[:3], size=7, missing=("audio", "image"))
    output = model(inputs)
    assert torch.equal(
        dropped_mask(output), torch.stack([~inputs["mask"].get(n, torch.ones(7).bool()) for n in model.names], 1)
    )
    step(model, balancing, inputs)
    answers = model.contributions(output) or output.unimodal_logits
    here = (~dropped_mask(output)).T.tolist()
    scores = mean_scores([to_lists(answers[name]) for name in model.names], inputs["target"].tolist(), here, task)
    assert balancer.rates.tolist() == pytest.approx(opm(scores, 0.4, 0.5))
    assert max(balancer.rates.tolist()) > 0.3


def test_first_step_drops_nothing():
    model, _, balancing = build(p_exe=1.0)
    result, twin = step(model, balancing, batch()), additive_model()
    plain = step(twin, eq.BalancerList(twin), batch())
    for key, gradient in plain.items():
        torch.testing.assert_close(result[key], gradient, **EXACT)


def test_kept_modalities_are_rescaled():
    model, balancer, _ = build(p_exe=1.0)
    full = model(batch()).features
    set_rates(balancer, 1.0, 0.5)
    output = model(batch())
    gone = dropped_mask(output)
    assert bool(gone[:, 0].any())
    # theta = 3 / 4
    expected = 4 * full * (~gone).repeat_interleave(DIM, dim=1)
    torch.testing.assert_close(output.features, expected, **EXACT)


def test_sample_that_would_lose_all_modalities_keeps_all():
    model, balancer, _ = build(p_exe=1.0)
    set_rates(balancer, 1.0, 0.0)
    inputs = batch(size=7, missing=("audio", "image"))
    gone = dropped_mask(model(inputs))
    alone = ~inputs["mask"]["image"]
    assert bool(alone.any())
    assert torch.equal(gone[:, 0], ~alone)
    assert torch.equal(gone[:, 1], alone)


def test_measured_drop_rates_match_the_rates():
    model, balancer, _ = build(p_exe=0.7)
    tokens = model.encode(batch(size=500))
    done, kept = 0, []
    for _ in range(200):
        set_rates(balancer, 0.3, 0.0)
        result = balancer.transform(tokens)
        if result is not tokens:
            done += 1
            kept.append(result["audio"].present().double().mean())
            assert bool(result["image"].present().all())
        balancer.steps += 1
    assert done / 200 == pytest.approx(0.7, abs=0.1)
    assert float(torch.stack(kept).mean()) == pytest.approx(0.7, abs=0.01)


def test_probability_zero_drops_nothing():
    model, balancer, _ = build(p_exe=0.0)
    set_rates(balancer, 1.0, 0.0)
    assert not bool(dropped_mask(model(batch())).any())


def test_evaluation_drops_nothing():
    model, balancer, _ = build(p_exe=1.0)
    set_rates(balancer, 1.0, 0.0)
    assert not bool(dropped_mask(model.eval()(batch())).any())


def test_accumulated_batches_equal_one_large_batch():
    full, result = batch(size=12), []
    for sizes in ((12,), (5, 3, 4)):
        model, balancer, balancing = build(p_exe=1.0, model={"unimodal": "none"})
        steps = []
        for _ in range(3):
            steps.append(step(model, balancing, *split_batch(full, *sizes)))
        assert float(balancer.rates.max()) > 0
        result.append((steps, balancer.rates))
    torch.testing.assert_close(result[0][1], result[1][1], **EXACT)
    for one, other in zip(result[0][0], result[1][0], strict=True):
        for key, gradient in one.items():
            torch.testing.assert_close(other[key], gradient, **EXACT)


def test_randomness_depends_on_seed_and_step_only():
    tokens = additive_model().encode(batch(size=101))
    state, result = torch.get_rng_state(), {}
    for seed, steps in ((0, 0), (0, 1), (1, 0), (0, 0)):
        _, balancer, _ = build(p_exe=1.0, seed=seed)
        set_rates(balancer, 0.5, 0.0)
        balancer.steps += steps
        torch.set_rng_state(state)
        kept = balancer.transform(tokens)["audio"].present()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(kept, result.setdefault((seed, steps), kept))
    assert not torch.equal(result[0, 0], result[0, 1])
    assert not torch.equal(result[0, 0], result[1, 0])


def test_resumed_run_draws_the_same_masks():
    model, balancer, balancing = build(p_exe=1.0)
    step(model, balancing, batch())
    saved = copy.deepcopy(balancer.state_dict())
    straight = step(model, balancing, batch(seed=1))
    model, balancer, balancing = build(p_exe=1.0)
    balancer.load_state_dict(saved)
    resumed = step(model, balancing, batch(seed=1))
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_log_contains_the_mean_rate():
    model, balancer, balancing = build(p_exe=0.0)
    rates = [balancer.rates.tolist()]
    for seed in range(3):
        step(model, balancing, batch(seed=seed))
        rates.append(balancer.rates.tolist())
    means = [sum(column[:3]) / 3 for column in zip(*rates, strict=True)]
    assert max(means) > 0
    assert balancing.end_epoch() == pytest.approx({"rate/audio": means[0], "rate/image": means[1]})
    assert balancing.end_epoch() == {"rate/audio": 0.0, "rate/image": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_base": -0.1}, r"OPM: expected q_base >= 0, alpha >= 0 and 0 <= p_exe <= 1, got q_base = -0\.1"),
        ({"alpha": -1}, "got q_base = 0.4, alpha = -1"),
        ({"p_exe": 1.1}, r"p_exe = 1\.1"),
        ({"p_exe": float("nan")}, "p_exe = nan"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        eq.balance.OPM(additive_model(), **options)


def test_model_without_unimodal_logits_raises():
    with pytest.raises(ConfigError, match="OPM: expected two or more modalities, got audio"):
        eq.balance.OPM(additive_model(("audio",)))
    model, _, balancing = build(make=attention_model, model={"unimodal": "none"})
    with pytest.raises(ConfigError, match="OPM: expected logits that are a sum over modalities, or unimodal heads"):
        step(model, balancing, batch())
