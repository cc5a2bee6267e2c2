"""ARL against its equations: factors, losses, whole steps, missing modalities, tasks, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.arl import asymmetric_factors
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch, split_batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_d import arl, entropy
from oracles.plain import mean

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def attached(names=("audio", "image"), **options):
    model = additive_model(names, unimodal=options.pop("unimodal", "none"))
    return model, eq.BalancerList(model, [eq.balance.ARL(model, start=0, **options)])


@quick
@given(st.integers(2, 5), st.randoms(use_true_random=False), st.floats(0.1, 20), st.floats(0.05, 1))
def test_the_formula_equals_the_oracle(number, random, temperature, floor):
    entropies = [random.uniform(0.01, 2) for _ in range(number)]
    sizes = [random.uniform(0.01, 9) for _ in range(number)]
    known = torch.ones(number, dtype=torch.bool)
    result = asymmetric_factors(doubles(entropies), doubles(sizes), known, temperature=temperature, floor=floor)
    assert result.tolist() == pytest.approx(arl(entropies, sizes, temperature, floor))
    assert float(result.sum()) == pytest.approx(number + 1)


def test_a_certain_and_little_used_modality_gets_the_larger_gradient():
    known = torch.ones(2, dtype=torch.bool)
    certain = asymmetric_factors(doubles([0.1, 0.9]), doubles([1, 1]), known, temperature=8.0, floor=0.6)
    unused = asymmetric_factors(doubles([0.5, 0.5]), doubles([1, 3]), known, temperature=8.0, floor=0.6)
    assert certain[0] > 1.5 > certain[1]
    assert unused[0] > 1.5 > unused[1]


def test_modality_without_samples_is_excluded():
    known = torch.tensor([True, False, True])
    result = asymmetric_factors(doubles([0.4, 0, 1.1]), doubles([2, 0, 3]), known, temperature=8.0, floor=0.6)
    assert result.tolist() == pytest.approx([(one := arl([0.4, 1.1], [2, 3], 8.0, 0.6))[0], 1.0, one[1]])
    nothing = torch.zeros(2, dtype=torch.bool)
    assert asymmetric_factors(doubles([0, 0]), doubles([0, 0]), nothing, temperature=8.0, floor=0.6).tolist() == [1, 1]


def slow_factors(model, inputs):
    parts = model.contributions(model(inputs))
    entropies = [mean(entropy(row) for row in to_lists(part)) for part in parts.values()]
    sizes = [mean(sum(abs(x) for x in row) for row in to_lists(part)) for part in parts.values()]
    return dict(zip(model.names, arl(entropies, sizes, 8.0, 0.6), strict=True))


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_a_step_scales_the_gradient_of_task_and_unimodal_losses(number, gamma):
    result, balancing = attached(NAMES[:number], gamma=gamma)
    inputs = batch(NAMES[:number], size=7)
    actual = step(result, balancing, inputs)
    output = result(inputs)
    loss = result.loss(output.logits, inputs["target"])
    loss = loss + gamma * sum(result.loss(part, inputs["target"]) for part in result.contributions(output).values())
    for name, factor in slow_factors(result, inputs).items():
        encoder = result.encoders[name]
        weight, bias = torch.autograd.grad(loss, [encoder.weight, encoder.bias], retain_graph=True)
        torch.testing.assert_close(actual[f"encoders.{name}.weight"], factor * weight, **EXACT)
        torch.testing.assert_close(actual[f"encoders.{name}.bias"], bias, **EXACT)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_losses_of_unimodal_heads_are_counted_once(gamma):
    model = attention_model()
    balancing = eq.BalancerList(model, [eq.balance.ARL(model, gamma=gamma)])
    inputs = batch(size=7)
    output = model.train()(inputs)
    heads = sum(model.loss(logits, inputs["target"]) for logits in output.unimodal_logits.values())
    expected = model.loss(output.logits, inputs["target"]) + gamma * heads
    torch.testing.assert_close(balancing.loss(output, inputs["target"]), expected, **EXACT)


def test_accumulated_batches_are_scaled_as_one_large_batch():
    result, balancing = attached()
    full = batch(size=12)
    large, small = step(result, balancing, full), step(result, balancing, *split_batch(full, 5, 3, 4))
    for key, gradient in large.items():
        torch.testing.assert_close(small[key], gradient, **EXACT)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_scales(task):
    model = additive_model(task=task, unimodal="none")
    inputs = batch_for(task, size=7)
    balancing = eq.BalancerList(model, [eq.balance.ARL(model, start=0, gamma=0.0)])
    result, plain = step(model, balancing, inputs), step(model, eq.BalancerList(model), inputs)
    ratios = [result[k] / plain[k] for k in ("encoders.audio.weight", "encoders.image.weight")]
    assert sum(float(r.mean()) for r in ratios) == pytest.approx(3)


def test_in_a_regression_the_squared_error_is_the_variance():
    model = additive_model(task="regression", unimodal="none")
    inputs = batch_for("regression", size=7)
    balancing = eq.BalancerList(model, [eq.balance.ARL(model, start=0)])
    step(model, balancing, inputs)
    parts = [part.detach() for part in model.contributions(model(inputs)).values()]
    errors = [float((part - inputs["target"]).square().mean()) for part in parts]
    sizes = [float(part.abs().sum(dim=1).mean()) for part in parts]
    assert list(balancing.end_epoch().values()) == pytest.approx(arl(errors, sizes, 8.0, 0.6))


def test_gradients_are_not_scaled_before_the_start():
    model = additive_model(unimodal="none")
    balancer = eq.balance.ARL(model, start=1)
    balancing = eq.BalancerList(model, [balancer])
    plain = step(model, eq.BalancerList(model, [eq.balance.ARL(model, start=9)]), batch())
    result = step(model, balancing, batch())
    assert all(torch.equal(result[key], plain[key]) for key in plain)
    assert balancing.end_epoch() == {"scale/audio": 1.0, "scale/image": 1.0}
    assert not torch.equal(step(model, balancing, batch())["encoders.audio.weight"], plain["encoders.audio.weight"])


@pytest.mark.parametrize(
    "wrong", [{"gamma": -1.0}, {"temperature": 0.0}, {"floor": 0.0}, {"floor": 1.5}, {"start": -1}]
)
def test_errors(wrong):
    with pytest.raises(ConfigError, match=r"ARL: expected gamma >= 0, temperature > 0, .* got "):
        eq.balance.ARL(additive_model(), **wrong)


def test_models_without_trainable_unimodal_logits_raise():
    model = attention_model(unimodal="probe")
    with pytest.raises(ConfigError, match="ARL: expected logits that are a sum over modalities, or unimodal heads"):
        step(model, eq.BalancerList(model, [eq.balance.ARL(model)]), batch())
    with pytest.raises(ConfigError, match="ARL with OGM: both scale the encoders' gradients"):
        eq.BalancerList(model, [eq.balance.ARL(model), eq.balance.OGM(model)])
