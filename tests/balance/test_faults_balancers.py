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


CONTAINED = ("SkippedBatch", "Checkpoint", "TwoForwards", "ZeroedStep")
"""Disturbances that are part of others: SkippedNan, CheckpointTwoForwards and ZeroedFrozenHead."""


@pytest.mark.parametrize(
    "disturbance",
    [pytest.param(kind, marks=[pytest.mark.slow] if kind in CONTAINED else []) for kind in DISTURBANCES],
)
@pytest.mark.parametrize("name", sorted(BALANCERS))
def test_disturbed_loop_gives_the_same_weights(name, disturbance):
    result = outcome(name, disturbance)
    if name in REFUSED.get(disturbance, ()):
        assert "expected" in result, result
    else:
        assert result == "equal"


def test_losses_summed_before_backward_raise():
    model = additive_model()
    balancing = eq.BalancerList(model, [eq.balance.ModalityDropout(model)])
    losses = [balancing.loss(model(batch(seed=seed)), batch(seed=seed)["target"]) for seed in range(2)]
    with pytest.raises(EquipoiseError, match=r"a backward pass for each batch .*losses of several batches"):
        sum(losses).backward()


def test_recomputation_of_unknown_forward_pass_raises():
    model = additive_model()
    eq.BalancerList(model, [eq.balance.ModalityDropout(model)])
    value = torch.ones((), requires_grad=True)
    (value * 1).register_hook(lambda _: model(batch()))
    other = value * 2
    other.register_hook(lambda _: model(batch()) and None)
    with pytest.raises(
        EquipoiseError, match=r"a recomputation of a forward pass of this step, got .* inside a backward"
    ):
        other.backward()


def test_penalty_under_reentrant_checkpointing_raises():
    assert "use_reentrant=False" in outcome("MMPareto", "CheckpointReentrant")
    assert LFM.__name__ in outcome("LFM", "CheckpointFusionReentrant")


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_mmpareto_scales_with_the_loss(factor):
    result = []
    for scale in (1.0, factor):
        model = attention_model()
        balancing = eq.BalancerList(model, [eq.balance.MMPareto(model, gamma=1.5)])
        (balancing.loss(model(batch()), batch()["target"]) * scale).backward()
        balancing.before_step()
        result.append([p.grad for p in model.parameters()])
    for a, b in zip(*result, strict=True):
        torch.testing.assert_close(b, factor * a, **EXACT)


def test_mmpareto_keeps_penalties_of_other_balancers():
    model = attention_model(unimodal="train")
    both = step(
        model,
        eq.BalancerList(model, [eq.balance.MMPareto(model, gamma=1.0), eq.balance.MBSD(model, strength=0.0)]),
        batch(),
    )
    alone = step(model, eq.BalancerList(model, [eq.balance.MMPareto(model, gamma=1.0)]), batch())
    for name, gradient in alone.items():
        torch.testing.assert_close(both[name], gradient, **EXACT)


@pytest.mark.parametrize("clip", [0.01, 0.1])
def test_agm_clips_the_gradient_of_the_mean_loss(clip):
    result = []
    for scale in (1.0, 0.1, 1024.0):
        model = additive_model()
        balancing = eq.BalancerList(model, [eq.balance.AGM(model, clip=clip)])
        (balancing.loss(model(batch()), batch()["target"]) * scale).backward()
        balancing.before_step()
        result.append([p.grad / scale for p in model.parameters() if p.grad is not None])
    for other in result[1:]:
        for a, b in zip(result[0], other, strict=True):
            torch.testing.assert_close(b, a, **EXACT)


@pytest.mark.parametrize("name", sorted(BALANCERS))
def test_modalities_with_a_shared_encoder(name, tmp_path):
    result = shared(name)
    if name in APART:
        assert isinstance(result, ConfigError)
        assert "without shared parameters" in str(result)
        assert "'weight' of 'left', which is also 'weight' of 'right'" in str(result)
        return
    model, balancing, inputs = result
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
        model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        with pytest.raises(ConfigError, match="ConstantScale: expected encoders without shared parameters"):
            eq.BalancerList(model, [ConstantScale()])


def test_trainer_saves_model_with_shared_encoder(tmp_path):
    from safetensors.torch import save_file

    one = torch.nn.Linear(3, 8)
    net = eq.FusionModel({"left": one, "right": one}, eq.fusion.Concat(8), 2)
    model = eq.hf.BalancedModel(net, eq.BalancerList(net, [eq.balance.CML(net)]))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.encoders.right.weight"], one.weight)


def test_documented_table_matches_the_tests():
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import balancer_matrix

    page = Path(__file__).parents[2] / "docs" / "balancer_matrix.md"
    assert page.read_text(encoding="utf-8") == balancer_matrix.page()
