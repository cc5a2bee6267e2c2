"""Every balancer in disturbed loops: the weights equal those of an undisturbed loop, or an error gives the reason."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import equipoise as eq
from equipoise.balance.lfm import LFM
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.training.checkpoint import load_weights, save_weights
from helpers.balancer_cases import BALANCERS
from helpers.balancer_disturbances import DISTURBANCES, REFUSED, outcome, shared
from helpers.fusion import batch
from helpers.steps import attention_model, step
from helpers.tasks import additive_model
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
APART = {"AGM", "ARL", "CGGM", "Greedy", "InfoReg", "MMPareto", "OGM", "OGM_GE", "DiagnoseRelearn", "UMT"}
"""Balancers that change the gradients of each encoder separately."""


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("name", sorted(BALANCERS))
def test_disturbed_loop_gives_the_same_weights(name, disturbance):
    found = outcome(name, disturbance)
    if name in REFUSED.get(disturbance, ()):
        assert "expected" in found, found
    else:
        assert found == "equal"


def test_losses_summed_before_backward_raise():
    made = additive_model()
    balancing = eq.BalancerList(made, [eq.balance.ModalityDropout(made)])
    losses = [balancing.loss(made(batch(seed=seed)), batch(seed=seed)["target"]) for seed in range(2)]
    with pytest.raises(EquipoiseError, match=r"a backward pass for each batch .*losses of several batches"):
        sum(losses).backward()


def test_recomputation_of_unknown_forward_pass_raises():
    made = additive_model()
    eq.BalancerList(made, [eq.balance.ModalityDropout(made)])
    value = torch.ones((), requires_grad=True)
    (value * 1).register_hook(lambda _: made(batch()))
    other = value * 2
    other.register_hook(lambda _: made(batch()) and None)
    with pytest.raises(
        EquipoiseError, match=r"a recomputation of a forward pass of this step, got .* inside a backward"
    ):
        other.backward()


def test_penalty_under_reentrant_checkpointing_raises():
    assert "use_reentrant=False" in outcome("MMPareto", "CheckpointReentrant")
    assert LFM.__name__ in outcome("LFM", "CheckpointFusionReentrant")


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_mmpareto_scales_with_the_loss(factor):
    found = []
    for scale in (1.0, factor):
        made = attention_model()
        balancing = eq.BalancerList(made, [eq.balance.MMPareto(made, gamma=1.5)])
        (balancing.loss(made(batch()), batch()["target"]) * scale).backward()
        balancing.before_step()
        found.append([p.grad for p in made.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, factor * a, **EXACT)


def test_mmpareto_keeps_penalties_of_other_balancers():
    made = attention_model(unimodal="train")
    both = step(
        made,
        eq.BalancerList(made, [eq.balance.MMPareto(made, gamma=1.0), eq.balance.MBSD(made, strength=0.0)]),
        batch(),
    )
    alone = step(made, eq.BalancerList(made, [eq.balance.MMPareto(made, gamma=1.0)]), batch())
    for name, gradient in alone.items():
        torch.testing.assert_close(both[name], gradient, **EXACT)


@pytest.mark.parametrize("clip", [0.01, 0.1])
def test_agm_clips_the_gradient_of_the_mean_loss(clip):
    found = []
    for scale in (1.0, 0.1, 1024.0):
        made = additive_model()
        balancing = eq.BalancerList(made, [eq.balance.AGM(made, clip=clip)])
        (balancing.loss(made(batch()), batch()["target"]) * scale).backward()
        balancing.before_step()
        found.append([p.grad / scale for p in made.parameters() if p.grad is not None])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(b, a, **EXACT)


@pytest.mark.parametrize("name", sorted(BALANCERS))
def test_modalities_with_a_shared_encoder(name, tmp_path):
    found = shared(name)
    if name in APART:
        assert isinstance(found, ConfigError)
        assert "without shared parameters" in str(found)
        assert "'weight' of 'left', which is also 'weight' of 'right'" in str(found)
        return
    model, balancing, inputs = found
    gradients = step(model, balancing, inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    save_weights(model, tmp_path / "model.safetensors")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    load_weights(twin, tmp_path / "model.safetensors")
    assert torch.equal(twin.eval()(inputs).logits, model.eval()(inputs).logits)


class ConstantScale(eq.balance.Balancer):
    def gradient_scale(self, output, target):
        return {"left": 0.5}


def test_scaling_a_shared_encoder_raises():
    one = torch.nn.Linear(3, 8)
    partly = torch.nn.Sequential(one, torch.nn.Linear(8, 8)), torch.nn.Sequential(one, torch.nn.Linear(8, 8))
    for encoders in ({"left": one, "right": one}, dict(zip(("left", "right"), partly, strict=True))):
        made = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        with pytest.raises(ConfigError, match="Fixed: expected encoders without shared parameters"):
            eq.BalancerList(made, [ConstantScale()])


def test_trainer_saves_model_with_shared_encoder(tmp_path):
    from safetensors.torch import save_file

    one = torch.nn.Linear(3, 8)
    made = eq.FusionModel({"left": one, "right": one}, eq.fusion.Concat(8), 2)
    model = eq.hf.BalancedModel(made, eq.BalancerList(made, [eq.balance.CML(made)]))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.encoders.right.weight"], one.weight)


def test_documented_table_matches_the_tests():
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import balancer_matrix

    page = Path(__file__).parents[2] / "docs" / "balancer_matrix.md"
    assert page.read_text(encoding="utf-8") == balancer_matrix.page()
