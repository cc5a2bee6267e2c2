"""Score of a model, of a constant prediction, and of each modality alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ShapeError
from ...io.checksums import digest_of
from ...results.significance import pack_outcomes
from ..task_scores import check_answers, constant_logits, outcomes
from .diagnostic_context import DiagnosticContext


class TestResult(NamedTuple):
    """Result of a test: metrics by name, and the data of its figures, JSON-able."""

    metrics: dict[str, float]
    details: dict[str, Any]


def score(context: DiagnosticContext) -> TestResult:
    """Score of the model, of the best constant prediction, and of each modality alone."""
    context.needs_targets()
    clean, metric_name = context.clean, context.score
    metrics, logits = {metric_name: context.worth(clean.logits)}, {metric_name: clean.logits}
    constant = constant_logits(clean.target, str(context.task), context.metric, clean.logits.shape[1])
    if context.task == "classification" or constant.shape == clean.logits.shape[1:]:
        same = constant.expand(context.samples, -1)
        metrics[f"{metric_name}_constant"], logits[f"{metric_name}_constant"] = context.worth(same), same
    evidence = context.evidence(logits)
    for name in context.names if len(context.names) > 1 else ():
        metrics |= _alone(context, name, evidence)
    details: dict[str, Any] = {"alone_from": "models" if context.alone else "heads", **evidence}
    if context.task == "regression" and context.metric is None:
        details["deviation"] = float(outcomes(clean.logits, clean.target, "regression").double().std(correction=0))
    if context.metric is not None or context.others:
        measured = [] if context.metric is None else [context.metric]
        values = {
            m.name: m.evaluate(clean.logits, clean.target, str(context.task)) for m in (*measured, *context.others)
        }
        details["undefined"] = {metric: value.reason for metric, value in values.items() if value.reason}
        details["target"] = digest_of(clean.target)
        metrics |= {metric.name: values[metric.name].value for metric in context.others}
    return TestResult(metrics, details)


def _alone(context: DiagnosticContext, name: str, evidence: dict[str, Any]) -> dict[str, float]:
    """Score of a modality alone, and of the model on the samples that have it; adds the outcomes to the evidence."""
    metric, metrics = f"{context.score}_alone/{name}", {}
    if context.alone or context.metric is None or context.metric.outcomes is not None:
        outcomes = _given_outcomes(context, name) if context.alone else _head_outcomes(context, name)
        if outcomes is None or bool(outcomes.isnan().all()):
            return {}
        has = ~outcomes.isnan()
        metrics[metric] = float(outcomes.double().nanmean())
        if outcomes.ndim:
            evidence["outcomes"][metric] = pack_outcomes(outcomes)
    elif name in context.heads:
        # The metric of the samples that have the modality; only without gaps are the resamples those of the model.
        logits, has = torch.cat(context.heads[name]), torch.cat(context.has[name])
        if not bool(has.any()):
            return {}
        metrics[metric] = context.worth(logits[has], context.clean.target[has])
        if bool(has.all()):
            for part, values in context.evidence({metric: logits}).items():
                evidence[part] |= values
    else:
        return {}
    if not bool(has.all()):
        metrics[f"{context.score}_with/{name}"] = context.worth(context.clean.logits[has], context.clean.target[has])
    return metrics


def _given_outcomes(context: DiagnosticContext, name: str) -> Tensor | None:
    """The given score of a unimodal model, or its outcome for each sample."""
    if name not in context.alone:
        return None
    values = torch.as_tensor(context.alone[name], dtype=torch.float64)
    if values.ndim and values.shape != (context.samples,):
        raise ShapeError(
            f"diagnose alone '{name}'", expected=f"a score, or the outcomes of {context.samples} samples",
            got=f"shape {tuple(values.shape)}",
        )  # fmt: skip
    return values


def _head_outcomes(context: DiagnosticContext, name: str) -> Tensor | None:
    """The outcomes of a unimodal head; NaN for samples without the modality."""
    if name not in context.heads:
        return None
    has = torch.cat(context.has[name])
    logits = torch.cat(context.heads[name])
    check_answers(logits[has], "diagnose")
    if context.metric is None:
        scores = outcomes(logits, context.clean.target, str(context.task))
    else:
        # Outputs of a head for samples without its modality may be NaN.
        scores = context.metric.each(logits.nan_to_num(0.0), context.clean.target, str(context.task))
    return None if scores is None else scores.masked_fill(~has, math.nan)
