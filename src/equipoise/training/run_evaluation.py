"""Metrics of a trained model on the test split: score, score under noise, and attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
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
from ..results.bootstrap import mean_of_resamples, percentile_interval, resampled_values
from ..results.bootstrap import settings as bootstrap_settings
from ..results.significance import pack_resamples, pack_text, unpack_outcomes
from ..results.task_metrics import Function, Metric, select_metrics
from .left_out import corrupted_scores
from .loss_module import SCORES, task_score
from .recipes import Recipe

BATCH = 256
NOISE_SEED = 0
"""Fixed, so that all runs get the same noise."""


def collect_test_predictions(
    model: FusionModel, source: data.Dataset, split: str, replaced: str | None = None, *, per_sample: bool = False
) -> CollectedPredictions:
    """Collects predictions on a split; ``replaced`` is a modality to replace by noise.

    The noise has the statistics of the training inputs, or with ``per_sample`` those of each sample.
    """
    noise = None
    if replaced is not None:
        level = "per_sample" if per_sample else "dataset"
        noise = NoiseSource(replaced, *source.noise[replaced], seed=NOISE_SEED, distribution=level)
    # In distributed training, every process reads the whole split.
    return collect_predictions(
        model, data.loader(source, split, BATCH, seed=0, train=False, rank=0, world=1), noise=noise
    )


def noise_modality(model: FusionModel, source: data.Dataset, recipe: Recipe) -> str:
    """Returns the noise modality of the recipe, or else the one with the largest share on validation data."""
    return recipe.noise_modality or most_attended(collect_test_predictions(model, source, "val"))


def evaluate_run(
    model: FusionModel | SelfContainedModel,
    source: data.Dataset,
    recipe: Recipe,
    *,
    metrics: Mapping[str, Function] | None = None,
) -> dict[str, Any]:
    """Returns metrics and outcomes as in ``results.json``; for models with attention also keys and shares.

    Args:
        model: a trained model.
        source: its data set; the test split is evaluated.
        recipe: names the metrics beside the score of the task.
        metrics: name -> function of your own, (predictions, targets) -> number, larger values are better; see
            ``equipoise.results.task_metrics.own_metric``.
    """
    if isinstance(model, SelfContainedModel):
        return evaluate_self_contained(model, source)
    clean = collect_test_predictions(model, source, "test")
    noisy = {name: collect_test_predictions(model, source, "test", name) for name in model.names}
    score = SCORES[model.task]
    # Noise in a modality that the model does not use has no effect.
    predictions = {score: clean} | {f"{score}_noise/{name}": noisy.get(name, clean) for name in source.names}
    chosen = select_metrics(recipe.metrics, model.task, "recipe: metrics", metrics)
    values = {metric: _score(one, model) for metric, one in predictions.items()}
    each = {metric: pack_text(outcomes(one.logits, one.target, model.task)) for metric, one in predictions.items()}
    result: dict[str, Any] = {"metrics": values, "outcomes": each}
    if (groups := getattr(source.split("test"), "groups", None)) is not None:
        number = {name: index for index, name in enumerate(dict.fromkeys(groups))}
        result["groups"] = pack_text([number[name] for name in groups])
    if chosen:
        add_metrics(result, model.task, clean, {name: noisy.get(name, clean) for name in source.names}, chosen)
    if clean.share is not None and clean.cosine is not None:
        target = noise_modality(model, source, recipe)
        with warnings.catch_warnings():
            # The correlation of constant attention is undefined: the metric is NaN, stored as null.
            warnings.simplefilter("ignore", UserWarning)
            response = response_from_shares(clean, noisy[target], target)
            own_noise = collect_test_predictions(model, source, "test", target, per_sample=True)
            own_response = response_from_shares(clean, own_noise, target)
        values |= {"noise_attention_r": response.r, "noise_attention_r_own": own_response.r}
        values |= {f"share/{name}": float(clean.share[..., i].mean()) for i, name in enumerate(clean.names)}
        values["air"] = imbalance_metrics(clean)
        result["noise_modality"] = target
        result["keys"] = {"after": key_metrics(clean, noisy[target])}
        result["shares"] = {"clean": _histogram(response.clean), "noise": _histogram(response.noise)}
    values |= corrupted_scores(model, source, recipe)
    compute = cost(model, source.batch("test", torch.tensor([0]), seed=0, epoch=0, train=False))
    values["parameters"], values["flops"] = compute.parameters, compute.flops
    return result


def add_metrics(
    result: dict[str, Any],
    task: str,
    clean: CollectedPredictions,
    noisy: Mapping[str, CollectedPredictions],
    metrics: Sequence[Metric],
) -> None:
    """Adds metrics on clean and noise input to the results of a run, with what intervals and paired tests need.

    Args:
        result: has ``metrics`` and ``outcomes`` of the score of the task, which gets intervals as well.
        task: of the model.
        clean: predictions on the test split.
        noisy: modality -> predictions with it replaced by noise.
        metrics: to measure.
    """
    score = SCORES[task]
    result |= {"intervals": {}, "resamples": {}, "undefined": {}, "bootstrap": bootstrap_settings(len(clean.logits))}
    outputs = {"": clean} | {f"_noise/{name}": one for name, one in noisy.items()}
    for condition, one in outputs.items():
        rows = mean_of_resamples(unpack_outcomes(result["outcomes"][score + condition]))
        _add_interval(result, score + condition, rows)
        for metric in metrics:
            name = metric.name + condition
            if metric.name == score:
                continue
            value, reason = metric.evaluate(one.logits, one.target, task)
            result["metrics"][name] = value
            if reason:
                result["undefined"][name] = reason
                continue
            each = metric.each(one.logits, one.target, task)
            rows = resampled_values(metric, one.logits, one.target, task)
            if each is not None:
                result["outcomes"][name] = pack_text(each)
            else:
                result["resamples"][name] = pack_resamples(rows)
            _add_interval(result, name, rows)


def _add_interval(result: dict[str, Any], name: str, rows: np.ndarray) -> None:
    if (interval := percentile_interval(rows)) is not None:
        result["intervals"][name] = interval


def evaluate_self_contained(model: SelfContainedModel, source: data.Dataset) -> dict[str, Any]:
    """Evaluates a self-contained model on the test split, and counts its trainable parameters."""
    with eval_mode_no_grad(model), torch.no_grad():
        result = model.evaluate(source)
    metrics = {name: float(value) for name, value in result["metrics"].items()}
    metrics["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**result, "metrics": metrics}


def key_metrics(clean: CollectedPredictions, noisy: CollectedPredictions) -> dict[str, Any]:
    """Returns the key distributions on clean and on noise input."""
    return {"clean": key_distribution(clean), "noise": key_distribution(noisy)}


def imbalance_metrics(predictions: CollectedPredictions) -> float:
    """Returns AIR of the first modality: mean query-key cosine minus that of the others; NaN without others."""
    if predictions.cosine is None or len(predictions.names) < 2:
        return math.nan
    first, *others = predictions.cosine.nanmean(dim=(0, 1)).tolist()
    return first - sum(others) / len(others)


def _score(predictions: CollectedPredictions, model: FusionModel) -> float:
    return float(task_score(predictions.logits, predictions.target, model.task))


def _histogram(values: torch.Tensor) -> dict[str, list[float]]:
    counts, edges = np.histogram(values.clamp(0, 1).numpy(), bins=40, range=(0.0, 1.0))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}
