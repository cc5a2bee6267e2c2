"""Subset weights and mixtures against explicit enumeration in float64."""

import itertools
import math

import pytest
import torch

from equipoise.reliability.marginalization import (
    UNIFORM,
    mix_predictions,
    single_subsets,
    subset_agreement,
    subset_log_weights,
    subset_log_weights_of_logits,
    usable_subsets,
)
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]


def enumerated_mixture(rho, present, subsets):
    """{set of present modalities: weight} of one sample, by loops."""
    weights = {}
    for subset in subsets:
        left = frozenset(m for m in subset if present[m])
        if left or not any(present):
            factors = [rho[m] if m in left else 1 - rho[m] for m in range(len(rho)) if present[m]]
            weights[left] = math.prod(factors)
    total = sum(weights.values())
    return {left: weight / total for left, weight in weights.items()}


def listed_subsets(count):
    if count <= 4:
        return [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
    everything = tuple(range(count))
    rest = [tuple(m for m in everything if m != out) for out in everything]
    return [everything, *rest, *((m,) for m in everything)]


def random_case(count, seed=0, batch=23):
    random = torch.Generator().manual_seed(seed)
    rho = torch.rand(batch, count, generator=random, dtype=torch.float64)
    present = torch.rand(batch, count, generator=random) < 0.7
    present[0], present[1] = True, False
    logits = torch.randn(batch, len(usable_subsets(count)), 5, generator=random, dtype=torch.float64)
    return rho, present, logits


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_subsets(count):
    subsets = usable_subsets(count)
    assert sorted(tuple(row.nonzero()[:, 0].tolist()) for row in subsets) == sorted(listed_subsets(count))
    assert bool(subsets[0].all())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_weights_against_enumeration(count):
    rho, present, _ = random_case(count)
    subsets = usable_subsets(count)
    weights = subset_log_weights(rho, present, subsets).exp()
    assert torch.allclose(weights.sum(dim=1), torch.ones(len(rho), dtype=torch.float64), **EXACT)
    for sample in range(len(rho)):
        expected = enumerated_mixture(rho[sample].tolist(), present[sample].tolist(), listed_subsets(count))
        result = {}
        for subset, weight in zip(subsets, weights[sample].tolist(), strict=True):
            left = frozenset((subset & present[sample]).nonzero()[:, 0].tolist())
            if weight:
                assert left not in result, "equal subsets count once"
                result[left] = weight
        assert result == pytest.approx({s: w for s, w in expected.items() if w}, abs=EXACT["atol"])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_mixtures_against_enumeration(count, task):
    rho, present, logits = random_case(count, seed=1)
    subsets = usable_subsets(count)
    weights = subset_log_weights(rho, present, subsets)
    mixed = mix_predictions(logits, weights, task, 1.7)
    for sample in range(len(rho)):
        parts = logits[sample] / 1.7
        if task == "classification":
            parts = parts.softmax(dim=1)
        elif task == "multilabel":
            parts = parts.sigmoid()
        else:
            parts = logits[sample]
        expected = sum(w * p for w, p in zip(weights[sample].exp(), parts, strict=True))
        result = mixed[sample]
        result = {"classification": result.exp(), "multilabel": result.sigmoid(), "regression": result}[task]
        assert torch.allclose(result, expected, **EXACT)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_certain_reliability_selects_the_full_set(count):
    ones = torch.ones(3, count)
    present = torch.ones(3, count, dtype=torch.bool)
    logits = torch.randn(3, len(usable_subsets(count)), 5)
    weights = subset_log_weights(ones, present, usable_subsets(count))
    assert torch.equal(mix_predictions(logits, weights, "classification"), logits[:, 0].log_softmax(dim=1))
    assert torch.equal(mix_predictions(logits, weights, "regression"), logits[:, 0])


def test_samples_without_matching_subset_have_finite_weights():
    subsets = usable_subsets(5)
    present = torch.ones(1, 5, dtype=torch.bool)
    # Two unusable modalities of five: no subset in the list has exactly the other three.
    weights = subset_log_weights(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]), present, subsets).exp()
    assert float(weights.sum()) == pytest.approx(1)
    none = subset_log_weights(torch.zeros(1, 5), present, subsets).exp()
    # All are unusable: the single modalities have equal weights.
    assert none[0, -5:].tolist() == pytest.approx([0.2] * 5, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_agreement_against_enumeration(count, task):
    """Sums over targets, and for several labels over all their combinations."""
    rho, present, _ = random_case(count, seed=2)
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(len(rho), count, 3, generator=random, dtype=torch.float64)
    subsets = usable_subsets(count)
    found = subset_agreement(logits, present, subsets, task, 1.7).exp()
    for sample in range(len(rho)):
        for number, subset in enumerate(subsets):
            left = (subset & present[sample]).nonzero()[:, 0].tolist()
            if task == "regression":
                expected = 1.0
            elif task == "classification":
                p = {m: (1 - UNIFORM) * (logits[sample, m] / 1.7).softmax(dim=0) + UNIFORM / 3 for m in left}
                expected = sum(math.prod(3 * float(p[m][y]) for m in left) / 3 for y in range(3))
            else:
                yes = {m: (1 - UNIFORM) * (logits[sample, m] / 1.7).sigmoid() + UNIFORM / 2 for m in left}
                expected = 0.0
                for labels in itertools.product((0, 1), repeat=3):
                    each = [
                        math.prod(2 * float(yes[m][k] if y else 1 - yes[m][k]) for m in left) / 2
                        for k, y in enumerate(labels)
                    ]
                    expected += math.prod(each)
            assert float(found[sample, number]) == pytest.approx(expected, rel=1e-9)


def test_the_odd_one_out_of_three_loses_weight():
    logits = torch.tensor([[[8.0, 0.0, 0.0], [8.0, 0.0, 0.0], [0.0, 8.0, 0.0]]])
    subsets, present = usable_subsets(3), torch.ones(1, 3, dtype=torch.bool)
    rho = torch.full((1, 3), 0.7)
    weights = subset_log_weights(rho, present, subsets, subset_agreement(logits, present, subsets, "classification"))
    assert subsets[int(weights.argmax())].tolist() == [True, True, False]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_weights_from_logits_are_those_from_probabilities(count):
    rho, present, _ = random_case(count)
    subsets = usable_subsets(count)
    agreement = torch.randn(len(rho), len(subsets), dtype=torch.float64)
    expected = subset_log_weights(rho, present, subsets, agreement).exp()
    found = subset_log_weights_of_logits(rho.logit(), present, subsets, agreement).exp()
    assert torch.allclose(found, expected, **EXACT)
    assert [subsets[i].nonzero().flatten().tolist() for i in single_subsets(subsets)] == [[m] for m in range(count)]
