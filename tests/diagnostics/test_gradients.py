"""Gradient norms against a plain backward pass on a copy of the model."""

import copy
import math

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.diagnostics.encoder_gradients import gradient_norms, ratios
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from equipoise.tokens.token_batch import Tokens
from helpers.fusion import DIM, batch, joint_model
from helpers.fusion_cases import FUSIONS
from helpers.steps import attention_model
from helpers.tasks import TASKS, batch_for
from helpers.tolerance import TOL

SINGLE = TOL[torch.float32]
HEADS = {"MulT": {"heads": 2, "width": 4}}
NAMES = ("audio", "image", "text")


def gradient_norm(gradients):
    return math.sqrt(sum(float(value) ** 2 for gradient in gradients for value in gradient.flatten()))


def slow_norms(model, batches):
    """name -> (parameters, outputs) by backward on a copy in evaluation mode; NaN for a modality without samples."""
    result = {name: [] for name in model.names}
    for inputs in batches:
        twin = copy.deepcopy(model).eval()
        twin.zero_grad()
        tokens = twin.encode(inputs)
        for part in tokens.values():
            part.values.requires_grad_() if part.values.is_leaf else part.values.retain_grad()
        twin.loss(twin.fuse(tokens).logits, inputs["target"]).backward()
        for name, part in tokens.items():
            if len(part) and part.valid().any():
                own = [p.grad for p in twin.encoders[name].parameters() if p.grad is not None]
                above = [] if part.values.grad is None else [part.values.grad]
                result[name].append((gradient_norm(own), gradient_norm(above)))
    return {
        name: tuple(sum(index) / len(rows) for index in zip(*rows, strict=True)) if rows else (math.nan, math.nan)
        for name, rows in result.items()
    }


def assert_equal(result, expected):
    for name, (parameters, outputs) in expected.items():
        assert result.parameters[name] == pytest.approx(parameters, rel=SINGLE["rtol"], nan_ok=True)
        assert result.outputs[name] == pytest.approx(outputs, rel=SINGLE["rtol"], nan_ok=True)
    assert list(result.parameters) == list(result.outputs) == list(expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES], ids=len)
def test_against_backward(task, names):
    model = attention_model(names, task=task)
    batches = [batch_for(task, names, seed=seed, missing=names[1:]) for seed in range(3)]
    result = gradient_norms(model, batches)
    expected = slow_norms(model, batches)
    assert_equal(result, expected)
    assert result.batches == 3
    for index, ratio in enumerate((result.ratio, result.output_ratio)):
        for name in names:
            others = [expected[other][index] for other in names if other != name]
            by_hand = expected[name][index] / (sum(others) / len(others)) if others else math.nan
            assert ratio[name] == pytest.approx(by_hand, rel=SINGLE["rtol"], nan_ok=True)


@pytest.mark.parametrize("kind", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("unimodal", ["train", "ensemble"])
def test_every_fusion_with_the_task_loss(kind, unimodal):
    model = attention_model(NAMES, fusion=kind(DIM, **HEADS.get(kind.__name__, {})), unimodal=unimodal)
    batches = [batch(NAMES, seed=seed) for seed in range(2)]
    result = gradient_norms(model, batches)
    assert_equal(result, slow_norms(model, batches))
    if kind is eq.fusion.Unimodal:
        assert result.parameters["image"] == result.outputs["image"] == 0
        assert result.ratio["audio"] == math.inf


def test_hand_computed_values():
    # One weight w for each modality, logit w x, target 0: L = (w x)^2, dL/dw = 2 w x^2, dL/d(output) = 2 w x.
    encoders = {name: nn.Linear(1, 1, bias=False) for name in ("audio", "image")}
    model = eq.FusionModel(encoders, eq.fusion.Sum(1), 1, task="regression", unimodal="none").double()
    with torch.no_grad():
        for encoder, weight in zip(encoders.values(), (1.0, 0.0), strict=True):
            encoder.weight.fill_(weight)
        for part in model.head.parts:
            part.weight.fill_(1.0)
            part.bias.zero_()
    inputs = {name: torch.full((1, 1, 1), value).double() for name, value in (("audio", 3.0), ("image", 5.0))}
    result = gradient_norms(model, [{**inputs, "target": torch.zeros(1)}])
    assert result.parameters == pytest.approx({"audio": 18.0, "image": 30.0})
    assert result.outputs == pytest.approx({"audio": 6.0, "image": 6.0})
    assert result.ratio == pytest.approx({"audio": 0.6, "image": 30 / 18})


def test_frozen_shared_and_plain_encoders():
    model = attention_model(NAMES)
    model.encoders["audio"].requires_grad_(False)
    model.encoders["image"] = nn.Identity()
    inputs = batch(NAMES)
    inputs["image"] = torch.randn(5, 7, DIM, generator=torch.Generator().manual_seed(3)).double()
    result = gradient_norms(model, [inputs])
    assert math.isnan(result.parameters["audio"])
    assert math.isnan(result.parameters["image"])
    assert not inputs["image"].requires_grad
    expected = slow_norms(model, [{**inputs, "image": inputs["image"].clone()}])
    assert result.outputs == pytest.approx({name: both[1] for name, both in expected.items()}, rel=SINGLE["rtol"])
    assert result.parameters["text"] == pytest.approx(expected["text"][0], rel=SINGLE["rtol"])
    # Who is frozen is no standard for the others.
    assert math.isnan(result.ratio["text"])
    shared = attention_model(("audio", "image"))
    shared.encoders["image"] = shared.encoders["audio"]
    twice = {**batch(), "image": batch(seed=1)["audio"]}
    result = gradient_norms(shared, [twice])
    assert_equal(result, slow_norms(shared, [twice]))
    assert result.parameters["audio"] == result.parameters["image"]


def test_batches_without_the_modality_are_excluded():
    model = joint_model(NAMES)
    out = {"image": torch.zeros(5, dtype=torch.bool)}
    batches = [batch(NAMES), {**batch(NAMES, seed=1), "text": None}, {**batch(NAMES, seed=2), "mask": out}]
    result = gradient_norms(model, batches)
    assert_equal(result, slow_norms(model, batches))
    never = gradient_norms(model, batches[1:2])
    assert math.isnan(never.parameters["text"])
    assert math.isnan(never.outputs["text"])
    both = gradient_norms(model, batches[1:2]).parameters
    assert never.ratio["audio"] == pytest.approx(both["audio"] / both["image"])


def test_max_batches():
    model = joint_model()
    batches = [batch(seed=seed) for seed in range(3)]
    first, full = gradient_norms(model, batches, max_batches=2), gradient_norms(model, batches, max_batches=7)
    assert_equal(first, slow_norms(model, batches[:2]))
    assert (first.batches, full.batches) == (2, 3)
    assert full.parameters != first.parameters


def test_ratios_exclude_undefined_norms():
    result = ratios(torch.tensor([6.0, math.nan, 3.0, 1.0])).tolist()
    assert result == pytest.approx([3.0, math.nan, 3 / 3.5, 1 / 4.5], nan_ok=True)


class Steep(nn.Module):
    """Finite, with a gradient that is not."""

    def forward(self, values):
        return Tokens((values * 0).sqrt().repeat(1, 1, 4))


def test_errors():
    model = joint_model()
    with pytest.raises(ConfigError, match=r"gradient_norms: expected max_batches >= 1 or None, got 0"):
        gradient_norms(model, [batch()], max_batches=0)
    with pytest.raises(ConfigError, match=r"gradient_norms: expected a FusionModel, .* got Linear without names, enc"):
        gradient_norms(nn.Linear(2, 3), [batch()])
    with pytest.raises(ShapeError, match="at least one batch, got none"):
        gradient_norms(model, [])
    without = {name: value for name, value in batch().items() if name != "target"}
    with pytest.raises(ShapeError, match=r"gradient_norms: expected a target in every batch, got none\. Give every"):
        gradient_norms(model, [without])
    broken = {**batch(), "audio": torch.full((5, 7, 3), math.nan).double()}
    with pytest.raises(NonFiniteError, match="gradient_norms: expected a finite loss, got nan"):
        gradient_norms(model, [broken])
    model.encoders["audio"] = nn.Sequential(nn.Linear(3, 3).double(), Steep())
    with pytest.raises(NonFiniteError, match=r"gradient_norms 'audio': expected finite gradients, got NaN or infinity"):
        gradient_norms(model, [batch()])
