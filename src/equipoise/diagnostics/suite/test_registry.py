"""The tests of a diagnosis, one function each: an examination in, figures and details out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, ShapeError
from ...results.significance import Outcomes, pack_outcomes
from ..compute_cost import cost as costs
from ..consistency_test import attention_consistency
from ..corruption_test import corruption_curve
from ..encoder_gradients import gradient_norms
from ..key_distributions import key_geometry
from ..key_plot_data import key_distribution
from ..modality_masking import mask_modality
from ..noise_test import response_from_shares as response_of
from ..ood_test import ood as ood_of
from ..quag_test import quag as quag_of
from ..shapley_test import modality_shapley
from ..share_accumulation import share_statistics
from ..share_spread_test import share_entropy, share_quality_correlation, share_spread
from ..task_scores import check_answers, constant_answer, outcomes
from .diagnostic_context import DiagnosticContext, SkippedTest, outputs_differ
from .layer_tests import attention_rows, collapse_rows, gaps

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


class TestResult(NamedTuple):
    """What a test found: figures by metric name, and what is drawn, JSON-able."""

    metrics: dict[str, float]
    details: dict[str, Any]


def score(of: DiagnosticContext) -> TestResult:
    """How good the answers are, what a constant answer would reach, and what each modality's own head reaches."""
    of.needs_targets()
    clean, named = of.clean, of.score
    metrics, each = {named: of.worth(clean.logits)}, {named: _each(of, clean.logits)}
    constant = constant_answer(clean.target, str(of.task))
    if of.task == "classification" or constant.shape == clean.logits.shape[1:]:
        same = constant.expand(of.samples, -1)
        metrics[f"{named}_constant"], each[f"{named}_constant"] = of.worth(same), _each(of, same)
    for name in of.names if len(of.names) > 1 else ():
        known = _given(of, name) if of.alone else _head(of, name)
        if known is None or bool(known.isnan().all()):
            continue
        metric, has = f"{named}_alone/{name}", ~known.isnan()
        metrics[metric] = float(known.double().nanmean())
        if known.ndim:
            each[metric] = pack_outcomes(known)
        if not bool(has.all()):
            metrics[f"{named}_with/{name}"] = of.worth(clean.logits[has], clean.target[has])
    details: dict[str, Any] = {"alone_from": "models" if of.alone else "heads", "outcomes": each}
    if of.task == "regression":
        details["deviation"] = float(outcomes(clean.logits, clean.target, "regression").double().std(correction=0))
    return TestResult(metrics, details)


def _given(of: DiagnosticContext, name: str) -> Tensor | None:
    """The score of a model of this modality alone, or the outcome of every sample."""
    if name not in of.alone:
        return None
    known = torch.as_tensor(of.alone[name], dtype=torch.float64)
    if known.ndim and known.shape != (of.samples,):
        raise ShapeError(
            f"diagnose alone '{name}'", expected=f"a score, or the outcome of each of {of.samples} samples",
            got=f"shape {tuple(known.shape)}",
        )  # fmt: skip
    return known


def _each(of: DiagnosticContext, logits: Tensor) -> Outcomes:
    """The outcome of every sample, for tests that compare conditions on the same samples."""
    return pack_outcomes(outcomes(logits, of.clean.target, str(of.task)))


def _head(of: DiagnosticContext, name: str) -> Tensor | None:
    """The outcomes of a modality's own head; NaN for samples that lack the modality."""
    if name not in of.heads:
        return None
    has = torch.cat(of.has[name])
    logits = torch.cat(of.heads[name])
    check_answers(logits[has], "diagnose")
    return outcomes(logits, of.clean.target, str(of.task)).masked_fill(~has, math.nan)


def noise(of: DiagnosticContext) -> TestResult:
    """The score with each modality replaced by noise, and how many answers change."""
    of.needs_targets()
    metrics: dict[str, float] = {}
    each: dict[str, Outcomes] = {}
    for name in of.names:
        noisy = of.noisy(name)
        metric = f"{of.score}_noise/{name}"
        metrics[metric], each[metric] = of.worth(noisy.logits), _each(of, noisy.logits)
        metrics[f"changed_noise/{name}"] = outputs_differ(of.clean.logits, noisy.logits, of.task)
    return TestResult(metrics, {"statistics": {name: list(of.statistics(name)) for name in of.names}, "outcomes": each})


def response(of: DiagnosticContext) -> TestResult:
    """Does attention leave a modality that is replaced by noise?"""
    of.needs_attention()
    of.needs_several("attention has nowhere else to go")
    target = of.replaced
    with warnings.catch_warnings():
        # A constant attention has no correlation; the verdict says so.
        warnings.simplefilter("ignore", UserWarning)
        answers = {name: response_of(of.clean, of.noisy(name), name) for name in of.names}
        own_level = response_of(of.clean, of.noisy_own(target), target)
    answer = answers[target]
    metrics = {"noise_attention_r": answer.r, "noise_attention_r_same": answer.r_same, "noise_attention_p": answer.p}
    metrics["noise_attention_r_own"] = own_level.r
    each = {name: {"r": own.r, "r_same": own.r_same, "p": own.p} for name, own in answers.items()}
    shares = {"clean": _histogram(answer.clean, 0, 1), "noise": _histogram(answer.noise, 0, 1)}
    return TestResult(metrics, {"modality": target, "chosen": of.modality is not None, "each": each, "shares": shares})


def corruption(of: DiagnosticContext) -> TestResult:
    """The score, and attention, as each modality is damaged by degrees."""
    of.needs_targets()
    curves = {
        name: corruption_curve(of.model, of.batches, modality=name, levels=LEVELS, seed=of.seed) for name in of.names
    }
    metrics = {f"area/{name}": curve.area for name, curve in curves.items()}
    return TestResult(metrics, {"curves": {name: asdict(curve) for name, curve in curves.items()}})


def masking(of: DiagnosticContext) -> TestResult:
    """The score without each modality."""
    of.needs_targets()
    of.needs_parts()
    of.needs_several("without it nothing is left")
    found = mask_modality(of.model, of.batches())
    each = {f"{of.score}_mask/{name}": pack_outcomes(part) for name, part in found.outcomes.items()}
    details = {"semantics": found.semantics, "full": found.full, "without": found.without, "drop": found.drop}
    metrics = {f"{of.score}_mask/{name}": left for name, left in found.without.items()}
    return TestResult(metrics, {**details, "outcomes": each})


def shapley(of: DiagnosticContext) -> TestResult:
    """What each modality adds to the score, over all orders in which they may come."""
    of.needs_targets()
    of.needs_parts()
    of.needs_several("it is owed everything")
    worth = modality_shapley(of.model, of.batches())
    return TestResult({f"shapley/{name}": value for name, value in worth.items()}, {"values": worth})


def quag(of: DiagnosticContext) -> TestResult:
    """The score with parts of the fusion's attention averaged."""
    of.needs_targets()
    of.needs_several("there are no quadrants")
    found = quag_of(of.model, of.batches())
    metrics = {f"quag/{operator}": value for operator, value in found.scores.items()}
    each = {f"quag/{operator}": pack_outcomes(part) for operator, part in found.outcomes.items()}
    details = {"origin": found.origin, "drops": dict(found.drops), "changed": dict(found.changed)}
    return TestResult(metrics, {**details, "outcomes": each})


def gradients(of: DiagnosticContext) -> TestResult:
    """How much the fused loss teaches each encoder."""
    of.needs_targets()
    of.needs_parts()
    found = gradient_norms(of.model, of.batches())
    metrics = {f"gradient/{name}": norm for name, norm in found.parameters.items()}
    return TestResult(metrics | {f"gradient_output/{name}": n for name, n in found.outputs.items()}, asdict(found))


def keys(of: DiagnosticContext) -> TestResult:
    """Where the keys of each modality lie to the query, and what noise does to them."""
    of.needs_attention()
    of.needs_several("there is nothing to compare its keys with")
    given = {of.replaced: of.statistics(of.replaced)}
    found = key_geometry(of.model, of.batches, replaced=of.replaced, noise=given, seed=of.seed)
    airs = {name: value for name, value in found.air.items() if value is not None}
    metrics = {f"air/{name}": value for name, value in airs.items()}
    if of.names[0] in airs:
        metrics = {"air": airs[of.names[0]], **metrics}
    metrics |= {f"key_shift/{name}": shift for name, shift in found.shift.items() if shift is not None}
    metrics |= {} if found.range is None else {"key_range": found.range}
    noisy = key_distribution(of.noisy(of.replaced))
    return TestResult(metrics, {**found.to_dict(), "noise": noisy})


def attention(of: DiagnosticContext) -> TestResult:
    """Where attention goes, by layer and head, how it is divided, and how it changes from sample to sample."""
    layers = [] if of.seen is None or not of.seen.layers else attention_rows(of.seen)
    if of.clean.share is None and not layers:
        raise SkippedTest("the model has no attention over several modalities that can be seen")
    details: dict[str, Any] = {"layers": layers}
    if of.seen is not None and of.seen.missing:
        details["missing"] = of.seen.missing
    share = of.clean.share
    if share is None:
        return TestResult({}, details)
    spread = share_spread(share)
    metrics = {f"share/{name}": float(share[..., place].nanmean()) for place, name in enumerate(of.names)}
    metrics |= {f"share_spread/{name}": float(value) for name, value in zip(of.names, spread.spread, strict=True)}
    if len(of.names) > 1:
        metrics["share_entropy"] = float(share_entropy(share, normalized=True).nanmean())
        metrics |= _follows(of, share)
    details["readout"] = share_statistics(share, of.names)
    return TestResult(metrics, details)


def _follows(of: DiagnosticContext, share: Tensor) -> dict[str, float]:
    """Correlation of share and quality, where heads tell how good each modality of each sample is."""
    if of.task != "classification" or set(of.heads) != set(of.names) or not len(of.clean.target):
        return {}
    sure = []
    for name in of.names:
        right = torch.cat(of.heads[name]).softmax(dim=1).gather(1, of.clean.target.long()[:, None])[:, 0]
        sure.append(right.masked_fill(~torch.cat(of.has[name]), math.nan))
    found = share_quality_correlation(share, torch.stack(sure, dim=1))
    return {f"share_quality_r/{name}": float(r) for name, r in zip(of.names, found.r, strict=True)}


def gap(of: DiagnosticContext) -> TestResult:
    """Do the tokens of each modality look at their own or across?"""
    found = None if of.seen is None else gaps(of.seen)
    if found is None:
        raise SkippedTest("no layer of the fusion has tokens of several modalities that read both kinds")
    return TestResult({f"attention_gap/{name}": value for name, value in found.items()}, {"gap": found})


def consistency(of: DiagnosticContext) -> TestResult:
    """Do the maps between modalities agree, so that going round leads back?"""
    of.needs_several("there is nobody to agree with")
    try:
        found = attention_consistency(of.model, of.batches(), tokens=of.tokens)
    except ConfigError as error:
        raise SkippedTest(f"it takes {error.expected}; here is {error.got}") from error
    metrics = {f"consistency/{layer.site}": layer.score for layer in found.layers}
    metrics |= {f"pair_error/{layer.site}": layer.pair_error for layer in found.layers}
    if len(found.names) > 2:
        metrics |= {f"cycle_error/{layer.site}": layer.cycle_error for layer in found.layers}
    return TestResult(metrics, found.to_dict())


def collapse(of: DiagnosticContext) -> TestResult:
    """Do the tokens become alike with depth?"""
    rows = collapse_rows(of.residuals)
    if len(rows) < 2:
        raise SkippedTest("the fusion has no blocks behind one another that pass on several tokens")
    return TestResult({"residual_first": rows[0]["mean"], "residual_last": rows[-1]["mean"]}, {"layers": rows})


def ood(of: DiagnosticContext) -> TestResult:
    """Does confidence tell known inputs from those of ``outside``?"""
    if of.outside is None:
        raise SkippedTest("no inputs of unknown kind were given; see outside")
    if of.task != "classification":
        raise SkippedTest(f"confidence is that of a classifier, and the task is {of.task}")
    found = ood_of(of.model, of.batches(), of.outside)
    both = torch.cat([found.inside, found.outside])
    low, high = float(both.min()), float(both.max())
    shown = {name: _histogram(part, low, high) for name, part in (("in", found.inside), ("out", found.outside))}
    metrics = {"auroc": found.auroc, "fpr95": found.fpr95, "fpr95_id": found.fpr95_id}
    return TestResult(metrics, {"score": found.score, "outside": len(found.outside), "confidence": shown})


def cost(of: DiagnosticContext) -> TestResult:
    """Parameters and operations of one sample, counted in full and as published tables count."""
    batch = {name: value for name, value in next(iter(of.batches())).items() if name != "target"}
    device = next((parameter.device for parameter in of.model.parameters()), torch.device("cpu"))
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    full, thop = (costs(of.model, batch, convention=convention) for convention in ("full", "thop"))
    metrics = {"parameters": full.parameters, "flops": full.flops}
    return TestResult(metrics | {"parameters_thop": thop.parameters, "flops_thop": thop.flops}, {"table": thop.gflops})


def _histogram(values: Tensor, low: float, high: float) -> dict[str, list[float]]:
    kept = values[~values.isnan()].clamp(low, high).numpy()
    counts, edges = np.histogram(kept, bins=40, range=(low, high if high > low else low + 1.0))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}


QUESTIONS: dict[str, Callable[[DiagnosticContext], TestResult]] = {
    question.__name__: question
    for question in (
        score, noise, masking, response, attention, corruption, shapley, quag, keys, gap, consistency, collapse,
        gradients, ood, cost,
    )
}  # fmt: skip
"""Name of the test -> the function, in the order in which they run."""
