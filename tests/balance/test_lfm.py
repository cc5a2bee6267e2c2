"""LFM against its equations: the divergence, the loss, how its weight is learned, every task, errors."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.lfm import divergence, hyper_gradient
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch, split_batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for, penalty_of, to_lists
from helpers.tolerance import TOL
from oracles.balance_b import jensen_shannon, lfm, softmax

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def trained_weight(model, balancer, *batches):
    step(model, eq.BalancerList(model, [balancer]), *batches)
    return float(balancer.a1)


def test_overflowing_step_changes_nothing():
    model, inputs = additive_model(), batch()
    balancer = eq.balance.LFM(model, a1=0.5, rate=1e-3)
    assert trained_weight(model, balancer, {**inputs, "audio": inputs["audio"] * 1e308}) == 0.5
    assert trained_weight(model, balancer, inputs) != 0.5


def test_worked_examples():
    same, far = doubles([0.3, -0.2, 0.7]), 200.0
    assert float(divergence(same, same, "classification")) == pytest.approx(0, abs=1e-15)
    # Opposite certainties: log 2, and no NaN out of the logarithm of 0.
    assert float(divergence(doubles([far, 0]), doubles([0, far]), "classification")) == pytest.approx(math.log(2))
    assert float(divergence(doubles([far, 0]), doubles([-far, 0]), "multilabel")) == pytest.approx(math.log(2) / 2)
    assert float(divergence(doubles([3.0, 1.0]), doubles([-1.0, 1.0]), "regression")) == pytest.approx(16 / 8 / 2)


@quick
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=3))
def test_divergence_equals_the_oracle_and_is_symmetric(pairs):
    one, other = (doubles(list(column)) for column in zip(*pairs, strict=True))
    result = float(divergence(one, other, "classification"))
    assert result == pytest.approx(jensen_shannon(softmax(to_lists(one)[0]), softmax(to_lists(other)[0])), abs=1e-12)
    assert result == pytest.approx(float(divergence(other, one, "classification")), abs=1e-12)
    assert -1e-12 <= result <= math.log(2) + 1e-12
    both = [[1 / (1 + math.exp(-x)) for x in pair] for pair in pairs]
    expected = sum(jensen_shannon([p, 1 - p], [q, 1 - q]) for p, q in both) / 3
    assert float(divergence(one, other, "multilabel")) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("kind", [additive_model, attention_model])
def test_loss_equals_the_oracle(kind, number):
    names = NAMES[:number]
    model, inputs = kind(names), batch(names, size=7)
    output = model(inputs)
    alone = model.contributions(output) or output.unimodal_logits
    expected = lfm(to_lists(output.logits), [to_lists(alone[name]) for name in names], to_lists(inputs["target"]), 0.3)
    assert float(penalty_of(eq.balance.LFM(model, a1=0.3), model, inputs)) == pytest.approx(expected, rel=1e-9)


def test_weight_follows_task_loss_after_a_gradient_step():
    model, inputs = additive_model(unimodal="probe"), batch(size=7)
    weights, small = copy.deepcopy(model.state_dict()), 1e-4

    def after(a1):
        model.load_state_dict(weights)
        model.zero_grad()
        balancer = eq.balance.LFM(model, a1=a1, schedule="fixed")
        balancer.penalty(model(inputs), inputs["target"]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= small * parameter.grad
            return float(model.loss(model(inputs).logits, inputs["target"]))

    slope = (after(1.0) - after(0.0)) / small
    assert abs(slope) > 0.01
    model.load_state_dict(weights)
    result = trained_weight(model, eq.balance.LFM(model, a1=0.5, rate=1e-3), inputs)
    assert result == pytest.approx(0.5 - 1e-3 * slope, abs=1e-3 * abs(slope) * 0.01)


def test_worked_hyper_gradient():
    assert float(hyper_gradient(doubles(1, 2), doubles(3, 0))) == 4
    assert float(hyper_gradient(doubles(1, 2), doubles(1, 2))) == 0


def test_rate_halves_every_twenty_epochs_and_weight_is_bounded():
    model, inputs = additive_model(), batch(size=7)
    changes = []
    for epochs in (0, 19, 20, 40):
        balancer = eq.balance.LFM(model, rate=1e-3)
        balancer.load_state_dict({**balancer.state_dict(), "epochs": torch.tensor(epochs)})
        changes.append(trained_weight(model, balancer, inputs) - 0.5)
    assert abs(changes[0]) > 1e-6
    assert changes[1:] == pytest.approx([changes[0], changes[0] / 2, changes[0] / 4])
    assert trained_weight(model, eq.balance.LFM(model, rate=1e9), inputs) in (0.05, 0.95)


def test_fixed_weight_does_not_change():
    model, inputs = additive_model(), batch(size=7)
    balancer = eq.balance.LFM(model, a1=0.99, schedule="fixed")
    assert trained_weight(model, balancer, inputs) == 0.99
    assert balancer.end_epoch() == {"a1": 0.99}


def test_accumulated_batches_equal_one_large_batch():
    full, model = batch(size=12), additive_model(unimodal="probe")
    result = []
    for parts in ((full,), split_batch(full, 5, 3, 4)):
        balancer = eq.balance.LFM(model, rate=1e-2)
        balancing = eq.BalancerList(model, [balancer])
        result.append((step(model, balancing, *parts), float(balancer.a1)))
    assert result[1][1] == pytest.approx(result[0][1], rel=1e-9)
    assert result[0][1] != 0.5
    for name in (n for n in result[0][0] if not n.startswith("unimodal")):
        torch.testing.assert_close(result[1][0][name], result[0][0][name], **EXACT)


def test_samples_without_a_modality_form_no_pair():
    model, full = additive_model(), batch(size=13, missing=("image",))
    here = full["mask"]["image"]
    output = model(full)
    parts = [to_lists(part[here]) for part in model.contributions(output).values()]
    task = lfm(to_lists(output.logits), parts, to_lists(full["target"]), 0.0)
    apart = lfm(to_lists(output.logits[here]), parts, to_lists(full["target"][here]), 1.0)
    expected = (task + apart) / 2
    assert float(penalty_of(eq.balance.LFM(model), model, full)) == pytest.approx(expected, rel=1e-9)
    gone = {**full, "image": None, "mask": {}}
    only = model.loss(model(gone).logits, gone["target"]).detach()
    torch.testing.assert_close(penalty_of(eq.balance.LFM(model), model, gone), only, **EXACT)


@pytest.mark.parametrize("task", TASKS)
def test_all_tasks(task):
    model, inputs = attention_model(task=task), batch_for(task, size=7)
    balancer = eq.balance.LFM(model, rate=1e-2)
    result = step(model, eq.BalancerList(model, [balancer]), inputs)
    assert float(balancer.a1) != 0.5
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())


def test_resume_from_saved_state():
    model, inputs = additive_model(), batch(size=7)
    balancer, other = eq.balance.LFM(model, rate=1e-2), eq.balance.LFM(model, rate=1e-2)
    trained_weight(model, balancer, inputs)
    balancer.end_epoch()
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    assert trained_weight(model, other, inputs) == trained_weight(model, balancer, inputs) != 0.5
    assert other.end_epoch() == balancer.end_epoch()


def test_autocast():
    model, inputs = attention_model(dtype=torch.float32), batch(dtype=torch.float32)
    balancer = eq.balance.LFM(model)
    exact = penalty_of(balancer, model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result = penalty_of(balancer, model, inputs)
    torch.testing.assert_close(result, exact, **TOL[torch.bfloat16])


def test_errors():
    with pytest.raises(ConfigError, match="LFM: expected two or more modalities, got audio"):
        eq.balance.LFM(attention_model(("audio",)))
    for wrong in ({"a1": 1.5}, {"rate": 0.0}, {"schedule": "random"}):
        with pytest.raises(ConfigError, match=f"LFM: expected 0 <= a1 <= 1, .* got .*{next(iter(wrong))} = "):
            eq.balance.LFM(attention_model(), **wrong)
    model = attention_model(unimodal="probe")
    with pytest.raises(ConfigError, match=r"LFM: expected logits that are a sum .* unimodal='probe'"):
        penalty_of(eq.balance.LFM(model), model, batch())
    with pytest.raises(ConfigError, match="LFM: expected an output with logits, got logits = None"):
        eq.balance.LFM(model).penalty(model(batch()).with_(logits=None), batch()["target"])


def test_loss_without_gradient():
    model = additive_model()
    balancer, inputs = eq.balance.LFM(model), batch()
    balancing = eq.BalancerList(model, [balancer])
    with torch.no_grad():
        looked = balancing.loss(model(inputs), inputs["target"])
    torch.testing.assert_close(looked, balancing.loss(model(inputs), inputs["target"]).detach(), **EXACT)
