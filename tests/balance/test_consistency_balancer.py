"""The consistency term beside a fusion: its value by hand, samples that lack a modality, what it trains, errors."""

import math

import pytest
import torch

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.fusion import DIM, batch
from helpers.steps import attention_model
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
NAMES = ("audio", "image", "text")


def build(names=NAMES, **options):
    torch.manual_seed(0)
    model = attention_model(names, fusion=eq.fusion.Concat(DIM))
    return model, eq.balance.ConsistencyBalancer(model, **{"slots": 3, **options})


def loop_scores(tokens, concepts, temperature):
    """log(r* / M) of one sample, modality by modality and concept by concept."""
    units = []
    for values, mask in tokens:
        valid = values[mask]
        rows = []
        for concept in concepts:
            weights = [math.exp(float(concept @ value) / math.sqrt(len(concept))) for value in valid]
            pooled = sum(w * value for w, value in zip(weights, valid, strict=True)) / sum(weights)
            rows.append(pooled)
        center = sum(rows) / len(rows)
        units.append([(row - center) / (row - center).norm() for row in rows])
    count, size = len(units), len(concepts)
    full = torch.eye(count * size, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            for a in range(size):
                if i == j:
                    continue
                cosines = [math.exp(float(units[i][a] @ units[j][b]) / temperature) for b in range(size)]
                for b in range(size):
                    full[i * size + a, j * size + b] = cosines[b] / sum(cosines)
    full = (full + full.T) / 2
    singular = torch.linalg.svdvals(full)
    return math.log(float(singular.sum() ** 2 / (singular**2).sum()) / size)


def test_hand_computed_loss_with_missing_modalities():
    model, balancer = build(weight=0.7, temperature=0.3)
    inputs = batch(NAMES, missing=("text",))
    output = model(inputs)
    present = torch.stack([output.tokens[name].present() for name in NAMES]).all(dim=0)
    assert 0 < int(present.sum()) < len(present)
    expected = 0.0
    for sample in present.nonzero()[:, 0].tolist():
        parts = [(output.tokens[n].values[sample].detach(), output.tokens[n].valid()[sample]) for n in NAMES]
        expected += 0.7 * loop_scores(parts, model.concepts.concepts.detach(), 0.3) / len(present)
    result = balancer.penalty(output, inputs["target"])
    torch.testing.assert_close(result.detach(), torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_concepts_and_encoders_are_trained():
    model, balancer = build()
    balancer.penalty(model(batch(NAMES)), batch(NAMES)["target"]).backward()
    assert bool(model.concepts.concepts.grad.any())
    assert all(bool(parameter.grad.any()) for parameter in model.encoders.parameters() if parameter.ndim > 1)
    assert model.head.weight.grad is None


def test_zero_weight_skips_computation():
    model, balancer = build(weight=0.0)
    assert balancer.penalty(model(batch(NAMES)), batch(NAMES)["target"]) is None


def test_no_complete_samples():
    model, balancer = build()
    inputs = batch(NAMES)
    inputs["mask"] = {"text": torch.zeros(len(inputs["target"]), dtype=torch.bool)}
    assert float(balancer.penalty(model(inputs), inputs["target"]).detach()) == 0.0


@pytest.mark.parametrize(
    ("names", "options", "error"),
    [
        (("audio",), {}, "Consistency: expected two or more modalities, got audio"),
        (NAMES, {"weight": -1.0}, "Consistency: expected weight >= 0 and finite, got weight = -1.0"),
        (NAMES, {"kind": "ranks"}, "Did you mean 'rank'"),
        (NAMES, {"slots": 1}, "slots >= 2"),
    ],
)
def test_invalid_models_raise(names, options, error):
    with pytest.raises(ConfigError, match=error):
        build(names, **options)


def test_second_consistency_balancer_raises():
    model, _ = build()
    with pytest.raises(ConfigError, match="expected a model without concepts, got a second Consistency"):
        eq.balance.ConsistencyBalancer(model)
