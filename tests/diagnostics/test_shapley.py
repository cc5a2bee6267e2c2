"""Shapley values against all orders of arrival, and their axioms."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.diagnostics.shapley_test import modality_shapley
from equipoise.diagnostics.task_scores import constant_answer
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from equipoise.fusion.subset_tokens import modality_subsets, shapley_values
from helpers.fusion import DIM, NAMES, batch, joint_model
from helpers.steps import attention_model
from helpers.tasks import TASKS, batch_for
from helpers.tolerance import TOL
from oracles.task_scores import slow_score

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]


def slow_shapley(names, worth):
    """Who comes adds; the mean over all orders."""
    added = {name: [] for name in names}
    for order in itertools.permutations(names):
        for index, name in enumerate(order):
            before = frozenset(order[:index])
            added[name].append(worth[before | {name}] - worth[before])
    return {name: sum(values) / len(values) for name, values in added.items()}


def shapley_by_name(names, worth):
    values = torch.tensor([worth[frozenset(some)] for some in modality_subsets(names)], dtype=torch.float64)
    return dict(zip(names, shapley_values(values).tolist(), strict=True))


def all_subsets(names):
    return [frozenset(some) for size in range(len(names) + 1) for some in itertools.combinations(names, size)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.data())
def test_against_all_orders(count, data):
    names = NAMES[:count]
    worth = {some: data.draw(st.floats(-1, 1)) for some in all_subsets(names)}
    result = shapley_by_name(names, worth)
    assert result == pytest.approx(slow_shapley(names, worth), rel=EXACT["rtol"], abs=EXACT["atol"])
    full = worth[frozenset(names)] - worth[frozenset()]
    assert sum(result.values()) == pytest.approx(full, rel=EXACT["rtol"], abs=EXACT["atol"])


def test_hand_computed_values():
    # One modality says all, one says the same again, one says nothing: the first two share.
    names = ("audio", "image", "text")
    worth = {some: 0.9 if some & {"audio", "image"} else 0.1 for some in all_subsets(names)}
    assert shapley_by_name(names, worth) == pytest.approx({"audio": 0.4, "image": 0.4, "text": 0.0})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES[:3]], ids=len)
def test_on_a_model(task, names):
    model = attention_model(names, task=task, unimodal="none").eval()
    batches = [batch_for(task, names, seed=seed, missing=names[:-1]) for seed in range(2)]
    target = torch.cat([inputs["target"] for inputs in batches])
    worth = {}
    for some in all_subsets(names):
        if some:
            gone = dict.fromkeys(set(names) - some)
            with torch.no_grad():
                logits = torch.cat([model({**inputs, **gone}).logits for inputs in batches])
        else:
            logits = constant_answer(target, task).expand(len(target), -1)
        worth[some] = slow_score(logits.tolist(), target.tolist(), task)
    result = modality_shapley(model, batches)
    assert result == pytest.approx(slow_shapley(names, worth), rel=10 * SINGLE["rtol"], abs=SINGLE["atol"])
    assert list(result) == list(names)
    full = worth[frozenset(names)] - worth[frozenset()]
    assert math.fsum(result.values()) == pytest.approx(full, abs=SINGLE["atol"])


def test_unused_modality_has_shapley_value_zero():
    model = attention_model(fusion=eq.fusion.Unimodal(DIM, modality="image"), task="regression", unimodal="none")
    batches = [batch_for("regression", seed=seed) for seed in range(2)]
    result = modality_shapley(model, batches)
    assert result["image"] != 0
    # Without other modalities the prediction is the bias, whose score differs from that of the median target.
    bias = model.head.bias.expand(10, -1).tolist()
    target = torch.cat([inputs["target"] for inputs in batches])
    median = target.median(dim=0).values.expand(10, -1).tolist()
    gap = slow_score(bias, target.tolist(), "regression") - slow_score(median, target.tolist(), "regression")
    assert result["audio"] == pytest.approx(gap / 2, rel=10 * SINGLE["rtol"])


def test_errors():
    names = tuple(f"sensor{number}" for number in range(9))
    wide = eq.FusionModel({name: torch.nn.Linear(2, 3) for name in names}, eq.fusion.Concat(3), 2)
    with pytest.raises(ConfigError, match="modality_shapley: expected at most 8 modalities, got 9"):
        modality_shapley(wide, [])
    with pytest.raises(ConfigError, match=r"modality_shapley: expected a FusionModel, .* got Linear without names"):
        modality_shapley(torch.nn.Linear(2, 3), [batch()])
    with pytest.raises(ShapeError, match="at least one batch, got none"):
        modality_shapley(joint_model(), [])
    without = {name: value for name, value in batch().items() if name != "target"}
    with pytest.raises(ShapeError, match="modality_shapley: expected a target for each of 5 samples, got 0"):
        modality_shapley(joint_model(), [without])
    broken = {**batch(), "audio": torch.full((5, 7, 3), math.nan).double()}
    with pytest.raises(NonFiniteError, match="modality_shapley: expected logits without NaN, got NaN for 5 of 5"):
        modality_shapley(joint_model(), [broken])
