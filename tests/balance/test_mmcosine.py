"""MMCosine against its equations: logits, their parts, invariance to norms, zero vectors, checkpoints, errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.balance.mmcosine import cosine_logits
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, OUTPUTS, batch
from helpers.steps import attention_model, step
from helpers.tasks import additive_model, to_lists
from helpers.tolerance import TOL
from oracles.balance_a import cosine_logits as slow

EXACT = TOL[torch.float64]
quick = settings(max_examples=25, deadline=None)


def build(names=("audio", "image"), *, scale=15.0, **options):
    model = additive_model(names, **options)
    return model, eq.BalancerList(model, [eq.balance.MMCosine(model, scale=scale)])


def test_hand_computed_values():
    features = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=torch.float64)
    weight = torch.tensor([[5.0, 0.0], [0.0, 0.1], [1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8, 1.4 * 0.5**0.5], [0.0, -1.0, -(0.5**0.5)]], dtype=torch.float64)
    torch.testing.assert_close(cosine_logits(features, weight, scale=15.0), 15 * expected, **EXACT)


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("fusion", [eq.fusion.Concat, eq.fusion.Sum])
@pytest.mark.parametrize("training", [True, False])
def test_logits_equal_the_oracle_in_training_and_at_test_time(number, fusion, training):
    names = NAMES[:number]
    model, _ = build(names, scale=7.0, fusion=fusion(DIM))
    inputs = batch(names, missing=("image",))
    output = model.train(training)(inputs)
    features = [to_lists(output.tokens[name].pooled()) for name in names]
    weights = [to_lists(weight) for weight in model.head.weight]
    expected = [slow([f[i] for f in features], weights, 7.0) for i in range(5)]
    torch.testing.assert_close(output.logits, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_contributions_sum_to_the_logits():
    model, _ = build(NAMES[:3])
    output = model(batch(NAMES[:3], missing=("text",)))
    parts = model.contributions(output)
    torch.testing.assert_close(sum(parts.values()), output.logits, **EXACT)
    assert not bool(parts["text"][~output.tokens["text"].present()].any())
    result = eq.fusion.modality_contributions(model, batch(NAMES[:3], missing=("text",)))
    for name, part in parts.items():
        torch.testing.assert_close(result[name], part.detach(), **EXACT)


@quick
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_logits_do_not_depend_on_norms(seed, longer, heavier):
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(5, 7, generator=random, dtype=torch.float64)
    weight = torch.randn(3, 7, generator=random, dtype=torch.float64)
    plain = cosine_logits(features, weight, scale=15.0)
    torch.testing.assert_close(cosine_logits(longer * features, heavier * weight, scale=15.0), plain, **EXACT)
    assert float(plain.abs().max()) <= 15 + 1e-9


def test_gradcheck():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, w: cosine_logits(f, w, scale=15.0), (features, weight))


@pytest.mark.parametrize("gone", [{"text": None}, {"mask": {"text": torch.zeros(5, dtype=torch.bool)}}])
def test_modality_missing_from_all_samples_contributes_zero(gone):
    model, balancing = build(NAMES[:3])
    inputs = {**batch(NAMES[:3]), **gone}
    result = step(model, balancing, inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())
    assert not bool(result["head.weight"][2].any())
    assert bool(result["head.weight"][:2].any())
    two = model.contributions(model(inputs))
    torch.testing.assert_close(two["audio"] + two["image"], model(inputs).logits, **EXACT)


def test_head_is_trained_and_saved():
    model, balancing = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = copy.deepcopy(model.state_dict())
    step(model, balancing, batch())
    optimizer.step()
    assert not torch.equal(model.head.weight, before["head.weight"])
    other, _ = build(seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch()).logits, model(batch()).logits)


def test_head_has_model_dtype_and_no_bias():
    model, _ = build(dtype=torch.float32)
    assert {name: (p.dtype, p.shape) for name, p in model.head.named_parameters()} == {
        "weight": (torch.float32, (2, OUTPUTS, DIM))
    }


def test_autocast_computes_cosines_in_float32():
    model, balancing = build(dtype=torch.float32)
    inputs = batch(dtype=torch.float32)
    exact = model(inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(inputs)
        balancing.loss(output, inputs["target"]).backward()
    assert bool(model.head.weight.grad.isfinite().all())
    torch.testing.assert_close(output.logits.float() / 15, exact / 15, **TOL[torch.bfloat16])


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_invalid_scale_raises(scale):
    with pytest.raises(ConfigError, match=f"MMCosine: expected scale > 0 and finite, got scale = {scale}"):
        eq.balance.MMCosine(additive_model(), scale=scale)


def test_errors():
    with pytest.raises(ConfigError, match="MMCosine: expected two or more modalities, got audio"):
        eq.balance.MMCosine(additive_model(("audio",)))
    with pytest.raises(ConfigError, match=r"the concatenated pooled vectors, got JointAttention\. Use Concat or Sum"):
        eq.balance.MMCosine(attention_model())
    for fusion in (eq.fusion.MBT(DIM, heads=2), eq.fusion.MMML(DIM, heads=2)):
        model = attention_model(fusion=fusion)
        assert model.fusion.out_dim == 2 * DIM
        with pytest.raises(ConfigError, match=f"the concatenated pooled vectors, got {type(fusion).__name__}"):
            eq.balance.MMCosine(model)
    model = additive_model()
    with pytest.raises(ConfigError, match="MMCosine with MLA: both replace the model's head"):
        eq.BalancerList(model, [eq.balance.MMCosine(model), eq.balance.MLA(model)])


def test_custom_head_has_no_contributions():
    model = additive_model()
    model.head = nn.Sequential(nn.Linear(2 * DIM, OUTPUTS), nn.Tanh()).double()
    assert model.contributions(model(batch())) is None
