"""CGGM against its equations: terms, gradients of heads, direction loss, whole steps, tasks, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.cggm import balance_terms, head_gradient
from equipoise.balance.common.unimodal_scores import correctness
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, slices
from helpers.steps import flat, fused, step
from helpers.tasks import TASKS, batch_for, static
from helpers.tolerance import TOL
from oracles.balance_d import cggm_terms, cosine

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def attached(names=("audio", "image"), *, unimodal="probe", fusion=None, task="classification", **options):
    made = fused(names, fusion=fusion or eq.fusion.Concat(DIM), unimodal=unimodal, task=task)
    balancer = eq.balance.CGGM(made, **options)
    return made, balancer, eq.BalancerList(made, [balancer])


@quick
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=5))
def test_terms_equal_the_oracle(progress):
    found = balance_terms(doubles(progress)).tolist()
    number = len(progress)
    still = abs(float(doubles(progress).sum())) <= torch.finfo(torch.float32).eps
    expected = [(number - 1) / number] * number if still else cggm_terms(progress)
    assert found == pytest.approx(expected)
    assert all(0 <= value <= 1 for value in found)


def test_the_modality_with_most_progress_gets_the_smallest_factor():
    assert balance_terms(doubles([0.3, 0.1, 0.0])).tolist() == pytest.approx([0.25, 0.75, 1.0])
    assert sum(balance_terms(doubles([0.3, 0.1, 0.2])).tolist()) == pytest.approx(2)


@pytest.mark.parametrize("task", TASKS)
def test_the_closed_form_of_a_heads_gradient_equals_autograd(task):
    made = static(task=task)
    inputs = batch_for(task, size=7)
    output = made(inputs)
    present = torch.ones(7, dtype=torch.bool)
    (weight,) = torch.autograd.grad(made.loss(output.logits, inputs["target"]), made.head.weight, create_graph=True)
    found = head_gradient(output.features, output.logits, inputs["target"], task, present)
    torch.testing.assert_close(found, weight, **EXACT)
    # It is differentiated like the gradient itself.
    for parameter in (made.head.weight, made.encoders["audio"].weight):
        (one,), (other,) = (
            torch.autograd.grad(value.square().sum(), parameter, retain_graph=True) for value in (found, weight)
        )
        torch.testing.assert_close(one, other, **EXACT)


def by_hand(made, inputs, terms, strength):
    """Returns the direction loss, from gradients by autograd."""
    output, names = made(inputs), made.names
    target, parts = inputs["target"], []
    (joint,) = torch.autograd.grad(made.loss(output.logits, target), made.head.weight, create_graph=True)
    for m, name in enumerate(names):
        here = inputs.get("mask", {}).get(name, torch.ones(len(target), dtype=torch.bool))
        loss = made.sample_losses(output.unimodal_logits[name], target)[here].mean()
        (own,) = torch.autograd.grad(loss, made.unimodal_heads[name].weight, retain_graph=True)
        block = joint if joint.shape == own.shape else joint.chunk(len(names), dim=1)[m]
        parts.append(abs(terms[m]) - terms[m] * cosine(flat(own), flat(block)))
    return strength * sum(parts) / len(parts)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fusion", ["concat", "joint"])
@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_the_direction_loss_equals_the_oracle(task, fusion, missing):
    kinds = {"concat": None, "joint": eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, cls_std=1.0)}
    names = NAMES[:3]
    made, balancer, _ = attached(names, fusion=kinds[fusion], task=task, strength=0.7)
    inputs = batch_for(task, names, size=7, missing=missing)
    found = balancer.penalty(made.train()(inputs), inputs["target"])
    assert float(found.detach()) == pytest.approx(by_hand(made, inputs, [2 / 3] * 3, 0.7))


def test_the_direction_loss_does_not_train_the_classifiers():
    made, balancer, _ = attached()
    inputs = batch(size=7)
    loss = balancer.penalty(made.train()(inputs), inputs["target"])
    heads = list(made.unimodal_heads.parameters())
    assert all(g is None for g in torch.autograd.grad(loss, heads, allow_unused=True, retain_graph=True))
    assert torch.autograd.grad(loss, made.encoders["audio"].weight)[0].any()


def test_steps_scale_by_the_progress_since_the_last_step():
    names = NAMES[:3]
    made, balancer, balancing = attached(names, strength=0.0, rho=1.5)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    before, factors = [0.0] * 3, []
    for seed in range(4):
        inputs = batch(names, size=16, seed=seed)
        plain = step(made, eq.BalancerList(made), inputs)
        output = made(inputs)
        now = [
            float(correctness(output.unimodal_logits[n].detach(), inputs["target"], "classification").mean())
            for n in names
        ]
        progress = [a - b for a, b in zip(now, before, strict=True)]
        terms = cggm_terms(progress) if abs(sum(progress)) > 1e-6 else [2 / 3] * 3
        found = step(made, eq.BalancerList(made, [balancer]), inputs)
        for name, term in zip(names, terms, strict=True):
            key = f"encoders.{name}"
            torch.testing.assert_close(found[f"{key}.weight"], 1.5 * term * plain[f"{key}.weight"], **EXACT)
            torch.testing.assert_close(found[f"{key}.bias"], plain[f"{key}.bias"], **EXACT)
        torch.testing.assert_close(found["head.weight"], plain["head.weight"], **EXACT)
        factors.append([1.5 * term for term in terms])
        before = now
        optimizer.step()
    expected = {f"scale/{n}": sum(f[m] for f in factors) / 4 for m, n in enumerate(names)}
    assert balancing.end_epoch() == pytest.approx(expected)


def test_the_term_of_the_last_step_is_used_in_the_loss():
    made, balancer, balancing = attached(strength=0.7)
    step(made, balancing, batch(size=16))
    inputs = batch(size=7, seed=1)
    terms = balancer.terms.tolist()
    found = balancer.penalty(made.train()(inputs), inputs["target"])
    assert float(found.detach()) == pytest.approx(by_hand(made, inputs, terms, 0.7))


def test_accumulated_batches_are_scaled_as_one_large_batch():
    made, balancer, _ = attached(strength=0.0)
    whole, found = batch(size=12), []
    for parts in ((whole,), slices(whole, 5, 3, 4)):
        balancer = eq.balance.CGGM(made, strength=0.0)
        found.append(step(made, eq.BalancerList(made, [balancer]), *parts))
    for key in ("encoders.audio.weight", "encoders.image.weight"):
        torch.testing.assert_close(found[1][key], found[0][key], **EXACT)


def test_a_modality_without_samples_makes_no_progress():
    made, balancer, balancing = attached(NAMES[:3])
    step(made, balancing, batch(NAMES[:3], size=7))
    score = balancer.scores.clone()
    step(made, balancing, {**batch(NAMES[:3], size=7, seed=1), "text": None})
    assert balancer.scores[2] == score[2]
    assert bool(balancer.terms.isfinite().all())


def test_errors():
    for wrong in ({"rho": 0.0}, {"rho": float("nan")}, {"strength": -1.0}):
        with pytest.raises(ConfigError, match="CGGM: expected a finite rho > 0 and strength >= 0, got rho = "):
            eq.balance.CGGM(static(), **wrong)
    with pytest.raises(ConfigError, match=r"CGGM: expected unimodal heads, .* unimodal='none'.*Use unimodal='probe'"):
        eq.balance.CGGM(static(unimodal="none"))
    made = fused(fusion=eq.fusion.MulT(DIM, heads=2), unimodal="probe")
    if made.fusion.out_dim not in (DIM, 2 * DIM):
        with pytest.raises(ConfigError, match="CGGM: expected features of width"):
            step(made, eq.BalancerList(made, [eq.balance.CGGM(made)]), batch())
    readout = eq.fusion.MulT(DIM, heads=2, readout="attention", dropout=0.0)
    made = fused(fusion=readout, unimodal="probe")
    with pytest.raises(ConfigError, match=r"CGGM: expected features of width 12, .* Use CGGM\(model, strength=0\)"):
        step(made, eq.BalancerList(made, [eq.balance.CGGM(made)]), batch())
    step(made, eq.BalancerList(made, [eq.balance.CGGM(made, strength=0.0)]), batch())
