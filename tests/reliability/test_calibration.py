"""Calibration: likelihoods by hand, recovery of known constants, conformal coverage."""

import math

import pytest
import torch

from equipoise.reliability.calibration import (
    ModalityRecords,
    conformal_threshold,
    fit_calibration,
    own_log_likelihood,
    reliability_logit,
)  # fmt: skip
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
    found = ModalityRecords()
    found.add(distance, temperature * logits, target, torch.ones(size, dtype=torch.bool))
    return found


def test_constants_are_recovered():
    found = fit_calibration({"audio": random_records(temperature=1.5)}, "classification")
    slope = float(found.log_slope[0].exp())
    # rho = 1 / 2 at this distance.
    middle = float(found.center[0] + found.intercept[0] / found.log_slope[0].exp())
    assert slope == pytest.approx(3.0, rel=0.3)
    assert middle == pytest.approx(0.5, abs=0.15)
    assert float(found.log_temperature.exp()) == pytest.approx(1.5, rel=0.15)


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


def test_reliability_decreases_with_the_distance():
    distance = torch.tensor([[-torch.inf], [0.0], [1.0], [torch.inf]])
    one = torch.ones(1)
    rho = reliability_logit(distance, one, one, 0 * one).sigmoid().flatten()
    assert rho.diff().max() < 0
    assert rho[0] == 1
    assert rho[-1] == 0


def test_non_finite_samples_are_excluded():
    found = ModalityRecords()
    logits = torch.zeros(4, 3)
    logits[1, 0] = torch.nan
    valid = torch.tensor([True, True, True, False])
    found.add(torch.tensor([1.0, 2.0, torch.inf, 4.0]), logits, torch.arange(4), valid)
    distance, _, target = found.joined()
    assert distance.tolist() == [1.0]
    assert target.tolist() == [0]


def test_conformal_coverage_of_exchangeable_samples():
    alpha, size, new, repeats = 0.1, 49, 200, 1000
    random = torch.Generator().manual_seed(0)
    exceeded = []
    for _ in range(repeats):
        scores = torch.randn(size + new, generator=random)
        exceeded.append(float((scores[size:] > conformal_threshold(scores[:size], alpha)).double().mean()))
    mean = sum(exceeded) / repeats
    error = 4 * math.sqrt(alpha * (1 - alpha) / (size + 2) / repeats) + 4 * math.sqrt(alpha / new / repeats)
    # Without ties the probability is between alpha - 1 / (n + 1) and alpha; here it is exactly alpha: 50 * 0.9 = 45.
    assert mean == pytest.approx(alpha, abs=error)


def test_conformal_threshold_is_infinite_for_few_samples():
    assert math.isinf(conformal_threshold(torch.arange(9.0), 0.05))
    assert conformal_threshold(torch.arange(19.0), 0.05) == 18.0
    assert math.isinf(conformal_threshold(torch.zeros(0), 0.5))
