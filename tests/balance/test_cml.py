"""CML against its equations: chains of removals, the hinge of every sample, any fusion, every task, errors."""

import math

import pytest
import torch

import equipoise as eq
from equipoise.balance.cml import confidence, confidence_rise
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, assert_like_single_precision, batch_for, penalty_of, to_lists
from helpers.tolerance import TOL
from oracles.balance_b import cml, softmax

EXACT = TOL[torch.float64]
FUSIONS = {
    "concat": lambda: eq.fusion.Concat(DIM),
    "sum": lambda: eq.fusion.Sum(DIM),
    "joint": lambda: eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, cls_std=1.0),
    "film": lambda: eq.fusion.FiLM(DIM),
}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def removal_chain(model, inputs, order):
    """Logits after each removal, with the removed modalities as inputs that are not there."""
    left, chain = dict(inputs), [to_lists(model(inputs).logits)]
    for name in order[:-1]:
        left[name] = None
        chain.append(to_lists(model(left).logits))
    return chain


def test_hinge_is_applied_per_sample():
    # The sum over the batch falls, and yet one sample rises.
    assert float(confidence_rise([doubles(0.6, 0.9), doubles(0.8, 0.5)])) == pytest.approx(0.1)
    assert float(confidence_rise([doubles(0.6, 0.9), doubles(0.5, 0.9), doubles(0.7, 1.0)])) == pytest.approx(0.15)


def test_confidence_of_every_task():
    logits = doubles([1.0, -2.0, 0.0])
    target = doubles([1.0, 1.0, 0.0])
    assert float(confidence(logits, target, "classification")) == pytest.approx(max(softmax([1, -2, 0])))
    sure = [1 / (1 + math.exp(-size)) for size in (1, 2, 0)]
    assert float(confidence(logits, target, "multilabel")) == pytest.approx(sum(sure) / 3)
    assert float(confidence(logits, target, "regression")) == pytest.approx(math.exp(-9 / 3))


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_loss_equals_the_oracle(fusion, number):
    names = NAMES[:number]
    model, inputs = attention_model(names, fusion=FUSIONS[fusion]()), batch(names, size=11)
    balancer = eq.balance.CML(model, strength=3.0)
    chain = removal_chain(model, inputs, balancer.order())
    expected = cml(chain, to_lists(inputs["target"]), 3.0)
    assert expected > cml(chain, to_lists(inputs["target"]), 0.0)
    assert float(penalty_of(balancer, model, inputs)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fusion", [eq.fusion.Concat, eq.fusion.Sum])
def test_removal_omits_the_modality_from_the_sum(fusion):
    model, inputs = additive_model(fusion=fusion(DIM)), batch(size=7)
    output = model(inputs)
    parts = model.contributions(output)
    biases = model.contributions(output.with_(features=torch.zeros_like(output.features)))
    order = eq.balance.CML(model).order()
    left = output.logits - parts[order[0]] + biases[order[0]]
    torch.testing.assert_close(doubles(*removal_chain(model, inputs, order)[1]), left.detach(), **EXACT)


def test_replaces_task_loss_and_trains_every_encoder():
    model, inputs = additive_model(NAMES[:3], unimodal="probe"), batch(NAMES[:3], size=7)
    balancer = eq.balance.CML(model)
    result = step(model, eq.BalancerList(model, [balancer]), inputs)
    model.zero_grad()
    (
        balancer.penalty(model(inputs), inputs["target"]) + model.unimodal_loss(model(inputs), inputs["target"])
    ).backward()
    assert all(torch.equal(result[name], p.grad) for name, p in model.named_parameters())
    assert all(float(model.encoders[name].weight.grad.abs().sum()) > 0 for name in model.names)


def test_removal_orders_are_drawn_once_per_epoch():
    model = additive_model(NAMES)

    def orders(seed, epochs=8):
        balancer = eq.balance.CML(model, seed=seed)
        return [(balancer.order(), balancer.order(), balancer.end_epoch())[:2] for _ in range(epochs)]

    state = torch.get_rng_state()
    first = orders(0)
    assert all(sorted(one) == sorted(NAMES) and one == again for one, again in first)
    assert len({tuple(one) for one, _ in first}) > 4
    assert orders(0) == first != orders(1)
    assert torch.equal(torch.get_rng_state(), state)
    resumed = eq.balance.CML(model)
    resumed.load_state_dict({"epochs": torch.tensor(5)})
    assert resumed.order() == first[5][0]


@pytest.mark.parametrize("include_cls_key", [True, False])
def test_removing_a_missing_modality_keeps_the_logits(include_cls_key):
    fusion = eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, include_cls_key=include_cls_key)
    model, inputs = attention_model(fusion=fusion), batch(size=11, missing=("audio", "image"))
    balancer = eq.balance.CML(model, strength=3.0)
    gone = balancer.order()[0]
    both = inputs["mask"]["audio"] & inputs["mask"]["image"]
    assert 0 < int(both.sum()) < 11
    full, fewer = removal_chain(model, inputs, balancer.order())
    chain = [full, [b if ok else a for a, b, ok in zip(full, fewer, to_lists(both), strict=True)]]
    expected = cml(chain, to_lists(inputs["target"]), 3.0)
    assert float(penalty_of(balancer, model, inputs)) == pytest.approx(expected, rel=1e-9)
    result = step(model, eq.BalancerList(model, [balancer]), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())
    absent = {**batch(size=7), gone: None}
    task = model.loss(model(absent).logits, absent["target"]).detach()
    torch.testing.assert_close(penalty_of(balancer, model, absent), task, **EXACT)


@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_accumulated_batches_equal_one_large_batch(missing):
    full = batch(size=12, missing=missing)
    model = additive_model(unimodal="probe")
    balancing = eq.BalancerList(model, [eq.balance.CML(model)])
    large, small = step(model, balancing, full), step(model, balancing, *split_batch(full, 5, 3, 4))
    for name in (n for n in large if not n.startswith("unimodal")):
        torch.testing.assert_close(small[name], large[name], **EXACT)


@pytest.mark.parametrize("task", TASKS)
def test_all_tasks(task):
    model, inputs = attention_model(task=task), batch_for(task, size=11)
    gentle, strict = (
        step(model, eq.BalancerList(model, [eq.balance.CML(model, strength=s)]), inputs) for s in (0.0, 1.0)
    )
    assert not torch.equal(gentle["encoders.audio.weight"], strict["encoders.audio.weight"])
    assert all(bool(gradient.isfinite().all()) for gradient in strict.values())


def test_autocast():
    model, inputs = attention_model(dtype=torch.float32), batch(dtype=torch.float32)
    balancer = eq.balance.CML(model)
    assert_like_single_precision(balancer, model, inputs)


def test_errors():
    with pytest.raises(ConfigError, match="CML: expected two or more modalities, got audio"):
        eq.balance.CML(attention_model(("audio",)))
    with pytest.raises(ConfigError, match=r"CML: expected strength >= 0, got strength = -0\.1"):
        eq.balance.CML(attention_model(), strength=-0.1)
    model = attention_model()
    with pytest.raises(ConfigError, match="CML: expected an output with logits, got logits = None"):
        eq.balance.CML(model).penalty(model(batch()).with_(logits=None), batch()["target"])
