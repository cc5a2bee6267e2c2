"""Contributions of modalities to logits: loops, exact sums, no side effects, and errors."""

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.fusion import DIM, FEATURES, NAMES, OUTPUTS, batch
from helpers.fusion import joint_model as fresh
from helpers.fusion_cases import EXACT
from oracles.fusion import state_as_float64
from oracles.fusion_transformers import joint_contributions


def build_joint(*args, **options):
    """Returns a model with joint attention and nonzero biases."""
    result = fresh(*args, **options)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return result


def build_model(fusion, names=NAMES[:2]):
    torch.manual_seed(0)
    return eq.FusionModel({name: nn.Linear(FEATURES[name], DIM) for name in names}, fusion, OUTPUTS).double()


@pytest.mark.parametrize("missing", [(), ("image",)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("options", [{"heads": 3}, {"include_cls_key": False}, {"shortcut": False}])
def test_joint_attention(options, count, missing):
    missing = missing if count > 1 else ()
    model, inputs = build_joint(NAMES[:count], **options), batch(NAMES[:count], missing=missing)
    parts = eq.fusion.modality_contributions(model, inputs)
    assert tuple(parts) == NAMES[:count]
    heads, keys = options.get("heads", 2), options.get("include_cls_key", True)
    expected = joint_contributions(
        state_as_float64(model.fusion),
        state_as_float64(model.head),
        model.encode(inputs),
        heads=heads,
        include_cls_key=keys,
    )
    for index, part in enumerate(parts.values()):
        torch.testing.assert_close(part, expected[:, index], **EXACT)
        assert not part.requires_grad
    torch.testing.assert_close(sum(parts.values()), model.eval()(inputs).logits.detach(), **EXACT)


def test_missing_modality_contributes_only_the_remainder():
    model, inputs = build_joint(NAMES[:3]), batch(NAMES[:3])
    parts = eq.fusion.modality_contributions(model, inputs | {"image": None})
    torch.testing.assert_close(sum(parts.values()), model.eval()(inputs | {"image": None}).logits.detach(), **EXACT)
    without_class = build_joint(NAMES[:3], include_cls_key=False)
    without_class.load_state_dict(model.state_dict())
    parts = eq.fusion.modality_contributions(without_class, inputs | {"image": None})
    # If the class token is not a key, only the biases belong to no modality: a third each.
    rest = (model.fusion.attention.out.bias @ model.head.weight.mT + model.head.bias) / 3
    torch.testing.assert_close(parts["image"], rest.detach().expand(5, -1), **EXACT)


def test_rotated_query_is_used():
    model, inputs = build_joint(), batch()
    balancer = eq.balance.RollingQ(model.fusion.attention, beta=0.0, rho=2.0)
    before = eq.fusion.modality_contributions(model, inputs)
    model.train()
    model(inputs)
    assert balancer.end_epoch()["rotations"] == 1
    after = eq.fusion.modality_contributions(model, inputs)
    assert not torch.allclose(after["audio"], before["audio"])
    torch.testing.assert_close(sum(after.values()), model.eval()(inputs).logits.detach(), **EXACT)


@pytest.mark.parametrize("kind", [eq.fusion.Concat, eq.fusion.Sum, eq.fusion.Unimodal, eq.fusion.MBT])
def test_static_sums(kind):
    model, inputs = build_model(kind(DIM)), batch()
    parts = eq.fusion.modality_contributions(model, inputs)
    output = model.eval()(inputs)
    for name, part in model.contributions(output).items():
        torch.testing.assert_close(parts[name], part.detach(), **EXACT)
    torch.testing.assert_close(sum(parts.values()), output.logits.detach(), **EXACT)


def test_tokens_instead_of_a_batch():
    model, inputs = build_joint(), batch()
    from_tokens = eq.fusion.modality_contributions(model, model.encode(inputs))
    for name, part in eq.fusion.modality_contributions(model, inputs).items():
        torch.testing.assert_close(from_tokens[name], part, **EXACT)


@pytest.mark.parametrize("crash", [False, True])
def test_model_state_is_restored(crash):
    model, inputs = build_joint(dropout=0.5), batch()
    model.train()
    model.fusion.attention.eval()
    if crash:
        model.fusion.attention.out.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of order")))
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    if crash:
        with pytest.raises(RuntimeError, match="out of order"):
            eq.fusion.modality_contributions(model, inputs)
    else:
        parts = eq.fusion.modality_contributions(model, inputs)
        again = eq.fusion.modality_contributions(model, inputs)
        assert all(torch.equal(parts[name], again[name]) for name in parts)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.fusion.attention.core._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: build_joint(depth=2), r"got JointAttention of depth 2\. Norms and hidden layers mix"),
        (
            lambda: build_model(eq.fusion.MMML(DIM)),
            r"modality_contributions: expected logits that are a sum .* got MMML\.",
        ),
        (lambda: build_model(eq.fusion.FiLM(DIM)), r"got FiLM\."),
    ],
)
def test_logits_that_are_not_a_sum_raise(model, message):
    with pytest.raises(ConfigError, match=message):
        eq.fusion.modality_contributions(model(), batch())


def test_nonlinear_head_raises():
    model = build_joint()
    model.head = nn.Sequential(model.head, nn.Tanh())
    with pytest.raises(ConfigError, match=r"got JointAttention with a head Sequential\. The head must be linear"):
        eq.fusion.modality_contributions(model, batch())
