"""Tests of a diagnosis: functions from a DiagnosticContext to metrics and details."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ..compute_cost import cost as costs
from ..consistency_test import attention_consistency
from ..corruption_test import corruption_curve
from ..encoder_gradients import gradient_norms
from ..information_test import information as information_of
from ..key_distributions import geometry_of
from ..key_plot_data import key_distribution
from ..modality_masking import mask_modality
from ..noise_test import response_from_shares as response_of
from ..ood_test import ood as ood_of
from ..quag_test import quag as quag_of
from ..robustness_test import robustness as robustness_of
from ..shapley_test import modality_shapley
from ..share_accumulation import share_statistics
from ..share_spread_test import share_entropy, share_quality_correlation, share_spread
from .diagnostic_context import DiagnosticContext, SkippedTest, outputs_differ
from .layer_tests import attention_rows, collapse_rows, gaps
from .score_test import TestResult, score

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROBUSTNESS_SEVERITIES = (1, 3, 5)


def noise(context: DiagnosticContext) -> TestResult:
    """Score with each modality replaced by noise, and the fraction of changed predictions."""
    context.needs_targets()
    metrics: dict[str, float] = {}
    logits: dict[str, Tensor] = {}
    for name in context.names:
        noisy = context.noisy(name)
        metric = f"{context.score}_noise/{name}"
        metrics[metric], logits[metric] = context.worth(noisy.logits), noisy.logits
        metrics[f"changed_noise/{name}"] = outputs_differ(context.clean.logits, noisy.logits, context.task)
        for other in context.others:
            score = other.evaluate(noisy.logits, context.clean.target, str(context.task))
            metrics[f"{other.name}_noise/{name}"] = score.value
    statistics = {name: list(context.statistics(name)) for name in context.names}
    return TestResult(metrics, {"statistics": statistics, **context.evidence(logits)})


def response(context: DiagnosticContext) -> TestResult:
    """Response of attention to noise in one modality."""
    context.needs_attention(keys=False)
    context.needs_several("attention cannot move to another modality")
    target = context.replaced
    with warnings.catch_warnings():
        # r is NaN for constant attention, which is reported as a finding.
        warnings.simplefilter("ignore", UserWarning)
        answers = {name: response_of(context.clean, context.noisy(name), name) for name in context.names}
        own_level = response_of(context.clean, context.noisy_own(target), target)
    answer = answers[target]
    metrics = {"noise_attention_r": answer.r, "noise_attention_r_same": answer.r_same, "noise_attention_p": answer.p}
    metrics["noise_attention_r_own"] = own_level.r
    each = {name: {"r": result.r, "r_same": result.r_same, "p": result.p} for name, result in answers.items()}
    shares = {"clean": _histogram(answer.clean, 0, 1), "noise": _histogram(answer.noise, 0, 1)}
    return TestResult(
        metrics, {"modality": target, "chosen": context.modality is not None, "each": each, "shares": shares}
    )


def corruption(context: DiagnosticContext) -> TestResult:
    """Score and attention under increasing corruption of each modality."""
    context.needs_targets()
    curves = {
        name: corruption_curve(
            context.model, context.batches, modality=name, levels=LEVELS, seed=context.seed, metric=context.metric
        )
        for name in context.names
    }
    metrics = {f"area/{name}": curve.area for name, curve in curves.items()}
    return TestResult(metrics, {"curves": {name: asdict(curve) for name, curve in curves.items()}})


def masking(context: DiagnosticContext) -> TestResult:
    """Score with each modality masked."""
    context.needs_targets()
    context.needs_parts()
    context.needs_several("no modality remains without it")
    result = mask_modality(context.model, context.batches(), metric=context.metric)
    evidence = context.evidence({f"{context.score}_mask/{name}": part for name, part in result.logits.items()})
    details = {"semantics": result.semantics, "full": result.full, "without": result.without, "drop": result.drop}
    metrics = {f"{context.score}_mask/{name}": left for name, left in result.without.items()}
    return TestResult(metrics, {**details, **evidence})


def shapley(context: DiagnosticContext) -> TestResult:
    """Shapley values of the modalities."""
    context.needs_targets()
    context.needs_parts()
    context.needs_several("its Shapley value is the whole score")
    worth = modality_shapley(context.model, context.batches(), metric=context.metric)
    return TestResult({f"shapley/{name}": value for name, value in worth.items()}, {"values": worth})


def quag(context: DiagnosticContext) -> TestResult:
    """Score with the attention of the fusion averaged in quadrants."""
    context.needs_targets()
    context.needs_several("there are no quadrants")
    result = quag_of(context.model, context.batches(), metric=context.metric)
    metrics = {f"quag/{operator}": value for operator, value in result.scores.items()}
    evidence = context.evidence({f"quag/{operator}": part for operator, part in result.logits.items()})
    details = {"origin": result.origin, "drops": dict(result.drops), "changed": dict(result.changed)}
    return TestResult(metrics, {**details, **evidence})


def gradients(context: DiagnosticContext) -> TestResult:
    """Gradient norms of the encoders."""
    context.needs_targets()
    context.needs_parts()
    result = gradient_norms(context.model, context.batches())
    metrics = {f"gradient/{name}": norm for name, norm in result.parameters.items()}
    return TestResult(metrics | {f"gradient_output/{name}": n for name, n in result.outputs.items()}, asdict(result))


def keys(context: DiagnosticContext) -> TestResult:
    """Query–key geometry of each modality, with and without noise."""
    context.needs_attention()
    context.needs_several("its keys cannot be compared with others")
    noisy = context.noisy(context.replaced)
    result = geometry_of(context.clean, noisy, context.replaced)
    airs = {name: value for name, value in result.air.items() if value is not None}
    metrics = {f"air/{name}": value for name, value in airs.items()}
    if context.names[0] in airs:
        metrics = {"air": airs[context.names[0]], **metrics}
    metrics |= {f"key_shift/{name}": shift for name, shift in result.shift.items() if shift is not None}
    metrics |= {} if result.range is None else {"key_range": result.range}
    return TestResult(metrics, {**result.to_dict(), "noise": key_distribution(noisy)})


def attention(context: DiagnosticContext) -> TestResult:
    """Attention shares by layer and head, their entropy, and their variation over samples."""
    layers = [] if context.seen is None or not context.seen.layers else attention_rows(context.seen)
    if context.clean.share is None and not layers:
        raise SkippedTest("the model has no recorded attention over several modalities")
    details: dict[str, Any] = {"layers": layers}
    if context.seen is not None and context.seen.missing:
        details["missing"] = context.seen.missing
    share = context.clean.share
    if share is None:
        return TestResult({}, details)
    spread = share_spread(share)
    metrics = {f"share/{name}": float(share[..., index].nanmean()) for index, name in enumerate(context.names)}
    metrics |= {f"share_spread/{name}": float(value) for name, value in zip(context.names, spread.spread, strict=True)}
    if len(context.names) > 1:
        metrics["share_entropy"] = float(share_entropy(share, normalized=True).nanmean())
        metrics |= _quality_correlation(context, share)
    details["readout"] = share_statistics(share, context.names)
    return TestResult(metrics, details)


def _quality_correlation(context: DiagnosticContext, share: Tensor) -> dict[str, float]:
    """Correlation of shares with input quality, measured by the unimodal heads."""
    if context.task != "classification" or set(context.heads) != set(context.names) or not len(context.clean.target):
        return {}
    sure = []
    for name in context.names:
        right = torch.cat(context.heads[name]).softmax(dim=1).gather(1, context.clean.target.long()[:, None])[:, 0]
        sure.append(right.masked_fill(~torch.cat(context.has[name]), math.nan))
    result = share_quality_correlation(share, torch.stack(sure, dim=1))
    return {f"share_quality_r/{name}": float(r) for name, r in zip(context.names, result.r, strict=True)}


def gap(context: DiagnosticContext) -> TestResult:
    """Attention gap of each modality."""
    values = None if context.seen is None else gaps(context.seen)
    if values is None:
        raise SkippedTest(
            "no layer of the fusion has queries of several modalities that attend within and between modalities"
        )
    return TestResult({f"attention_gap/{name}": value for name, value in values.items()}, {"gap": values})


def consistency(context: DiagnosticContext) -> TestResult:
    """Cycle consistency of the attention between modalities."""
    context.needs_several("consistency needs at least two")
    try:
        result = attention_consistency(context.model, context.batches(), tokens=context.tokens)
    except ConfigError as error:
        raise SkippedTest(f"requires {error.expected}; got {error.got}") from error
    metrics = {f"consistency/{layer.site}": layer.score for layer in result.layers}
    metrics |= {f"pair_error/{layer.site}": layer.pair_error for layer in result.layers}
    if len(result.names) > 2:
        metrics |= {f"cycle_error/{layer.site}": layer.cycle_error for layer in result.layers}
    return TestResult(metrics, result.to_dict())


def collapse(context: DiagnosticContext) -> TestResult:
    """Rank collapse of the token representations."""
    rows = collapse_rows(context.residuals)
    if len(rows) < 2:
        raise SkippedTest("the fusion has no consecutive blocks with several output tokens")
    return TestResult({"residual_first": rows[0]["mean"], "residual_last": rows[-1]["mean"]}, {"layers": rows})


def ood(context: DiagnosticContext) -> TestResult:
    """Out-of-distribution detection by confidence."""
    if context.outside is None:
        raise SkippedTest("no out-of-distribution inputs were given; see outside")
    if context.task != "classification":
        raise SkippedTest(f"requires a classifier, and the task is {context.task}")
    result = ood_of(context.model, context.batches(), context.outside)
    both = torch.cat([result.inside, result.outside])
    low, high = float(both.min()), float(both.max())
    shown = {name: _histogram(part, low, high) for name, part in (("in", result.inside), ("out", result.outside))}
    # The name is taken where AUROC is the score of the classifier.
    name = "auroc" if context.score != "auroc" else "ood_auroc"
    metrics = {name: result.auroc, "fpr95": result.fpr95, "fpr95_id": result.fpr95_id}
    return TestResult(metrics, {"score": result.score, "outside": len(result.outside), "confidence": shown})


def cost(context: DiagnosticContext) -> TestResult:
    """Parameters and FLOPs per sample, counted in full and with the rules of thop."""
    batch = {name: value for name, value in next(iter(context.batches())).items() if name != "target"}
    device = next((parameter.device for parameter in context.model.parameters()), torch.device("cpu"))
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    full, thop = (costs(context.model, batch, convention=convention) for convention in ("full", "thop"))
    metrics = {"parameters": full.parameters, "flops": full.flops}
    return TestResult(metrics | {"parameters_thop": thop.parameters, "flops_thop": thop.flops}, {"table": thop.gflops})


def robustness(context: DiagnosticContext) -> TestResult:
    """Score under the corruptions of the catalog, at three severities."""
    context.needs_targets()
    result = robustness_of(
        context.model,
        context.batches,
        severities=ROBUSTNESS_SEVERITIES,
        seed=context.seed,
        metric=context.metric,
        statistics={name: tuple(context.noise[name]) for name in context.names if name in context.noise},  # type: ignore[misc]
    )
    damaged = dict.fromkeys(name for name, _, _ in result.scores)
    metrics = {f"robustness/{name}": result.mean(name) for name in damaged}
    return TestResult(metrics, {"clean": result.clean, "alone": result.alone, "rows": result.rows()})


def information(context: DiagnosticContext) -> TestResult:
    """Information of the modalities on the target, and how much of it the predictions contain."""
    context.needs_targets()
    context.needs_several("there is nothing to decompose")
    result = information_of(context.model, context.batches(), seed=context.seed)
    metrics = {f"information/{name}": value for name, value in result.alone.items()}
    metrics |= {"information_joint": result.joint, "information_gain": result.gain}
    metrics |= {} if result.used is None else {"information_used": result.used}
    for (one, other), part in result.pairs.items():
        metrics |= {f"redundancy/{one}+{other}": part.redundancy, f"synergy/{one}+{other}": part.synergy}
        metrics |= {f"unique/{one}-{other}": part.unique[0], f"unique/{other}-{one}": part.unique[1]}
    return TestResult(metrics, result.to_dict())


def _histogram(values: Tensor, low: float, high: float) -> dict[str, list[float]]:
    finite = values[~values.isnan()].clamp(low, high).numpy()
    counts, edges = np.histogram(finite, bins=40, range=(low, high if high > low else low + 1.0))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}


TESTS: dict[str, Callable[[DiagnosticContext], TestResult]] = {
    test.__name__: test
    for test in (
        score, noise, masking, response, attention, corruption, shapley, quag, keys, gap, consistency, collapse,
        gradients, ood, cost,
    )
}  # fmt: skip
"""Name -> test, in the order in which they run."""

OPTIONAL_TESTS: dict[str, Callable[[DiagnosticContext], TestResult]] = {
    "robustness": robustness,
    "information": information,
}
"""Tests that run only where they are named, since they take many times as long as all others."""
