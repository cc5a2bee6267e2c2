"""AGM against its equations: Shapley responses of real models, coefficients, running means, clipping, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.agm import coefficients
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, OUTPUTS, batch, split_batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_a import agm, agm_error, shapley

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def build(names=("audio", "image"), *, make=attention_model, alpha=0.1, clip=math.inf, **options):
    result = make(names, **options)
    balancer = eq.balance.AGM(result, alpha=alpha, clip=clip)
    return result, balancer, eq.BalancerList(result, [balancer])


def responses(model, inputs):
    """[m][i] rows of Shapley responses, where a modality is taken away by giving the model None for it."""
    count, size, answers = len(model.names), len(inputs["target"]), {}
    model.eval()
    with torch.no_grad():
        nothing = eq.Tokens(torch.zeros(size, 0, DIM, dtype=torch.float64))
        answers[frozenset()] = to_lists(model.fuse(dict.fromkeys(model.names, nothing)).logits)
        for number in range(1, count + 1):
            for kept in itertools.combinations(range(count), number):
                gone = {name: None for m, name in enumerate(model.names) if m not in kept}
                answers[frozenset(kept)] = to_lists(model({**inputs, **gone}).logits)
    result = [[[0.0] * OUTPUTS for _ in range(size)] for _ in range(count)]
    for i, c in itertools.product(range(size), range(OUTPUTS)):
        for m, phi in enumerate(shapley({kept: answer[i][c] for kept, answer in answers.items()}, count)):
            result[m][i][c] = phi
    return result


def slow_errors(model, inputs, task="classification"):
    size = len(inputs["target"])
    here = [inputs.get("mask", {}).get(name, torch.ones(size, dtype=torch.bool)).tolist() for name in model.names]
    target = inputs["target"].tolist()
    return [agm_error(part, target, has, task) for part, has in zip(responses(model, inputs), here, strict=True)]


def test_coefficients_by_hand():
    # r = exp(0) = 1 for both; tau = exp(-1) and exp(1).
    result = coefficients(doubles(1, 1), doubles(2, 1), torch.tensor([True, True]), alpha=0.1)
    expected = doubles(math.exp(0.1 * (1 / math.e - 1)), math.exp(0.1 * (math.e - 1)))
    torch.testing.assert_close(result, expected, **EXACT)


def test_exponent_is_clamped_at_seven():
    result = coefficients(doubles(1, 1), doubles(9, 1), torch.tensor([True, True]), alpha=0.1)
    assert float(result[1]) == pytest.approx(math.exp(0.7))
    result = coefficients(doubles(0, 18), doubles(1, 1), torch.tensor([True, True]), alpha=0.1)
    assert float(result[0]) == 0.0


def test_leading_modality_gets_smaller_gradients():
    result = coefficients(doubles(0.5, 2), doubles(1, 1), torch.tensor([True, True]), alpha=0.1)
    assert float(result[0]) < 1 < float(result[1])


errors = st.lists(st.floats(0, 18.4), min_size=5, max_size=5)


@quick
@given(errors, errors, st.sampled_from([2, 3, 5]), st.lists(st.booleans(), min_size=5, max_size=5), st.floats(0, 1))
def test_coefficients_equal_the_oracle(now, usual, number, here, alpha):
    known = torch.tensor(here[:number])
    result = coefficients(doubles(*now[:number]), doubles(*usual[:number]), known, alpha=alpha)
    expected = agm([e if yes else None for e, yes in zip(now[:number], here, strict=False)], usual[:number], alpha)
    assert result.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("make", [attention_model, additive_model])
def test_steps_equal_the_oracle(number, task, make):
    names = NAMES[:number]
    model, _, balancing = build(names, make=make, task=task, alpha=0.5)
    history = []
    for seed in range(3):
        inputs = batch_for(task, names, size=7, seed=seed, missing=("image",))
        plain = step(model, eq.BalancerList(model), inputs)
        result = step(model, balancing, inputs)
        # Means over the steps before this one; the first step has none.
        usual = [sum(column) / len(history) for column in zip(*history, strict=True)] or [None] * number
        history.append(slow_errors(model, inputs, task))
        for name, factor in zip(names, agm(history[-1], usual, 0.5), strict=True):
            weight = f"encoders.{name}.weight"
            torch.testing.assert_close(result[weight], factor * plain[weight], **EXACT)
        others = [key for key in plain if not (key.startswith("encoders") and key.endswith("weight"))]
        assert "head.weight" in others
        assert all(torch.equal(result[key], plain[key]) for key in others)


def test_shapley_response_of_additive_logits_is_the_contribution_without_bias():
    model = additive_model()
    with torch.no_grad():
        model.head.bias.normal_()
    inputs = batch(size=5)
    parts = model.contributions(model(inputs))
    for name, response in zip(model.names, responses(model, inputs), strict=True):
        expected = parts[name] - model.head.bias / 2
        torch.testing.assert_close(torch.tensor(response, dtype=torch.float64), expected.detach(), **EXACT)


def test_first_step_applies_no_scaling():
    model, _, balancing = build()
    result, plain = step(model, balancing, batch()), step(model, eq.BalancerList(model), batch())
    assert all(torch.equal(result[key], plain[key]) for key in plain)
    assert balancing.end_epoch() == {"scale/audio": 1.0, "scale/image": 1.0}
    assert balancing.end_epoch() == {"scale/audio": 1.0, "scale/image": 1.0}


@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_accumulated_batches_are_scaled_as_one_large_batch(missing):
    full, result = batch(size=12, missing=missing), []
    for sizes in ((12,), (5, 3, 4)):
        model, _, balancing = build(unimodal="none")
        step(model, balancing, batch(seed=5))
        result.append(step(model, balancing, *split_batch(full, *sizes)))
    for key, gradient in result[0].items():
        torch.testing.assert_close(result[1][key], gradient, **EXACT)


def test_modality_missing_from_all_samples_has_no_effect():
    model, balancer, balancing = build(NAMES[:3])
    step(model, balancing, batch(NAMES[:3]))
    before = balancer.usual.clone()
    step(model, balancing, {**batch(NAMES[:3], seed=1), "text": None})
    assert balancer.steps.tolist() == [2, 2, 1]
    assert float(balancer.usual[2]) == float(before[2])
    assert not torch.equal(balancer.usual[:2], before[:2])


def test_dropout_is_off_for_subset_evaluation():
    fusion = eq.fusion.JointAttention(DIM, heads=2, dropout=0.5, cls_std=1.0)
    model, balancer, balancing = build(fusion=fusion)
    output, target = model.train()(batch()), batch()["target"]
    balancing.loss(output, target).backward()
    state = torch.get_rng_state()
    balancing.before_step()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert balancer.usual.tolist() == pytest.approx(slow_errors(model, batch()))


def test_after_autocast():
    """Under autocast tokens are half precision, the fusion's weights are not."""
    model, balancer, balancing = build(dtype=torch.float32)
    inputs = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = balancing.loss(model(inputs), inputs["target"])
    loss.backward()
    balancing.before_step()
    exact = slow_errors(attention_model(), batch())
    assert balancer.usual.tolist() == pytest.approx(exact, rel=TOL[torch.bfloat16]["rtol"])


def total_norm(result):
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in result.values()))


def test_large_head_gradients_clip_all_gradients():
    model, _, _ = build()
    plain = step(model, eq.BalancerList(model), batch())
    largest = max(float(plain[f"head.{part}"].abs().max()) for part in ("weight", "bias"))
    assert total_norm(plain) > largest > 0.02
    below, above = 0.9 * largest, 1.1 * largest
    clipped = step(model, eq.BalancerList(model, [eq.balance.AGM(model, clip=below)]), batch())
    assert total_norm(clipped) == pytest.approx(below)
    for key, gradient in clipped.items():
        torch.testing.assert_close(gradient, plain[key] * below / total_norm(plain), **EXACT)
    for clip in (above, math.inf):
        result = step(model, eq.BalancerList(model, [eq.balance.AGM(model, clip=clip)]), batch())
        assert all(torch.equal(result[key], plain[key]) for key in plain)


def test_frozen_head_disables_clipping():
    model, _, balancing = build(clip=1e-6)
    model.head.requires_grad_(False)
    result, plain = step(model, balancing, batch()), step(model, eq.BalancerList(model), batch())
    assert all(torch.equal(result[key], plain[key]) for key in plain)


def test_errors():
    with pytest.raises(ConfigError, match="AGM: expected two or more modalities, got audio"):
        eq.balance.AGM(additive_model(("audio",)))
    with pytest.raises(ConfigError, match=r"AGM: expected alpha >= 0 and clip > 0, got alpha = -1, clip = 5\.0"):
        eq.balance.AGM(additive_model(), alpha=-1)
    with pytest.raises(ConfigError, match=r"got alpha = 0\.1, clip = 0"):
        eq.balance.AGM(additive_model(), clip=0)
    model = additive_model()
    with pytest.raises(ConfigError, match="OGM_GE with AGM: both scale the encoders' gradients"):
        eq.BalancerList(model, [eq.balance.OGM_GE(model), eq.balance.AGM(model)])
