"""Gradient blending against its equations: weights, the blended loss, both ways of estimating, resumption, errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.common.probe_training import evaluate_losses
from equipoise.balance.gradient_blending import blending_weights
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, split_batch
from helpers.steps import attention_model
from helpers.tolerance import TOL
from oracles.balance_c import blending

EXACT = TOL[torch.float64]
losses = st.lists(st.floats(0.01, 5.0), min_size=12, max_size=12)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def build(names=("audio", "image"), *, every=1, copies=False, epochs=None, floor=1e-3, seed=0, **options):
    model = attention_model(names, seed=seed, **options)
    balancer = eq.balance.GradientBlending(
        model, every=every, copies=copies, epochs=epochs, floor=floor, learning_rate=0.05
    )
    return model, balancer, eq.BalancerList(model, [balancer])


def mean_losses(model, inputs):
    """Each modality's own loss, and the multimodal one last."""
    output, target = model(inputs), inputs["target"]
    return [
        *(model.loss(output.unimodal_logits[name], target) for name in model.names),
        model.loss(output.logits, target),
    ]


def train_epoch(model, balancing, number, *, optimizer=None, steps=2):
    """One epoch of training, with review; returns the log."""
    train = [batch(model.names, seed=10 * number + step) for step in range(steps)]
    model.train()
    for inputs in train:
        model.zero_grad()
        balancing.loss(model(inputs), inputs["target"]).backward()
        balancing.before_step()
        if optimizer is not None:
            optimizer.step()
    balancing.review(train, [batch(model.names, size=7, seed=500)])
    return balancing.end_epoch()


def test_worked_example():
    # Gained 0.5 and 0.3, overfitted by 0.5 and 0.2: weights go as 0.5 / 0.25 and 0.3 / 0.04, that is 2 and 7.5.
    result = blending_weights(doubles([2, 2], [2, 2]), doubles([1, 1.5], [1.5, 1.7]))
    torch.testing.assert_close(result, doubles(2 / 9.5, 7.5 / 9.5), **EXACT)


def test_floor_limits_weight_of_losses_without_overfitting():
    start, end = doubles([1, 1], [1, 1]), doubles([0.5, 0.25], [0.5, 0.5])
    torch.testing.assert_close(blending_weights(start, end, floor=0.25), doubles(0.5, 0.5), **EXACT)
    assert float(blending_weights(start, end, floor=1e-3)[0]) > 0.99


def test_unchanged_losses_give_equal_weights():
    still = doubles([1, 2, 3], [4, 5, 6])
    torch.testing.assert_close(blending_weights(still, still), doubles(1 / 3, 1 / 3, 1 / 3), **EXACT)


@settings(max_examples=25, deadline=None)
@given(losses, st.floats(1e-3, 1.0))
def test_equals_the_oracle(numbers, floor):
    start, end = torch.tensor(numbers, dtype=torch.float64).reshape(2, 2, 3)
    pairs = [[(float(side[0, k]), float(side[1, k])) for k in range(3)] for side in (start, end)]
    result = blending_weights(start, end, floor=floor)
    assert result.tolist() == pytest.approx(blending(*pairs, floor), rel=1e-7, abs=1e-9)
    assert float(result.sum()) == pytest.approx(1.0)


def test_loss_is_the_weighted_sum():
    model, balancer, balancing = build(NAMES[:3])
    balancer.weights.copy_(doubles(0.1, 0.2, 0.3, 0.4))
    inputs = batch(NAMES[:3])
    expected = sum(w * loss for w, loss in zip((0.1, 0.2, 0.3, 0.4), mean_losses(model, inputs), strict=True))
    torch.testing.assert_close(balancing.loss(model(inputs), inputs["target"]), expected, **EXACT)


def test_detached_heads_are_still_trained():
    model, _, balancing = build(fusion=eq.fusion.Concat(DIM), unimodal="probe")
    inputs = batch()
    output = model(inputs)
    parts = model.contributions(output)
    own = [
        *(model.loss(part, inputs["target"]) for part in parts.values()),
        model.loss(output.logits, inputs["target"]),
    ]
    expected = sum(own) / 3 + model.unimodal_loss(output, inputs["target"])
    torch.testing.assert_close(balancing.loss(output, inputs["target"]), expected, **EXACT)


def test_weights_use_losses_of_the_current_model():
    model, _, balancing = build(every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    looks, logs = [], []
    for number in range(3):
        model.train()
        train = [batch(seed=10 * number + step, size=size) for step, size in enumerate((5, 3))]
        seen = []
        for inputs in train:
            optimizer.zero_grad()
            seen.append([float(loss.detach()) for loss in mean_losses(model, inputs)])
            balancing.loss(model(inputs), inputs["target"]).backward()
            balancing.before_step()
            optimizer.step()
        val = batch(size=7, seed=500)
        balancing.review(train, split_batch(val, 4, 3))
        with torch.no_grad():
            looks.append(
                [((5 * a + 3 * b) / 8, float(v)) for a, b, v in zip(*seen, mean_losses(model.eval(), val), strict=True)]
            )
        logs.append(list(balancing.end_epoch().values()))
    assert logs[0] == logs[1] == pytest.approx([1 / 3] * 3)
    assert logs[2] == pytest.approx(blending(looks[0], looks[2], 1e-3), rel=1e-9)
    assert max(logs[2]) - min(logs[2]) > 0.01


def test_each_copy_is_trained_for_one_loss():
    model, balancer, _ = build(copies=True, every=2)
    train, val = [batch(seed=1), batch(seed=2)], [batch(seed=3, size=7)]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    balancer.review(train, val)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    start, end = [], []
    for kind in range(3):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05)
        pairs = []
        for moment in range(2):
            with torch.no_grad():
                at = [sum(float(mean_losses(twin, b)[kind]) for b in part) / len(part) for part in (train, val)]
            pairs.append(tuple(at))
            for inputs in train * 2 if moment == 0 else ():
                optimizer.zero_grad()
                mean_losses(twin, inputs)[kind].backward()
                optimizer.step()
        start.append(pairs[0])
        end.append(pairs[1])
    assert balancer.weights.tolist() == pytest.approx(blending(start, end, 1e-3), rel=1e-9)


def test_dropout_of_copies_depends_on_their_seed():
    result = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = attention_model(fusion=eq.fusion.JointAttention(DIM, dropout=0.5))
        balancer = eq.balance.GradientBlending(model, every=1, copies=True, seed=seed)
        balancer.review([batch(seed=1)], [batch(seed=3)])
        result.append(balancer.weights.tolist())
    assert result[0] == result[1] != result[2]


def test_no_weight_estimate_after_the_last_epoch():
    model, balancer, balancing = build(every=1, copies=True, epochs=1)
    train_epoch(model, balancing, 0)
    torch.testing.assert_close(balancer.weights, doubles(1 / 3, 1 / 3, 1 / 3), **EXACT)


@pytest.mark.parametrize("copies", [False, True])
def test_resumed_training_equals_uninterrupted_training(copies):
    model, balancer, balancing = build(copies=copies)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_epoch(model, balancing, 0, optimizer=optimizer)
    states = copy.deepcopy([part.state_dict() for part in (model, balancer, optimizer)])
    fresh, other, rebalancing = build(copies=copies, seed=9)
    fresh_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    for part, state in zip((fresh, other, fresh_optimizer), states, strict=True):
        part.load_state_dict(state)
    for number in (1, 2):
        straight = train_epoch(model, balancing, number, optimizer=optimizer)
        assert train_epoch(fresh, rebalancing, number, optimizer=fresh_optimizer) == straight
    assert len(set(straight.values())) > 1


def test_accumulated_batches_equal_one_large_batch():
    full, result = batch(size=12, missing=("audio", "image")), []
    for sizes in ((12,), (5, 7)):
        model, balancer, balancing = build()
        for part in split_batch(full, *sizes):
            balancing.loss(model(part), part["target"]).backward()
        balancing.before_step()
        result.append(balancer.running[0] / balancer.running[1])
    torch.testing.assert_close(*result, **EXACT)


@pytest.mark.parametrize("copies", [False, True])
def test_modality_missing_from_all_samples_has_zero_weight(copies):
    model, balancer, balancing = build(NAMES[:3], copies=copies)
    without = {**batch(NAMES[:3]), "text": None}
    for _ in range(2):
        loss = balancing.loss(model.train()(without), without["target"])
        loss.backward()
        balancing.before_step()
        balancing.review([without], [{**batch(NAMES[:3], seed=7), "text": None}])
        balancing.end_epoch()
        with torch.no_grad():
            model.fusion.cls.add_(0.5)
    assert bool(loss.isfinite())
    assert float(balancer.weights[2]) == 0.0
    assert float(balancer.weights.sum()) == pytest.approx(1.0)


def test_losses_are_means_over_valid_samples():
    model, *_ = build()
    full = batch(size=12, missing=("image",))
    here = full["mask"]["image"]
    output = model(full)
    own = model.loss(output.unimodal_logits["image"][here], full["target"][here]).detach()
    torch.testing.assert_close(evaluate_losses(model, split_batch(full, 5, 7))[1], own, **EXACT)


def test_errors():
    with pytest.raises(ConfigError, match="GradientBlending: expected two or more modalities, got audio"):
        eq.balance.GradientBlending(attention_model(("audio",)))
    with pytest.raises(ConfigError, match=r"expected every >= 1, floor > 0 .* got every = 0"):
        eq.balance.GradientBlending(attention_model(), every=0)
    with pytest.raises(ConfigError, match="floor = 0"):
        eq.balance.GradientBlending(attention_model(), floor=0.0)
    model, balancer, balancing = build(copies=True)
    with pytest.raises(ConfigError, match="expected training and validation batches to review, got none"):
        balancer.review([batch()], [])
    with pytest.raises(ConfigError, match="expected an output with logits"):
        balancer.penalty(model(batch()).with_(logits=None), batch()["target"])
    model, _, balancing = build(unimodal="probe")
    with pytest.raises(ConfigError, match="GradientBlending: expected logits that are a sum"):
        balancing.loss(model(batch()), batch()["target"])


def test_copies_receive_unchanged_inputs():
    model, balancer, _ = build(copies=True)
    seen = []
    model.preparations = [lambda given: seen.append(1) or given]
    model.train()
    balancer.review([batch()], [batch()])
    assert not seen
