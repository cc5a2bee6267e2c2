"""The figures of a trained model on the test split: its score, the score under noise, attention."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

from .. import data
from ..diagnostics.compute_cost import cost
from ..diagnostics.key_plot_data import key_distribution
from ..diagnostics.noise_test import most_attended, response_from_shares
from ..diagnostics.prediction_collection import CollectedPredictions, NoiseSource, collect_predictions
from ..diagnostics.task_scores import outcomes
from ..models.fusion_model import FusionModel
from ..models.self_contained import SelfContainedModel
from ..nn.eval_mode import eval_mode_no_grad
from ..results.significance import pack_text
from .loss_module import SCORES, task_score
from .recipes import Recipe

BATCH = 256
NOISE_SEED = 0
"""Every run meets the same noise."""


def collect_test_predictions(
    model: FusionModel, source: data.Dataset, split: str, replaced: str | None = None
) -> CollectedPredictions:
    """The model on a split, one modality replaced by noise of the training statistics where it is named."""
    noise = None if replaced is None else NoiseSource(replaced, *source.noise[replaced], seed=NOISE_SEED)
    # Each process of a distributed training reads the whole split.
    return collect_predictions(
        model, data.loader(source, split, BATCH, seed=0, train=False, rank=0, world=1), noise=noise
    )


def _own_noise(model: FusionModel, source: data.Dataset, replaced: str) -> CollectedPredictions:
    """The model on the test split, one modality replaced by noise of each sample's own mean and deviation."""
    noise = NoiseSource(replaced, seed=NOISE_SEED, distribution="per_sample")
    return collect_predictions(
        model, data.loader(source, "test", BATCH, seed=0, train=False, rank=0, world=1), noise=noise
    )


def noise_modality(model: FusionModel, source: data.Dataset, recipe: Recipe) -> str:
    """The recipe's, or the one that validation data show to be attended most."""
    return recipe.noise_modality or most_attended(collect_test_predictions(model, source, "val"))


def evaluate_run(model: FusionModel | SelfContainedModel, source: data.Dataset, recipe: Recipe) -> dict[str, Any]:
    """metrics, outcomes, and for models with attention keys and shares, as ``results.json`` holds them."""
    if isinstance(model, SelfContainedModel):
        return evaluate_self_contained(model, source)
    clean = collect_test_predictions(model, source, "test")
    noisy = {name: collect_test_predictions(model, source, "test", name) for name in model.names}
    named = SCORES[model.task]
    # What a model does not read cannot disturb it.
    seen = {named: clean} | {f"{named}_noise/{name}": noisy.get(name, clean) for name in source.names}
    metrics = {metric: _score(one, model) for metric, one in seen.items()}
    each = {metric: pack_text(outcomes(one.logits, one.target, model.task)) for metric, one in seen.items()}
    found: dict[str, Any] = {"metrics": metrics, "outcomes": each}
    if clean.share is not None and clean.cosine is not None:
        target = noise_modality(model, source, recipe)
        with warnings.catch_warnings():
            # A constant attention has no correlation: the figure is NaN, written as null, and the report says so.
            warnings.simplefilter("ignore", UserWarning)
            answer = response_from_shares(clean, noisy[target], target)
            own = response_from_shares(clean, _own_noise(model, source, target), target)
        metrics |= {"noise_attention_r": answer.r, "noise_attention_r_own": own.r}
        metrics |= {f"share/{name}": float(clean.share[..., i].mean()) for i, name in enumerate(clean.names)}
        metrics["air"] = imbalance_metrics(clean)
        found["noise_modality"] = target
        found["keys"] = {"after": key_metrics(model, source, target, split="test")}
        found["shares"] = {"clean": _histogram(answer.clean), "noise": _histogram(answer.noise)}
    spent = cost(model, source.batch("test", torch.tensor([0]), seed=0, epoch=0, train=False))
    metrics["parameters"], metrics["flops"] = spent.parameters, spent.flops
    return found


def evaluate_self_contained(model: SelfContainedModel, source: data.Dataset) -> dict[str, Any]:
    """What the model says of itself on the test split, and how many numbers it learned."""
    with eval_mode_no_grad(model), torch.no_grad():
        found = model.evaluate(source)
    metrics = {name: float(value) for name, value in found["metrics"].items()}
    metrics["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**found, "metrics": metrics}


def key_metrics(model: FusionModel, source: data.Dataset, replaced: str, *, split: str) -> dict[str, Any]:
    """Key distributions on clean and on noise input."""
    return {
        "clean": key_distribution(collect_test_predictions(model, source, split)),
        "noise": key_distribution(collect_test_predictions(model, source, split, replaced)),
    }


def imbalance_metrics(seen: CollectedPredictions) -> float:
    """AIR of the first modality: mean cosine of query and key, minus the mean of the others'; NaN without others."""
    if seen.cosine is None or len(seen.names) < 2:
        return math.nan
    first, *others = seen.cosine.nanmean(dim=(0, 1)).tolist()
    return first - sum(others) / len(others)


def _score(seen: CollectedPredictions, model: FusionModel) -> float:
    return float(task_score(seen.logits, seen.target, model.task))


def _histogram(values: torch.Tensor) -> dict[str, list[float]]:
    counts, edges = np.histogram(values.clamp(0, 1).numpy(), bins=40, range=(0.0, 1.0))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}
