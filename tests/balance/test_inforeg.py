"""InfoReg against its equations: growth of the trace, pull of the leading encoder, windows, resume, errors."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.inforeg import information_growth, restraint
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch
from helpers.steps import attention_model, step
from helpers.tasks import additive_model, to_lists
from helpers.tolerance import TOL
from oracles import balance_d
from oracles.plain import mean, softmax

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def attached(names=("audio", "image"), **options):
    model = additive_model(names, unimodal="none")
    balancer = eq.balance.InfoReg(model, **options)
    return model, balancer, eq.BalancerList(model, [balancer])


@quick
@given(st.lists(st.floats(0.01, 9), min_size=1, max_size=25))
def test_growth_equals_the_oracle(values):
    traces = torch.zeros(11, 1, dtype=torch.float64)
    for value in values:
        traces = torch.cat([traces[1:], doubles([[value]])])
    assert float(information_growth(traces)) == pytest.approx(balance_d.growth(values), abs=1e-12)


def test_growth_is_one_before_the_first_epoch_and_at_its_end():
    assert information_growth(torch.zeros(11, 2)).tolist() == [1, 1]
    traces = torch.zeros(11, 1)
    traces[-1] = 3.0
    assert information_growth(traces).tolist() == [1]


@quick
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.floats(0.1, 2), st.randoms(use_true_random=False))
def test_restraint_equals_the_oracle(scores, strength, random):
    rates = [random.uniform(-0.1, 0.2) for _ in scores]
    result = restraint(doubles(scores), doubles(rates), strength=strength, threshold=0.05)
    expected = balance_d.restraint(scores, rates, strength, 0.05)
    for value, other, score in zip(result.tolist(), expected, scores, strict=True):
        # At a gap of 0 but for rounding, either side of the jump is right.
        if abs(score - mean(scores)) > 1e-12:
            assert value == pytest.approx(other)


def test_a_modality_without_samples_is_neither_leading_nor_compared():
    result = restraint(doubles([0.6, 0.0, 0.3]), torch.ones(3), strength=1.0, threshold=0.0)
    assert result.tolist() == pytest.approx([math.exp(math.tanh(0.3)), 0.0, 0.0])


def slow_scores(model, inputs):
    parts = model.contributions(model(inputs)).values()
    return [mean(softmax(row)[y] for row, y in zip(to_lists(p), inputs["target"].tolist(), strict=True)) for p in parts]


@pytest.mark.parametrize("number", [2, 3])
def test_two_steps_equal_the_equations(number):
    """In the second step of an epoch the weights have left those at its start."""
    names = NAMES[:number]
    result, balancer, balancing = attached(names)
    start = copy.deepcopy(result.encoders.state_dict())
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    traces, restraints = dict.fromkeys(names, 0.0), []
    for seed in range(3):
        inputs = batch(names, size=7, seed=seed)
        output = result(inputs)
        loss = result.loss(output.logits, inputs["target"])
        loss = loss + sum(result.loss(part, inputs["target"]) for part in result.contributions(output).values())
        plain = torch.autograd.grad(loss, list(result.encoders.parameters()))
        beta = dict(
            zip(names, balance_d.restraint(slow_scores(result, inputs), [1.0] * number, 0.95, 0.05), strict=True)
        )
        restraints.append(beta)
        assert max(beta.values()) > 0
        actual = step(result, balancing, inputs)
        for (key, parameter), gradient in zip(result.encoders.named_parameters(), plain, strict=True):
            name = key.split(".")[0]
            pull = beta[name] * (parameter.detach() - start[key])
            torch.testing.assert_close(actual[f"encoders.{key}"], gradient + pull, **EXACT)
            if parameter.ndim == 2:
                traces[name] += float(gradient.square().mean())
        optimizer.step()
    log = balancing.end_epoch()
    for m, name in enumerate(names):
        assert float(balancer.traces[-1, m]) == pytest.approx(traces[name])
        assert log[f"restraint/{name}"] == pytest.approx(mean(beta[name] for beta in restraints))
        assert log[f"growth/{name}"] == 1.0


def test_the_start_of_the_next_epoch_is_where_the_last_one_ended():
    result, balancer, balancing = attached()
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    for _ in range(2):
        step(result, balancing, batch())
        before = [p.detach().clone() for p in result.encoders.parameters()]
        optimizer.step()
        balancing.end_epoch()
        starts = [balancer.get_buffer(f"start_{i}") for i in range(len(before))]
        assert all(torch.equal(a, b) for a, b in zip(starts, before, strict=True))
    # The last weights that were loaded count, not those of the constructor.
    with torch.no_grad():
        result.encoders["audio"].weight.add_(1.0)
    step(result, balancing, batch())
    assert torch.equal(balancer.get_buffer("start_0"), result.encoders["audio"].weight.detach())


def test_the_pull_ends_with_the_window():
    result, _, balancing = attached(threshold=0.5)
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    held = []
    for _ in range(4):
        for seed in range(2):
            step(result, balancing, batch(seed=seed))
            optimizer.step()
        log = balancing.end_epoch()
        held.append(log["restraint/audio"] + log["restraint/image"] > 0)
    # Growth is 1 in the first two epochs, then about 1/2, 1/3, ...
    assert held[:2] == [True, True]
    assert held[-1] is False


def test_resumes_in_the_middle_of_an_epoch():
    result, balancer, balancing = attached()
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    step(result, balancing, batch())
    optimizer.step()
    other = eq.balance.InfoReg(result)
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    expected = step(result, balancing, batch(seed=1))
    actual = step(result, eq.BalancerList(result, [other]), batch(seed=1))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_losses_of_unimodal_heads_are_counted_once():
    model = attention_model()
    balancing = eq.BalancerList(model, [eq.balance.InfoReg(model)])
    inputs = batch(size=7)
    output = model.train()(inputs)
    heads = sum(model.loss(logits, inputs["target"]) for logits in output.unimodal_logits.values())
    expected = model.loss(output.logits, inputs["target"]) + heads
    torch.testing.assert_close(balancing.loss(output, inputs["target"]), expected, **EXACT)


def test_errors():
    for wrong in ({"strength": 0.0}, {"strength": float("inf")}, {"threshold": -1.0}):
        with pytest.raises(ConfigError, match=r"InfoReg: expected a finite strength > 0 and threshold >= 0, got "):
            eq.balance.InfoReg(additive_model(), **wrong)
    with pytest.raises(ConfigError, match="InfoReg: expected two or more modalities, got audio"):
        eq.balance.InfoReg(additive_model(("audio",)))
    model = attention_model(unimodal="probe")
    with pytest.raises(ConfigError, match="InfoReg: expected logits that are a sum over modalities, or unimodal heads"):
        step(model, eq.BalancerList(model, [eq.balance.InfoReg(model)]), batch())
