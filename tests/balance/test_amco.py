"""AMCo against its equations: curriculum, dominance, hidden classes, the head it adds, every task, errors."""

import copy
import math

import pytest
import torch

import equipoise as eq
from equipoise.balance.amco import hidden_part, masses
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for, loss_of, penalty_of, to_lists
from helpers.tolerance import TOL
from oracles.balance_b import amco, mass_of

EXACT = TOL[torch.float64]


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def build_at_progress(model, progress, **options):
    """Returns an AMCo at this progress of its curriculum."""
    balancer = eq.balance.AMCo(model, **options)
    balancer.progress.fill_(progress)
    return balancer


def amplify_modality(model, name, factor=99.0):
    """Increases one modality's logits."""
    with torch.no_grad():
        model.head.weight.chunk(len(model.names), dim=1)[model.names.index(name)].mul_(factor)


def modality_parts(model, balancer, inputs):
    output = model(inputs)
    result = model.fusion.contributions(output, model.head.head)
    return [to_lists(result[name]) for name in model.names]


def test_curriculum_worked_example():
    assert hidden_part(0.0, 0.3) == 0
    assert hidden_part(0.1, 0.3) == pytest.approx(0.5)
    assert hidden_part(0.15, 0.3) == pytest.approx(math.sqrt(0.5))
    assert hidden_part(0.3, 0.3) == hidden_part(7.0, 0.3) == 1


def test_progress_per_step_is_proportional_to_epoch():
    balancer, logs = eq.balance.AMCo(additive_model(), rate=0.01), []
    for _ in range(3):
        for _ in range(4):
            balancer.before_step()
        logs.append(balancer.end_epoch()["hidden"])
    assert float(balancer.progress) == pytest.approx(0.01 * 4 * (0 + 1 + 2))
    assert logs == pytest.approx([0, hidden_part(0.04, 0.3), hidden_part(0.12, 0.3)])


def test_masked_class_count_is_rounded_down_and_classes_vary_by_step():
    model = additive_model(outputs=7)
    for progress, number in ((0.0, 0), (0.1, 3), (0.29, 6), (0.3, 7)):
        assert int(build_at_progress(model, progress).masked_classes().sum()) == number
    balancer, drawn = build_at_progress(model, 0.1), []
    state = torch.get_rng_state()
    for _ in range(9):
        drawn.append(tuple(to_lists(balancer.masked_classes())))
        assert tuple(to_lists(balancer.masked_classes())) == drawn[-1]
        balancer.before_step()
    assert len(set(drawn)) > 3
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] != tuple(to_lists(build_at_progress(model, 0.1, seed=1).masked_classes()))


def test_masses_equal_the_oracle():
    parts = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    here = torch.ones(3, 5, dtype=torch.bool)
    result = masses(parts, here, "classification")
    for i in range(5):
        assert to_lists(result[:, i]) == pytest.approx(mass_of(to_lists(parts[:, i])), abs=1e-12)
    # Of a sample that lacks the first modality, the others share everything.
    here[0, 2] = False
    assert to_lists(masses(parts, here, "classification")[:, 2]) == pytest.approx([0, *mass_of(to_lists(parts[1:, 2]))])
    signed = masses(doubles([[3.0, -1.0]], [[0.0, 4.0]]), here[:2, :1], "multilabel")
    assert to_lists(signed[:, 0]) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("dominant", ["audio", "image", None])
@pytest.mark.parametrize("progress", [0.0, 0.15, 0.3])
def test_loss_equals_the_oracle(dominant, progress):
    model, inputs = additive_model(), batch(size=7)
    if dominant:
        amplify_modality(model, dominant)
    balancer = build_at_progress(model, progress, sigma=0.7)
    with torch.no_grad():
        model.head.mix.weight.normal_(generator=torch.Generator().manual_seed(5))
        model.head.mix.bias.normal_(generator=torch.Generator().manual_seed(6))
    parts = modality_parts(model, balancer, inputs)
    mass = [sum(mass_of([p[i] for p in parts])[m] for i in range(7)) / 7 for m in range(2)]
    assert [m > 0.7 for m in mass] == [name == dominant for name in model.names]
    hidden = [c for c, hides in enumerate(to_lists(balancer.masked_classes())) if hides]
    mix, bias = to_lists(model.head.mix.weight), to_lists(model.head.mix.bias)
    expected = amco(parts, to_lists(inputs["target"]), hidden, mix, bias, 0.7)
    assert float(penalty_of(balancer, model, inputs)) == pytest.approx(expected, rel=1e-9)
    plain = amco(parts, to_lists(inputs["target"]), [], mix, bias, 0.7)
    assert (expected != plain) == bool(dominant and progress)


@pytest.mark.parametrize("fusion", [eq.fusion.Concat, eq.fusion.Sum])
def test_head_starts_as_identity_and_learns(fusion):
    result, plain, inputs = (*(additive_model(fusion=fusion(DIM), unimodal="probe") for _ in range(2)), batch())
    state = torch.get_rng_state()
    balancing = eq.BalancerList(result, [eq.balance.AMCo(result)])
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(result(inputs).logits, plain(inputs).logits, **EXACT)
    assert set(result.state_dict()) - set(plain.state_dict()) >= {"head.mix.weight", "head.mix.bias"}
    actual = step(result, balancing, inputs)
    assert float(actual["head.mix.weight"].abs().sum()) > 0
    # Without dominance it is the plain loss and each modality's own.
    parts = plain.contributions(plain(inputs))
    alone = sum(float(plain.loss(part, inputs["target"]).detach()) for part in parts.values())
    expected = loss_of(eq.BalancerList(plain), plain, inputs) + alone
    assert loss_of(balancing, result, inputs) == pytest.approx(expected, rel=1e-9)


def test_masked_modality_is_trained_by_its_unimodal_loss_only():
    model, inputs = additive_model(unimodal="none"), batch(size=7)
    amplify_modality(model, "audio")
    balancer = build_at_progress(model, 0.3)
    result = step(model, eq.BalancerList(model, [balancer]), inputs)
    output = model(inputs)
    own = model.loss(model.fusion.contributions(output, model.head.head)["audio"], inputs["target"])
    (expected,) = torch.autograd.grad(own, [model.encoders["audio"].weight])
    torch.testing.assert_close(result["encoders.audio.weight"], expected, **EXACT)


def test_unimodal_samples_do_not_affect_dominance():
    model, full = additive_model(), batch(size=13, missing=("image",))
    here = full["mask"]["image"]
    amplify_modality(model, "image")
    balancer = build_at_progress(model, 0.3)
    output = model(full)
    parts = torch.stack(list(model.fusion.contributions(output, model.head.head).values())).detach()
    counted = torch.stack([torch.ones_like(here), here])
    assert to_lists(balancer._dominant(parts, counted)) == [False, True]
    assert to_lists(balancer._dominant(parts[:, here], counted[:, here])) == [False, True]
    gone = {**full, "image": None, "mask": {}}
    # No sample has several modalities, so nothing is masked.
    audio = model.fusion.contributions(model(gone), model.head.head)["audio"]
    expected = model.loss(model(gone).logits, gone["target"]) + model.loss(audio, gone["target"])
    torch.testing.assert_close(penalty_of(balancer, model, gone), expected.detach(), **EXACT)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("number", [2, 3])
def test_all_tasks(task, number):
    names = NAMES[:number]
    model, inputs = additive_model(names, task=task), batch_for(task, names, size=7)
    amplify_modality(model, "image")
    balancer = build_at_progress(model, 0.0)
    shown = float(penalty_of(balancer, model, inputs))
    balancer.progress.fill_(0.3)
    assert float(penalty_of(balancer, model, inputs)) != shown
    result = step(model, eq.BalancerList(model, [balancer]), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())


def test_resume_from_saved_state():
    model, inputs = additive_model(), batch(size=7)
    amplify_modality(model, "audio")
    balancer = build_at_progress(model, 0.15)
    balancer.end_epoch()
    balancer.before_step()
    states = copy.deepcopy([model.state_dict(), balancer.state_dict()])
    fresh = additive_model(seed=3)
    other = eq.balance.AMCo(fresh)
    fresh.load_state_dict(states[0])
    other.load_state_dict(states[1])
    assert float(penalty_of(other, fresh, inputs)) == float(penalty_of(balancer, model, inputs))
    assert other.end_epoch() == balancer.end_epoch()


def test_autocast():
    model, inputs = additive_model(dtype=torch.float32), batch(dtype=torch.float32)
    balancer = build_at_progress(model, 0.15)
    exact = penalty_of(balancer, model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result = penalty_of(balancer, model, inputs)
    torch.testing.assert_close(result, exact, **TOL[torch.bfloat16])


def test_errors():
    with pytest.raises(ConfigError, match="AMCo: expected two or more modalities, got audio"):
        eq.balance.AMCo(additive_model(("audio",)))
    for wrong in ({"sigma": 1.0}, {"epsilon": 0.0}, {"rate": 0.0}):
        with pytest.raises(ConfigError, match=f"AMCo: expected 0 < sigma < 1, .* got .*{next(iter(wrong))} = "):
            eq.balance.AMCo(additive_model(), **wrong)
    model = attention_model()
    with pytest.raises(ConfigError, match="expected logits that are a sum over modalities, got fusion JointAttention"):
        penalty_of(eq.balance.AMCo(model), model, batch())


def test_ensemble_logits_are_added():
    model, inputs = additive_model(unimodal="ensemble"), batch()
    balancer = eq.balance.AMCo(model)
    output = model.train()(inputs)
    own = sum(
        model.loss(part, inputs["target"]) for part in model.fusion.contributions(output, model.head.head).values()
    )
    expected = model.loss(output.logits, inputs["target"]) + own
    torch.testing.assert_close(balancer.penalty(output, inputs["target"]), expected, **EXACT)
