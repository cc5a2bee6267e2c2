"""Calibration: likelihoods by hand, recovery of known constants, conformal coverage."""

import math

import pytest
import torch

from equipoise.reliability import calibration, calibration_records
from equipoise.reliability.calibration import (
    conformal_threshold,
    fit_calibration,
    own_log_likelihood,
    reliability_logit,
)  # fmt: skip
from equipoise.reliability.calibration_records import CalibrationRecords
from equipoise.reliability.marginalization import usable_subsets
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
CLASSES = 7


def random_records(*, slope=3.0, at=0.5, size=4000, temperature=1.0, seed=0):
    """Data of a modality whose predictions are right with the probability they state, if it is usable, else random."""
    random = torch.Generator().manual_seed(seed)
    distance = 2 * torch.randn(size, generator=random, dtype=torch.float64)
    usable = torch.rand(size, generator=random, dtype=torch.float64) < torch.sigmoid(-slope * (distance - at))
    logits = 2 * torch.randn(size, CLASSES, generator=random, dtype=torch.float64)
    right = logits.softmax(dim=1).multinomial(1, generator=random)[:, 0]
    target = torch.where(usable, right, torch.randint(CLASSES, (size,), generator=random))
    result = CalibrationRecords(random)
    present = torch.ones(size, 1, dtype=torch.bool)
    for part in torch.arange(size).split(size // 3):
        result.add(distance[part][:, None, None], temperature * logits[part][:, None], target[part], present[part])
    return result


def test_constants_are_recovered(monkeypatch):
    # The mixture of a single modality does not depend on its reliability.
    monkeypatch.setattr(calibration, "OWN_WEIGHT", 1e4)
    result = fit_calibration(random_records(temperature=1.5), usable_subsets(1), "classification")
    slope = float(result.log_slope[0].exp())
    # rho = 1 / 2 at this distance.
    middle = float(result.center[0, 0] + result.intercept[0] / slope)
    assert slope == pytest.approx(3.0, rel=0.3)
    assert middle == pytest.approx(0.5, abs=0.2)


def pair(*, size=3000, contradict, seed=0):
    """Two modalities with equal evidence; the first is right, and the second contradicts it or is right as well."""
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (size,), generator=random)
    other = (target + 1) % CLASSES if contradict else target
    flip = torch.rand(size, generator=random) < 0.5
    first, second = torch.where(flip, target, other), torch.where(flip, other, target)
    single = 6.0 * torch.nn.functional.one_hot(torch.stack([first, second], dim=1), CLASSES).double()
    third = 6.0 * torch.nn.functional.one_hot(target, CLASSES).double()[:, None]
    # Subsets of two modalities: both, the first, the second. Both together predict another class.
    both = 6.0 * torch.nn.functional.one_hot((target + 2) % CLASSES, CLASSES).double()[:, None]
    result = CalibrationRecords(random)
    logits = torch.cat([both if contradict else third, single], dim=1)
    result.add(torch.zeros(size, 2, 1, dtype=torch.float64), logits, target, torch.ones(size, 2, dtype=torch.bool))
    return result


def test_agreement_has_weight_where_contradicting_modalities_should_not_be_fused():
    subsets = usable_subsets(2)
    weights = [
        float(fit_calibration(pair(contradict=contradict), subsets, "classification").log_agreement.exp())
        for contradict in (True, False)
    ]
    assert weights[0] > 1 > 0.9 > weights[1]


def test_a_random_subset_of_many_records_is_kept(monkeypatch):
    monkeypatch.setattr(calibration_records, "MOST_VALUES", 50 * CLASSES)
    evidence, logits, target, present = random_records(size=4000).joined()
    assert [len(part) for part in (evidence, logits, target, present)] == [50] * 4
    whole = random_records(size=4000, temperature=1.0)
    assert whole.count() == [50] or whole.count()[0] < 4000


def test_likelihood_of_each_task_by_hand():
    logit = torch.tensor([0.7], dtype=torch.float64)
    rho = float(logit.sigmoid())
    zero = torch.tensor(0.0, dtype=torch.float64)
    logits = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    classes = own_log_likelihood(logit, logits, torch.tensor([2]), "classification", torch.tensor(math.log(2.0)))
    p = float((logits / 2).softmax(dim=1)[0, 2])
    assert float(classes) == pytest.approx(math.log(rho * p + (1 - rho) / 3), abs=EXACT["atol"])
    labels = own_log_likelihood(logit, logits, torch.tensor([[1, 0, 0]]), "multilabel", zero)
    yes = logits.sigmoid()[0].tolist()
    p = yes[0] * (1 - yes[1]) * (1 - yes[2])
    assert float(labels) == pytest.approx(math.log(rho * p + (1 - rho) / 8), abs=EXACT["atol"])
    moments = torch.tensor([3.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    value = own_log_likelihood(
        logit,
        logits[:, :1],
        torch.tensor([4.0], dtype=torch.float64),
        "regression",
        torch.tensor(math.log(0.5)),
        moments,
    )
    # In units of the standard deviation of the targets, 2: an error of 1.5 and a deviation of 0.5.
    p = math.exp(-0.5 * 3**2) / 0.5 / math.sqrt(2 * math.pi)
    chance = math.exp(-0.5 * 0.5**2) / math.sqrt(2 * math.pi)
    assert float(value) == pytest.approx(math.log(rho * p + (1 - rho) * chance), abs=1e-6)


def test_reliability_decreases_with_the_evidence_against_it():
    evidence = torch.tensor([[[-torch.inf, 0.0]], [[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 2.0]], [[torch.inf, 0.0]]])
    one = torch.ones(1, 2)
    rho = reliability_logit(evidence, one[:, 0], one, 0 * one).sigmoid().flatten()
    assert rho.diff().max() < 0
    assert rho[0] == 1
    assert rho[-1] == 0


def test_non_finite_samples_are_excluded():
    result = CalibrationRecords(torch.Generator())
    logits = torch.zeros(4, 3, 3)
    logits[1, 0, 0] = torch.nan
    evidence = torch.zeros(4, 2, 1)
    evidence[:, 0, 0] = torch.tensor([1.0, 2.0, torch.inf, 4.0])
    present = torch.tensor([[True, True], [True, True], [True, True], [False, False]])
    result.add(evidence, logits, torch.arange(4), present)
    values, _, target, left = result.joined()
    assert values[0, 0].tolist() == [1.0]
    # The second modality of the third sample is used, the first is not.
    assert target.tolist() == [0, 2]
    assert left.tolist() == [[True, True], [False, True]]
    assert result.count() == [1, 2]


@pytest.mark.parametrize(("alpha", "size"), [(0.1, 49), (0.02, 99)])
def test_conformal_coverage_of_exchangeable_samples(alpha, size):
    new, repeats = 200, 1000
    random = torch.Generator().manual_seed(0)
    exceeded = []
    for _ in range(repeats):
        scores = torch.randn(size + new, generator=random)
        exceeded.append(float((scores[size:] > conformal_threshold(scores[:size], alpha)).double().mean()))
    mean = sum(exceeded) / repeats
    error = 4 * math.sqrt(alpha * (1 - alpha) / (size + 2) / repeats) + 4 * math.sqrt(alpha / new / repeats)
    # Without ties the probability is between alpha - 1 / (n + 1) and alpha; here it is exactly alpha: (n + 1) alpha is
    # an integer.
    assert mean == pytest.approx(alpha, abs=error)


def test_conformal_threshold_is_infinite_for_few_samples():
    assert math.isinf(conformal_threshold(torch.arange(9.0), 0.05))
    assert conformal_threshold(torch.arange(19.0), 0.05) == 18.0
    assert math.isinf(conformal_threshold(torch.zeros(0), 0.5))
