"""Scores of every task, and of constant predictions, against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.diagnostics.task_scores import (
    SCORES,
    check_answers,
    constant_answer,
    correct,
    outcomes,
    score_name,
    task_score,
)
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from helpers.fusion import joint_model
from helpers.tolerance import TOL
from oracles.task_scores import slow_score

EXACT = TOL[torch.float64]


def random_predictions(task, samples, outputs, seed):
    random = torch.Generator().manual_seed(seed)
    logits, values = torch.randn(2, samples, outputs, generator=random, dtype=torch.float64)
    if task == "classification":
        return logits, torch.randint(outputs, (samples,), generator=random)
    return logits, (values > 0).double() if task == "multilabel" else values


@pytest.mark.parametrize("task", SCORES)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 11), st.integers(2, 5), st.integers(0, 1000))
def test_score_against_loops(task, samples, outputs, seed):
    logits, target = random_predictions(task, samples, outputs, seed)
    result = float(task_score(logits, target, task))
    assert result == pytest.approx(slow_score(logits.tolist(), target.tolist(), task), abs=TOL[torch.float32]["atol"])


@pytest.mark.parametrize("task", SCORES)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 13), st.integers(2, 5), st.integers(0, 1000))
def test_no_constant_prediction_is_better(task, samples, outputs, seed):
    _, target = random_predictions(task, samples, outputs, seed)
    constant = constant_answer(target, task)
    result = float(task_score(constant.expand(samples, -1), target, task))
    if task == "classification":
        most = max(target.tolist().count(label) for label in range(outputs))
        assert result == pytest.approx(most / samples)
    elif task == "multilabel":
        ones = [sum(row[label] for row in target.tolist()) for label in range(outputs)]
        assert result == pytest.approx(sum(max(n, samples - n) for n in ones) / samples / outputs)
    else:
        # The error is convex and has its corners at the targets, so one of them is best.
        columns = list(zip(*target.tolist(), strict=True))
        best = [min(sum(abs(value - other) for other in column) for value in column) for column in columns]
        assert result == pytest.approx(-sum(best) / samples / outputs)


def test_single_output_with_integer_targets():
    assert constant_answer(torch.tensor([1, 2, 6]), "regression").tolist() == [2.0]
    result = float(task_score(torch.tensor([[2.0]]).expand(3, -1), torch.tensor([1, 2, 6]), "regression"))
    assert result == pytest.approx(-5 / 3)


@pytest.mark.parametrize("task", SCORES)
def test_score_is_the_mean_of_outcomes(task):
    logits, target = random_predictions(task, 17, 3, 5)
    each = outcomes(logits, target, task)
    assert each.shape == (17,)
    assert float(each.double().mean()) == pytest.approx(float(task_score(logits, target, task)))
    for index in range(17):
        alone = task_score(logits[index : index + 1], target[index : index + 1], task)
        assert float(each[index]) == pytest.approx(float(alone))


def test_tied_logits_share_the_credit():
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 1.0, 0.5], [1.0, 1.0, 0.0], [torch.nan, 1.0, 0.0]])
    result = correct(logits, torch.tensor([1, 2, 1, 2, 1]))
    assert result[:4].tolist() == pytest.approx([1 / 2, 1 / 3, 1.0, 0.0])
    assert result[4].isnan()
    # A constant model is at chance, whatever class 0 is.
    for target in (0, 3):
        assert float(task_score(torch.zeros(7, 4), torch.full((7,), target), "classification")) == 0.25


def test_errors():
    model, logits = joint_model(), torch.tensor([[1.0, 0.0]] * 3)
    assert score_name(model, logits, torch.tensor([0, 0, 1]), "who") == pytest.approx(2 / 3)
    with pytest.raises(ConfigError, match=r"who: expected a model with task = classification, .* task = None\. Set"):
        score_name(torch.nn.Linear(2, 3), logits, torch.zeros(3), "who")
    with pytest.raises(ShapeError, match=r"who: expected a target for each of 3 samples, got 0\. Give every batch"):
        score_name(model, logits, torch.zeros(0), "who")
    logits[1, 1] = math.nan
    message = r"who: expected logits without NaN, got NaN for 1 of 3 samples, the first is number 1\. Check the input"
    with pytest.raises(NonFiniteError, match=message):
        score_name(model, logits, torch.tensor([0, 0, 1]), "who")
    check_answers(torch.tensor([[0.0, -math.inf]]), "who")
