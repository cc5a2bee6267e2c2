"""MBSD against its equations: the term of a pair by hand, whole losses, gradients, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.balance.mbsd import self_distillation
from equipoise.errors import ConfigError
from helpers.fusion import NAMES, batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for, to_lists
from helpers.tolerance import TOL
from oracles.balance_a import mbsd, mbsd_pair

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def distillation_term(one, other, target):
    return self_distillation(doubles(one), doubles(other), torch.tensor([target]), "classification")


def build(names=("audio", "image"), *, make=additive_model, strength=1.0, **options):
    result = make(names, **options)
    return result, eq.BalancerList(result, [eq.balance.MBSD(result, strength=strength)])


def test_hand_computed_values():
    # Probabilities 3/4 and 1/2: w = 1/4, |y|^2 / C = log(3)^2 / 2, KL = 3/4 log(3/2) + 1/4 log(1/2).
    result = distillation_term([math.log(3), 0], [0, 0], 0)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(result) == pytest.approx(0.25 * (math.log(3) ** 2 / 2 + kl))
    assert torch.equal(result, distillation_term([0, 0], [math.log(3), 0], 0))


def test_term_is_zero_if_both_are_wrong_or_equal():
    assert float(distillation_term([2, 0, 1], [5, 1, 0], 1)) == 0.0
    assert float(distillation_term([2, 0, 1], [2, 0, 1], 0)) == 0.0


def test_saturated_predictions_are_finite():
    one = doubles([900, 0]).requires_grad_()
    other = doubles([0, 900]).requires_grad_()
    result = self_distillation(one, other, torch.tensor([0]), "classification")
    assert result.tolist() == pytest.approx([900**2 + 8 * math.log(10)])
    for gradient in torch.autograd.grad(result.sum(), [one, other]):
        assert bool(gradient.isfinite().all())


@quick
@given(st.integers(0, 10**6), st.sampled_from(TASKS))
def test_pair_equals_the_oracle(seed, task):
    random = torch.Generator().manual_seed(seed)
    one, other, reference = torch.randn(3, 7, 5, generator=random, dtype=torch.float64)
    target = {
        "classification": reference.argmax(dim=1),
        "multilabel": (reference > 0).double(),
        "regression": reference,
    }[task]
    result = self_distillation(one, other, target, task)
    expected = [
        mbsd_pair(a, b, t, task) for a, b, t in zip(to_lists(one), to_lists(other), target.tolist(), strict=True)
    ]
    torch.testing.assert_close(result, doubles(*expected), **EXACT)


def test_stronger_modality_gets_gradient_from_squared_error_only():
    strong, weak = doubles([2.0, 0, 0]).requires_grad_(), doubles([0.5, 0, 0.3]).requires_grad_()
    result = self_distillation(strong, weak, torch.tensor([0]), "classification")
    gradient = torch.autograd.grad(result, strong, torch.ones(1, dtype=torch.float64), retain_graph=True)[0]
    p, q = (float(side.detach().softmax(dim=1)[0, 0]) for side in (strong, weak))
    torch.testing.assert_close(gradient, (p - q) * 2 / 3 * (strong - weak).detach(), **EXACT)
    # The weaker one is drawn up: its score of the true class rises along the descent, by squares and divergence.
    toward = -torch.autograd.grad(result.sum(), weak)[0]
    assert float(toward[0, 0]) > (p - q) * 2 / 3 * float((strong - weak).detach()[0, 0])


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("missing", [(), ("audio", "image")])
@pytest.mark.parametrize(
    ("make", "heads"),
    [(additive_model, "none"), (additive_model, "probe"), (additive_model, "train"), (attention_model, "train")],
)
def test_loss_equals_the_oracle(number, task, missing, make, heads):
    names = NAMES[:number]
    model, balancing = build(names, make=make, strength=0.7, task=task, unimodal=heads)
    inputs = batch_for(task, names, size=13, missing=missing)
    output, target = model(inputs), inputs["target"]
    here = {name: inputs.get("mask", {}).get(name, torch.ones(13, dtype=torch.bool)) for name in names}
    answers = output.unimodal_logits if heads == "train" else model.contributions(output)
    expected = model.loss(output.logits, target)
    for name in names:
        expected = expected + model.loss(answers[name][here[name]], target[here[name]])
    if heads == "probe":
        expected = expected + model.unimodal_loss(output, target)
    slow = mbsd([to_lists(answers[n]) for n in names], target.tolist(), [here[n].tolist() for n in names], task)
    assert slow > 0
    torch.testing.assert_close(balancing.loss(output, target), expected + 0.7 * slow, **EXACT)


def test_modalities_that_never_occur_together():
    model, balancing = build()
    inputs = {**batch(), "mask": {"audio": torch.arange(5) < 2, "image": torch.arange(5) >= 2}}
    output = model(inputs)
    balancer = balancing.balancers[0]
    alone = eq.balance.MBSD(model, strength=0.0)
    torch.testing.assert_close(
        balancer.penalty(output, inputs["target"]), alone.penalty(output, inputs["target"]), **EXACT
    )


def test_gradients_reach_both_encoders():
    model, balancing = build(make=attention_model, strength=1.0)
    result = step(model, balancing, batch())
    plain = step(model, eq.BalancerList(model), batch())
    for name in model.names:
        assert not torch.allclose(result[f"encoders.{name}.weight"], plain[f"encoders.{name}.weight"])
    assert torch.equal(result["fusion.attention.value.weight"], plain["fusion.attention.value.weight"])


def test_autocast():
    model, balancing = build(make=attention_model, dtype=torch.float32)
    inputs = batch(dtype=torch.float32)
    exact = balancing.loss(model(inputs), inputs["target"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = balancing.loss(model(inputs), inputs["target"])
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(loss.float(), exact, **TOL[torch.bfloat16])


def test_one_output():
    model, balancing = build(task="regression", outputs=1)
    target = torch.linspace(-1, 1, 5, dtype=torch.float64)
    column = balancing.loss(model(batch()), target[:, None])
    torch.testing.assert_close(balancing.loss(model(batch()), target), column, **EXACT)


def test_errors():
    with pytest.raises(ConfigError, match="MBSD: expected two or more modalities, got audio"):
        eq.balance.MBSD(additive_model(("audio",)))
    with pytest.raises(ConfigError, match=r"MBSD: expected strength >= 0, got strength = -0\.5"):
        eq.balance.MBSD(additive_model(), strength=-0.5)
    model, balancing = build(make=attention_model, unimodal="probe")
    with pytest.raises(
        ConfigError, match=r"MBSD: expected logits that are a sum .* that train the encoders.* unimodal='probe'"
    ):
        step(model, balancing, batch())
    model = additive_model()
    with pytest.raises(ConfigError, match="MBSD with GradientBlending: both set the weights of the unimodal losses"):
        eq.BalancerList(model, [eq.balance.MBSD(model), eq.balance.GradientBlending(model)])
