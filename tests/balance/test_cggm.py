"""CGGM against its equations: terms, gradients of heads, direction loss, whole steps, tasks, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.cggm import balance_terms, head_gradient
from equipoise.balance.common.unimodal_scores import correctness
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model, flatten, step
from helpers.tasks import TASKS, additive_model, batch_for
from helpers.tolerance import TOL
from oracles.balance_d import cggm_terms, cosine

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def attached(names=("audio", "image"), *, unimodal="probe", fusion=None, task="classification", **options):
    model = attention_model(names, fusion=fusion or eq.fusion.Concat(DIM), unimodal=unimodal, task=task)
    balancer = eq.balance.CGGM(model, **options)
    return model, balancer, eq.BalancerList(model, [balancer])


@quick
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=5))
def test_terms_equal_the_oracle(progress):
    result = balance_terms(doubles(progress)).tolist()
    number = len(progress)
    still = abs(float(doubles(progress).sum())) <= torch.finfo(torch.float32).eps
    expected = [(number - 1) / number] * number if still else cggm_terms(progress)
    assert result == pytest.approx(expected)
    assert all(0 <= value <= 1 for value in result)


def test_the_modality_with_most_progress_gets_the_smallest_factor():
    assert balance_terms(doubles([0.3, 0.1, 0.0])).tolist() == pytest.approx([0.25, 0.75, 1.0])
    assert sum(balance_terms(doubles([0.3, 0.1, 0.2])).tolist()) == pytest.approx(2)


@pytest.mark.parametrize("task", TASKS)
def test_the_closed_form_of_a_heads_gradient_equals_autograd(task):
    model = additive_model(task=task)
    inputs = batch_for(task, size=7)
    output = model(inputs)
    present = torch.ones(7, dtype=torch.bool)
    (weight,) = torch.autograd.grad(model.loss(output.logits, inputs["target"]), model.head.weight, create_graph=True)
    result = head_gradient(output.features, output.logits, inputs["target"], task, present)
    torch.testing.assert_close(result, weight, **EXACT)
    # It is differentiated like the gradient itself.
    for parameter in (model.head.weight, model.encoders["audio"].weight):
        (one,), (other,) = (
            torch.autograd.grad(value.square().sum(), parameter, retain_graph=True) for value in (result, weight)
        )
        torch.testing.assert_close(one, other, **EXACT)


def by_hand(model, inputs, terms, strength):
    """Returns the direction loss, from gradients by autograd."""
    output, names = model(inputs), model.names
    target, parts = inputs["target"], []
    (joint,) = torch.autograd.grad(model.loss(output.logits, target), model.head.weight, create_graph=True)
    for m, name in enumerate(names):
        here = inputs.get("mask", {}).get(name, torch.ones(len(target), dtype=torch.bool))
        loss = model.sample_losses(output.unimodal_logits[name], target)[here].mean()
        (own,) = torch.autograd.grad(loss, model.unimodal_heads[name].weight, retain_graph=True)
        block = joint if joint.shape == own.shape else joint.chunk(len(names), dim=1)[m]
        parts.append(abs(terms[m]) - terms[m] * cosine(flatten(own), flatten(block)))
    return strength * sum(parts) / len(parts)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fusion", ["concat", "joint"])
@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_the_direction_loss_equals_the_oracle(task, fusion, missing):
    kinds = {"concat": None, "joint": eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, cls_std=1.0)}
    names = NAMES[:3]
    result, balancer, _ = attached(names, fusion=kinds[fusion], task=task, strength=0.7)
    inputs = batch_for(task, names, size=7, missing=missing)
    actual = balancer.penalty(result.train()(inputs), inputs["target"])
    assert float(actual.detach()) == pytest.approx(by_hand(result, inputs, [2 / 3] * 3, 0.7))


def test_the_direction_loss_does_not_train_the_classifiers():
    result, balancer, _ = attached()
    inputs = batch(size=7)
    loss = balancer.penalty(result.train()(inputs), inputs["target"])
    heads = list(result.unimodal_heads.parameters())
    assert all(g is None for g in torch.autograd.grad(loss, heads, allow_unused=True, retain_graph=True))
    assert torch.autograd.grad(loss, result.encoders["audio"].weight)[0].any()


def test_steps_scale_by_the_progress_since_the_last_step():
    names = NAMES[:3]
    result, balancer, balancing = attached(names, strength=0.0, rho=1.5)
    optimizer = torch.optim.SGD(result.parameters(), lr=0.5)
    before, factors = [0.0] * 3, []
    for seed in range(4):
        inputs = batch(names, size=16, seed=seed)
        plain = step(result, eq.BalancerList(result), inputs)
        output = result(inputs)
        now = [
            float(correctness(output.unimodal_logits[n].detach(), inputs["target"], "classification").mean())
            for n in names
        ]
        progress = [a - b for a, b in zip(now, before, strict=True)]
        terms = cggm_terms(progress) if abs(sum(progress)) > 1e-6 else [2 / 3] * 3
        actual = step(result, eq.BalancerList(result, [balancer]), inputs)
        for name, term in zip(names, terms, strict=True):
            key = f"encoders.{name}"
            torch.testing.assert_close(actual[f"{key}.weight"], 1.5 * term * plain[f"{key}.weight"], **EXACT)
            torch.testing.assert_close(actual[f"{key}.bias"], plain[f"{key}.bias"], **EXACT)
        torch.testing.assert_close(actual["head.weight"], plain["head.weight"], **EXACT)
        factors.append([1.5 * term for term in terms])
        before = now
        optimizer.step()
    expected = {f"scale/{n}": sum(f[m] for f in factors) / 4 for m, n in enumerate(names)}
    assert balancing.end_epoch() == pytest.approx(expected)


def test_the_term_of_the_last_step_is_used_in_the_loss():
    result, balancer, balancing = attached(strength=0.7)
    step(result, balancing, batch(size=16))
    inputs = batch(size=7, seed=1)
    terms = balancer.terms.tolist()
    actual = balancer.penalty(result.train()(inputs), inputs["target"])
    assert float(actual.detach()) == pytest.approx(by_hand(result, inputs, terms, 0.7))


def test_accumulated_batches_are_scaled_as_one_large_batch():
    result, balancer, _ = attached(strength=0.0)
    full, actual = batch(size=12), []
    for parts in ((full,), split_batch(full, 5, 3, 4)):
        balancer = eq.balance.CGGM(result, strength=0.0)
        actual.append(step(result, eq.BalancerList(result, [balancer]), *parts))
    for key in ("encoders.audio.weight", "encoders.image.weight"):
        torch.testing.assert_close(actual[1][key], actual[0][key], **EXACT)


def test_a_modality_without_samples_makes_no_progress():
    result, balancer, balancing = attached(NAMES[:3])
    step(result, balancing, batch(NAMES[:3], size=7))
    score = balancer.scores.clone()
    step(result, balancing, {**batch(NAMES[:3], size=7, seed=1), "text": None})
    assert balancer.scores[2] == score[2]
    assert bool(balancer.terms.isfinite().all())


def test_errors():
    for wrong in ({"rho": 0.0}, {"rho": float("nan")}, {"strength": -1.0}):
        with pytest.raises(ConfigError, match="CGGM: expected a finite rho > 0 and strength >= 0, got rho = "):
            eq.balance.CGGM(additive_model(), **wrong)
    with pytest.raises(ConfigError, match=r"CGGM: expected unimodal heads, .* unimodal='none'.*Use unimodal='probe'"):
        eq.balance.CGGM(additive_model(unimodal="none"))
    model = attention_model(fusion=eq.fusion.MulT(DIM, heads=2), unimodal="probe")
    if model.fusion.out_dim not in (DIM, 2 * DIM):
        with pytest.raises(ConfigError, match="CGGM: expected features of width"):
            step(model, eq.BalancerList(model, [eq.balance.CGGM(model)]), batch())
    readout = eq.fusion.MulT(DIM, heads=2, readout="attention", dropout=0.0)
    model = attention_model(fusion=readout, unimodal="probe")
    with pytest.raises(ConfigError, match=r"CGGM: expected features of width 12, .* Use CGGM\(model, strength=0\)"):
        step(model, eq.BalancerList(model, [eq.balance.CGGM(model)]), batch())
    step(model, eq.BalancerList(model, [eq.balance.CGGM(model, strength=0.0)]), batch())
