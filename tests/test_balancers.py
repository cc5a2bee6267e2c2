"""A battery over every balancer that the package has, in a training loop as a user writes it."""

import copy
import inspect
import math

import pytest
import torch

import equipoise as eq
from equipoise import balance as package
from equipoise.balance import Balancer
from small_fusion import NAMES, batch, forward, model, slices
from tolerance import TOL

EPOCHS, DEPTH = 4, 2
EXACT = TOL[torch.float64]
ATTACH = {
    "RollingQ": lambda made: eq.RollingQ(made.fusion.attention, beta=0.0, tail=None, max_rotations=None),
    "ProgressiveRollingQ": lambda made: eq.ProgressiveRollingQ(
        made.fusion, epochs=EPOCHS, beta=0.0, tail=None, max_rotations=None
    ),
}
"""How each balancer is attached to a model of joint attention. A new one is added here, and meets every test below."""
FOUND = {
    name
    for name, kind in inspect.getmembers(package, inspect.isclass)
    if issubclass(kind, Balancer) and kind is not Balancer
}
every = pytest.mark.parametrize("name", sorted(ATTACH))


def attached(name, names=("audio", "image"), **options):
    made = model(names, depth=DEPTH, **options)
    return made, ATTACH[name](made)


def loss_of(made, balancer, inputs):
    """The moments of a balancer in the order in which a training loop calls them."""
    output, target = made(inputs), inputs["target"]
    balancer.observe(output, target)
    loss = made.loss(output.logits, target)
    penalty = balancer.penalty(output, target)
    return loss if penalty is None else loss + penalty


def train(made, balancer, optimiser, epochs, *, names=("audio", "image"), first=0):
    logs = []
    for epoch in range(first, first + epochs):
        made.train()
        for step in range(3):
            optimiser.zero_grad()
            loss_of(made, balancer, batch(names, seed=10 * epoch + step)).backward()
            optimiser.step()
        logs.append(balancer.end_epoch())
    return logs


def sgd(made):
    return torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9)


def logits(made):
    return made.eval()(batch(seed=77)).logits.detach()


def test_every_balancer_is_in_the_battery():
    assert set(ATTACH) == FOUND


@every
@pytest.mark.parametrize("number", [2, 3, 5])
def test_trains_with_any_number_of_modalities(name, number):
    made, balancer = attached(name, NAMES[:number])
    before = made.eval()(batch(NAMES[:number])).logits.detach()
    logs = train(made, balancer, sgd(made), 2, names=NAMES[:number])
    assert all(isinstance(value, float) and math.isfinite(value) for log in logs for value in log.values())
    assert not torch.equal(made.eval()(batch(NAMES[:number])).logits, before)


@every
def test_a_single_modality_has_nothing_to_balance(name):
    made = model(("audio",), depth=DEPTH)
    with pytest.raises(eq.EquipoiseError, match="two or more modalities"):
        ATTACH[name](made)


@every
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_saved_and_loaded_in_mid_training_it_goes_on_as_if_nothing_had_happened(name, stop):
    made, balancer = attached(name)
    optimiser = sgd(made)
    train(made, balancer, optimiser, stop)
    states = copy.deepcopy([part.state_dict() for part in (made, balancer, optimiser)])
    fresh, other = attached(name, seed=9)
    fresh_optimiser = sgd(fresh)
    for part, state in zip((fresh, other, fresh_optimiser), states, strict=True):
        part.load_state_dict(state)
    assert torch.equal(logits(fresh), logits(made))
    straight = train(made, balancer, optimiser, EPOCHS - stop, first=stop)
    resumed = train(fresh, other, fresh_optimiser, EPOCHS - stop, first=stop)
    assert resumed == straight
    assert torch.equal(logits(fresh), logits(made))


@every
def test_what_it_saves_is_tensors(name):
    made, balancer = attached(name)
    train(made, balancer, sgd(made), 1)
    for state in (made.state_dict(), balancer.state_dict()):
        assert all(isinstance(value, torch.Tensor) for value in state.values())


@every
def test_accumulated_batches_equal_one_large_batch(name):
    whole = batch(size=12, seed=5)
    found = []
    for sizes in ((12,), (5, 3, 4)):
        made, balancer = attached(name)
        for part, size in zip(slices(whole, *sizes), sizes, strict=True):
            (loss_of(made, balancer, part) * size / 12).backward()
        gradients = [p.grad.clone() for p in made.parameters() if p.grad is not None]
        found.append((gradients, balancer.end_epoch(), logits(made)))
    torch.testing.assert_close(found[0][0], found[1][0], **EXACT)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2], **EXACT)


@every
def test_a_modality_missing_from_samples_and_from_a_batch(name):
    made, balancer = attached(name, NAMES[:3])
    some = batch(NAMES[:3], size=7, missing=("audio", "image"))
    none = {**batch(NAMES[:3], seed=1), "text": None}
    for inputs in (some, none):
        loss_of(made.train(), balancer, inputs).backward()
    assert all(math.isfinite(value) for value in balancer.end_epoch().values())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in made.parameters())


@every
def test_autocast(name):
    made, balancer = attached(name, dtype=torch.float32)
    for seed in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(made.train(), balancer, batch(seed=seed, dtype=torch.float32))
        loss.backward()
    assert all(math.isfinite(value) for value in balancer.end_epoch().values())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in made.parameters())


@every
def test_the_end_of_an_epoch_touches_no_parameter_and_draws_no_random_number(name):
    made, balancer = attached(name)
    loss_of(made.train(), balancer, batch()).backward()
    weights = [p.detach().clone() for p in made.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in made.parameters()]
    state = torch.get_rng_state()
    balancer.end_epoch()
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, weight, gradient in zip(made.parameters(), weights, gradients, strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient)


@every
def test_adds_no_parameter_to_the_model(name):
    made, _ = attached(name)
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in model(depth=DEPTH).named_parameters()]


@every
def test_evaluation_is_not_observed(name):
    made, balancer = attached(name)
    twin, other = attached(name)
    for each in (made, twin):
        forward(each, [batch()])
    made.eval()(batch(seed=3))
    assert balancer.end_epoch() == other.end_epoch()
    assert torch.equal(logits(made), logits(twin))


def test_the_base_does_nothing():
    balancer, features = Balancer(), {"audio": torch.ones(2, 3)}
    output = eq.Output(features=torch.ones(2, 3))
    target = torch.zeros(2)
    assert balancer.transform(features) is features
    assert balancer.observe(output, target) is None
    assert balancer.penalty(output, target) is None
    assert balancer.gradient_scale(output, target) is None
    assert balancer.end_epoch() == {}
