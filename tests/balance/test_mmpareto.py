"""MMPareto against its equations: weights, magnitude, whole optimizer steps, missing samples, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.mmpareto import pareto_gradient, pareto_weights
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model, flatten, gradients, step
from helpers.tolerance import TOL
from oracles.balance_c import min_norm, pareto

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_vectors(seed, *sizes):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=random, dtype=torch.float64) for size in sizes]


def build(names=("audio", "image"), *, gamma=1.5, **options):
    model = attention_model(names, **options)
    return model, eq.BalancerList(model, [eq.balance.MMPareto(model, gamma=gamma)])


def test_worked_example():
    joint, alone = doubles(1, 0), doubles(-1, 1)
    weights = pareto_weights(joint, alone)
    torch.testing.assert_close(weights, doubles(0.6, 0.4), **EXACT)
    combined = weights[0] * joint + weights[1] * alone
    torch.testing.assert_close(combined, doubles(0.2, 0.4), **EXACT)
    assert float(combined @ joint) == pytest.approx(0.2)
    assert float(combined @ alone) == pytest.approx(0.2)


def test_combined_gradient_has_the_norm_of_the_plain_sum():
    # 2 (0.2, 0.4) points along (1, 2), and the plain sum (0, 1) has length 1.
    (result,) = pareto_gradient([doubles(1, 0)], [doubles(-1, 1)], gamma=1.5)
    torch.testing.assert_close(result, 1.5 * doubles(1, 2) / math.sqrt(5), **EXACT)


def test_gradients_that_agree_are_added():
    (result,) = pareto_gradient([doubles(1, 2, 0)], [doubles(0, 1, 5)], gamma=1.0)
    torch.testing.assert_close(result, doubles(1, 3, 5), **EXACT)


@pytest.mark.parametrize("zero", [(True, False), (False, True), (True, True)])
def test_zero_gradient_is_finite(zero):
    one, other = (doubles(0, 0) if z else doubles(1, 2) for z in zero)
    (result,) = pareto_gradient([one], [other], gamma=1.0)
    torch.testing.assert_close(result, one + other, **EXACT)


@quick
@given(st.integers(0, 10**6))
def test_conflicting_gradients_have_equal_inner_products_with_the_result(seed):
    joint, alone = random_vectors(seed, 7, 7)
    weights = pareto_weights(joint, alone)
    assert weights.tolist() == pytest.approx(min_norm(joint.tolist(), alone.tolist()), abs=1e-12)
    combined = weights[0] * joint + weights[1] * alone
    if float(joint @ alone) < 0:
        assert float(combined @ joint) == pytest.approx(float(combined @ alone), abs=1e-9)
        assert float(combined.norm()) <= min(float(joint.norm()), float(alone.norm())) + 1e-12
    # Neither loss rises along it.
    assert min(float(combined @ joint), float(combined @ alone)) > 0


@pytest.mark.parametrize("seed", range(5))
def test_tensors_equal_the_oracle(seed):
    joint, alone = random_vectors(seed, 11, 3), random_vectors(seed + 100, 11, 3)
    expected = pareto([flatten(t) for t in joint], [flatten(t) for t in alone], 1.5)
    result = pareto_gradient(joint, alone, gamma=1.5)
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, doubles(*other), **EXACT)


@pytest.mark.parametrize("number", [2, 3])
def test_step_equals_the_oracle(number):
    names = NAMES[:number]
    model, balancing = build(names)
    inputs = batch(names, size=7)
    result = step(model, balancing, inputs)
    output, target = model(inputs), inputs["target"]
    for name in names:
        parameters = list(model.encoders[name].parameters())
        joint = gradients(model.loss(output.logits, target), parameters)
        alone = gradients(model.loss(output.unimodal_logits[name], target), parameters)
        expected = pareto([flatten(g) for g in joint], [flatten(g) for g in alone], 1.5)
        for part, numbers in zip(("weight", "bias"), expected, strict=True):
            gradient = result[f"encoders.{name}.{part}"]
            torch.testing.assert_close(gradient.reshape(-1), doubles(*numbers), **EXACT)


def test_heads_and_fusion_use_the_summed_gradient():
    model, balancing = build()
    result, plain = step(model, balancing, batch()), step(model, eq.BalancerList(model), batch())
    others = [name for name in plain if not name.startswith("encoders")]
    assert others
    assert all(torch.equal(result[name], plain[name]) for name in others)
    assert not any(torch.equal(result[name], plain[name]) for name in plain if name.startswith("encoders"))


@pytest.mark.parametrize("fusion", [eq.fusion.Concat, eq.fusion.Sum])
def test_decomposable_logits_need_no_heads(fusion):
    model, balancing = build(fusion=fusion(DIM), unimodal="none")
    inputs = batch()
    result = step(model, balancing, inputs)
    output = model(inputs)
    parts = model.contributions(output)
    joint = gradients(model.loss(output.logits, inputs["target"]), model.encoders["audio"].parameters())
    alone = gradients(model.loss(parts["audio"], inputs["target"]), model.encoders["audio"].parameters())
    torch.testing.assert_close(result["encoders.audio.weight"], pareto_gradient(joint, alone, gamma=1.5)[0], **EXACT)
    total = model.loss(output.logits, inputs["target"]) + sum(model.loss(p, inputs["target"]) for p in parts.values())
    names, parameters = zip(*model.head.named_parameters(), strict=True)
    for name, gradient in zip(names, gradients(total, parameters), strict=True):
        torch.testing.assert_close(result[f"head.{name}"], gradient, **EXACT)


def test_accumulated_batches_equal_one_large_batch():
    full = batch(size=12)
    model, balancing = build()
    large, small = step(model, balancing, full), step(model, balancing, *split_batch(full, 5, 3, 4))
    for name in (n for n in large if n.startswith("encoders")):
        torch.testing.assert_close(small[name], large[name], **EXACT)


def test_samples_without_the_modality_are_excluded():
    model, balancing = build()
    full = batch(size=7, missing=("image",))
    here = full["mask"]["image"]
    result = step(model, balancing, full)
    output, target = model(full), full["target"]
    parameters = list(model.encoders["image"].parameters())
    joint = gradients(model.loss(output.logits, target), parameters)
    alone = gradients(model.loss(output.unimodal_logits["image"][here], target[here]), parameters)
    torch.testing.assert_close(result["encoders.image.weight"], pareto_gradient(joint, alone, gamma=1.5)[0], **EXACT)


def test_modality_missing_from_all_samples_gets_no_gradient():
    model, balancing = build(NAMES[:3])
    result = step(model, balancing, {**batch(NAMES[:3]), "text": None})
    assert "encoders.text.weight" not in result
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())


def test_frozen_encoder_is_excluded():
    model, balancing = build()
    model.encoders["audio"].requires_grad_(False)
    result = step(model, balancing, batch())
    assert "encoders.audio.weight" not in result
    assert "encoders.image.weight" in result


def test_detached_heads_raise():
    model, balancing = build()
    inputs = batch()
    expected = model.loss(model(inputs).logits, inputs["target"]) + model.unimodal_loss(model(inputs), inputs["target"])
    with torch.no_grad():
        looked_at = balancing.loss(model(inputs), inputs["target"])
    torch.testing.assert_close(looked_at, expected.detach(), **EXACT)
    model.encoders.requires_grad_(False)
    result = step(model, balancing, inputs)
    assert result
    assert not any(name.startswith("encoders") for name in result)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_all_tasks(task):
    model, balancing = build(task=task)
    inputs = batch()
    inputs["target"] = torch.nn.functional.one_hot(inputs["target"], 3).double()
    result = step(model, balancing, inputs)
    plain = step(model, eq.BalancerList(model), inputs)
    assert not torch.equal(result["encoders.audio.weight"], plain["encoders.audio.weight"])
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())


def test_autocast():
    model, balancing = build(dtype=torch.float32)
    inputs = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = balancing.loss(model(inputs), inputs["target"])
    loss.backward()
    balancing.before_step()
    exact = step(model, balancing, inputs)
    gradient = model.encoders["audio"].weight.grad
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, exact["encoders.audio.weight"], **TOL[torch.bfloat16])


def test_errors():
    with pytest.raises(ConfigError, match=r"MMPareto: expected two or more modalities, got audio"):
        eq.balance.MMPareto(attention_model(("audio",)))
    with pytest.raises(ConfigError, match=r"MMPareto: expected gamma > 0, got gamma = 0"):
        eq.balance.MMPareto(attention_model(), gamma=0)
    model, balancing = build(unimodal="probe")
    with pytest.raises(ConfigError, match=r"MMPareto: expected logits that are a sum .* unimodal='probe'"):
        step(model, balancing, batch())
    balancer, output = eq.balance.MMPareto(model), model(batch()).with_(logits=None)
    with pytest.raises(ConfigError, match="expected an output with logits, got logits = None"):
        balancer.penalty(output, batch()["target"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_gradients_cancel(dtype):
    for joint, alone in ([20.0], [-40.0]), ([0.3, 0.7, -0.1], [-0.9, -2.1, 0.3]):
        result = pareto_gradient([torch.tensor(joint, dtype=dtype)], [torch.tensor(alone, dtype=dtype)], gamma=1.5)
        assert flatten(result[0]) == [0.0] * len(joint)
