"""Greedy against its equations: speeds, the decision, held gates, attributes of the fusion, resumption, errors."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.greedy import bypass_lead, learning_speed
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model, flatten, step
from helpers.tolerance import TOL
from oracles.balance_c import bypass_lead as slow_lead
from oracles.balance_c import learning_speed as slow_speed

EXACT = TOL[torch.float64]
speeds = st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=2, max_size=5)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def build(names=("audio", "image"), *, fusion=None, seed=0, unimodal="train", dtype=torch.float64, **options):
    model = attention_model(names, fusion=fusion, seed=seed, unimodal=unimodal, dtype=dtype)
    balancer = eq.balance.Greedy(model, **options)
    return model, balancer, eq.BalancerList(model, [balancer])


def expected_gates(model, inputs):
    """(batch, modality, dim) by the formula, from the parameters alone."""
    gate = model.fusion.gate
    pooled = torch.cat([tokens.pooled() for tokens in model.encode(inputs).values()], dim=1)
    squeezed = torch.clamp(pooled @ gate.squeeze.weight.T + gate.squeeze.bias, min=0)
    parts = [gate.excite[name] for name in model.names]
    return torch.stack([2 / (1 + torch.exp(-(squeezed @ e.weight.T + e.bias))) for e in parts], dim=1).detach()


def test_speed_of_two_parameters():
    one, other = (torch.nn.Parameter(doubles(*values)) for values in ((3, 4), (12,)))
    one.grad, other.grad = doubles(0, 13), None
    # 169 over 9 + 16 + 144.
    assert float(learning_speed([one, other])) == pytest.approx(1.0)
    assert slow_speed([[0, 13]], [[3, 4], [12]]) == 1.0


def test_speed_difference_of_two_modalities():
    rate, lead = bypass_lead(doubles(1, 10), doubles(100, 10))
    torch.testing.assert_close(rate, doubles(2, 0), **EXACT)
    torch.testing.assert_close(lead, doubles(2, -2), **EXACT)


@settings(max_examples=25, deadline=None)
@given(speeds)
def test_speed_difference_equals_the_oracle(pairs):
    main, bypass = torch.tensor(pairs, dtype=torch.float64).T
    for result, expected in zip(bypass_lead(main, bypass), slow_lead(pairs), strict=True):
        assert result.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_zero_speeds_give_zero_difference():
    rate, lead = bypass_lead(doubles(0, 0), doubles(0, 0))
    assert rate.tolist() == lead.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("number", [2, 3])
def test_token_gates_depend_on_all_modalities(number):
    names = NAMES[:number]
    model, _, _ = build(names)
    inputs = batch(names, missing=("audio",))
    encoded, factors = model.encode(inputs), expected_gates(model, inputs)
    changed = {
        name: eq.Tokens(tokens.values * factors[:, index, None], mask=tokens.mask)
        for index, (name, tokens) in enumerate(encoded.items())
    }
    expected = model.fusion.inner(changed).features
    result = model.eval()(inputs)
    torch.testing.assert_close(result.features, expected, **EXACT)
    torch.testing.assert_close(result.tokens["image"].values, encoded["image"].values, **EXACT)


def test_speeds_add_up_over_steps():
    model, balancer, balancing = build(threshold=math.inf)
    expected = {"main": [0.0, 0.0], "bypass": [0.0, 0.0]}
    for seed in range(3):
        step(model, balancing, batch(seed=seed))
        for kind, modules in (("main", model.encoders), ("bypass", model.fusion.gate.excite)):
            for index, name in enumerate(model.names):
                group = list(modules[name].parameters())
                expected[kind][index] += slow_speed([flatten(p.grad) for p in group], [flatten(p) for p in group])
    assert balancer.main.tolist() == pytest.approx(expected["main"], rel=1e-10)
    assert balancer.bypass.tolist() == pytest.approx(expected["bypass"], rel=1e-10)
    rates, _ = slow_lead(list(zip(expected["main"], expected["bypass"], strict=True)))
    log = balancer.end_epoch()
    assert [log["bdr/audio"], log["bdr/image"]] == pytest.approx(rates)
    assert log["held/audio"] == log["held/image"] == 0.0


def test_leading_gate_is_frozen_for_the_window_then_released():
    model, balancer, balancing = build(window=3, threshold=0.0)
    balancer.bypass.copy_(doubles(0, 1e6))
    held = []
    for seed in range(9):
        step(model, balancing, batch(seed=seed))
        held.append(model.fusion.gate.held.tolist())
    image, none = [False, True], [False, False]
    assert held == [image, image, image, none, image, image, image, none, image]
    assert balancer.end_epoch()["held/image"] == 6.0
    assert balancer.end_epoch()["held/image"] == 0.0


def test_small_difference_freezes_no_gate():
    model, balancer, balancing = build(threshold=50.0)
    balancer.bypass.copy_(doubles(0, 1e6))
    step(model, balancing, batch())
    assert not bool(model.fusion.gate.held.any())


def test_frozen_gate_is_its_detached_running_mean():
    model, balancer, balancing = build(threshold=0.0)
    balancer.bypass.copy_(doubles(1e6, 0))
    seen = [batch(seed=1, size=5), batch(seed=2, size=3, missing=("audio",))]
    for inputs in seen:
        step(model, balancing, inputs)
    here = seen[1]["mask"]["audio"]
    audio = torch.cat([expected_gates(model, seen[0])[:, 0], expected_gates(model, seen[1])[here, 0]])
    torch.testing.assert_close(model.fusion.gate.mean[0], audio.mean(dim=0), **EXACT)
    inputs = batch(seed=3)
    mean, factors, encoded = model.fusion.gate.mean[0].clone(), expected_gates(model, inputs), model.encode(inputs)
    output = model.train()(inputs)
    values = {"audio": encoded["audio"].values * mean, "image": encoded["image"].values * factors[:, 1, None]}
    expected = model.fusion.inner({name: eq.Tokens(value) for name, value in values.items()}).features
    torch.testing.assert_close(output.features, expected, **EXACT)
    result = step(model, balancing, inputs)
    assert float(result["fusion.gate.excite.audio.weight"].abs().max()) == 0.0
    assert float(result["fusion.gate.excite.image.weight"].abs().max()) > 0.0
    # Evaluation always uses the gates as they are.
    live = model.fusion.inner({n: eq.Tokens(encoded[n].values * factors[:, m, None]) for m, n in enumerate(encoded)})
    torch.testing.assert_close(model.eval()(inputs).features, live.features, **EXACT)


def test_accumulated_batches_equal_one_large_batch():
    full, result = batch(size=12), []
    for sizes in ((12,), (5, 4, 3)):
        model, balancer, balancing = build()
        step(model, balancing, *split_batch(full, *sizes))
        result.append([balancer.main, balancer.bypass, model.fusion.gate.mean])
    for one, other in zip(*result, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_resumed_training_equals_uninterrupted_training():
    model, balancer, balancing = build(window=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(model, balancing, optimizer, seeds):
        for seed in seeds:
            step(model, balancing, batch(seed=seed))
            optimizer.step()
        return balancing.end_epoch(), model.state_dict()

    train(model, balancing, optimizer, range(2))
    fresh, other, rebalancing = build(window=2, seed=9)
    for part, state in ((fresh, model.state_dict()), (other, balancer.state_dict())):
        part.load_state_dict(copy.deepcopy(state))
    straight = train(model, balancing, optimizer, range(2, 5))
    resumed = train(fresh, rebalancing, torch.optim.SGD(fresh.parameters(), lr=0.1), range(2, 5))
    assert resumed[0] == straight[0]
    assert sum(value for name, value in straight[0].items() if name.startswith("held")) > 0
    assert all(torch.equal(resumed[1][name], value) for name, value in straight[1].items())


def test_gated_fusion_forwards_inner_attributes():
    model, _, _ = build(fusion=eq.fusion.JointAttention(DIM, depth=2))
    assert model.fusion.attention is model.fusion.inner.blocks[1].attention
    model.fusion.use_depth(1)
    assert model.fusion.attention is model.fusion.inner.blocks[0].attention
    eq.balance.RollingQ(model.fusion.attention)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.fusion.nothing


def test_concat_logit_contributions_sum_to_logits():
    model, _, _ = build(fusion=eq.fusion.Concat(DIM))
    output = model(batch())
    torch.testing.assert_close(sum(model.contributions(output).values()), output.logits, **EXACT)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_are_independent(twin):
    model, _, _ = build()
    other = twin(model)
    assert torch.equal(other(batch()).logits, model(batch()).logits)
    other.encoders.audio.weight.data.zero_()
    assert not torch.equal(other(batch()).logits, model(batch()).logits)


def test_modality_missing_from_all_samples():
    model, balancer, balancing = build(NAMES[:3])
    result = step(model, balancing, {**batch(NAMES[:3]), "text": None})
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())
    assert all(math.isfinite(value) for value in balancer.end_epoch().values())
    assert model.fusion.gate.seen.tolist() == [5, 5, 0]


def test_autocast():
    model, balancer, balancing = build(dtype=torch.float32, threshold=0.0)
    for _ in range(2):
        inputs = batch(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = balancing.loss(model.train()(inputs), inputs["target"])
        loss.backward()
        balancing.before_step()
    assert bool(model.fusion.gate.mean.isfinite().all())
    assert all(math.isfinite(value) for value in balancer.end_epoch().values())


def test_errors():
    with pytest.raises(ConfigError, match="Greedy: expected two or more modalities, got audio"):
        eq.balance.Greedy(attention_model(("audio",)))
    for wrong in ({"window": 0}, {"threshold": -1.0}, {"ratio": 0.0}):
        with pytest.raises(ConfigError, match=r"Greedy: expected window >= 1, threshold >= 0 and ratio > 0"):
            eq.balance.Greedy(attention_model(), **wrong)
    model, _, _ = build()
    with pytest.raises(ConfigError, match="expected one Greedy for each model, got a second one"):
        eq.balance.Greedy(model)


def test_overflowing_gradients_do_not_change_speeds():
    parameter = torch.nn.Parameter(torch.ones(2))
    for value in (torch.inf, torch.nan):
        parameter.grad = torch.tensor([1.0, value])
        assert float(learning_speed([parameter])) == 0.0


@pytest.mark.parametrize("other", ["MLA", "ReconBoost"])
def test_incompatible_balancers_raise(other):
    model = attention_model(fusion=eq.fusion.Concat(DIM))
    first = getattr(eq.balance, other)(model)
    with pytest.raises(ConfigError, match=f"Greedy with {other}: it trains on vectors before the gates"):
        eq.BalancerList(model, [first, eq.balance.Greedy(model)])
