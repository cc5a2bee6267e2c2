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

from ..diagnose.consistency import attention_consistency
from ..diagnose.corruption import corruption_curve
from ..diagnose.cost import cost as costs
from ..diagnose.gradients import gradient_norms
from ..diagnose.key_geometry import key_geometry
from ..diagnose.keys import key_distribution
from ..diagnose.masking import mask_modality
from ..diagnose.noise import response as response_of
from ..diagnose.ood import ood as ood_of
from ..diagnose.quag_scores import quag as quag_of
from ..diagnose.scores import check_answers, constant_answer, outcomes
from ..diagnose.shapley import modality_shapley
from ..diagnose.share import share_statistics
from ..diagnose.spread import share_entropy, share_quality_correlation, share_spread
from ..errors import ConfigError, ShapeError
from ..significance import Outcomes, pack
from .examination import Examination, Skipped, different
from .layers import attention_rows, collapse_rows, gaps

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Found(NamedTuple):
    """What a test found: figures by metric name, and what is drawn, JSON-able."""

    metrics: dict[str, float]
    details: dict[str, Any]


def score(of: Examination) -> Found:
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
            each[metric] = pack(known)
        if not bool(has.all()):
            metrics[f"{named}_with/{name}"] = of.worth(clean.logits[has], clean.target[has])
    details: dict[str, Any] = {"alone_from": "models" if of.alone else "heads", "outcomes": each}
    if of.task == "regression":
        details["deviation"] = float(outcomes(clean.logits, clean.target, "regression").double().std(correction=0))
    return Found(metrics, details)


def _given(of: Examination, name: str) -> Tensor | None:
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


def _each(of: Examination, logits: Tensor) -> Outcomes:
    """The outcome of every sample, for tests that compare conditions on the same samples."""
    return pack(outcomes(logits, of.clean.target, str(of.task)))


def _head(of: Examination, name: str) -> Tensor | None:
    """The outcomes of a modality's own head; NaN for samples that lack the modality."""
    if name not in of.heads:
        return None
    has = torch.cat(of.has[name])
    logits = torch.cat(of.heads[name])
    check_answers(logits[has], "diagnose")
    return outcomes(logits, of.clean.target, str(of.task)).masked_fill(~has, math.nan)


def noise(of: Examination) -> Found:
    """The score with each modality replaced by noise, and how many answers change."""
    of.needs_targets()
    metrics: dict[str, float] = {}
    each: dict[str, Outcomes] = {}
    for name in of.names:
        noisy = of.noisy(name)
        metric = f"{of.score}_noise/{name}"
        metrics[metric], each[metric] = of.worth(noisy.logits), _each(of, noisy.logits)
        metrics[f"changed_noise/{name}"] = different(of.clean.logits, noisy.logits, of.task)
    return Found(metrics, {"statistics": {name: list(of.statistics(name)) for name in of.names}, "outcomes": each})


def response(of: Examination) -> Found:
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
    return Found(metrics, {"modality": target, "chosen": of.modality is not None, "each": each, "shares": shares})


def corruption(of: Examination) -> Found:
    """The score, and attention, as each modality is damaged by degrees."""
    of.needs_targets()
    curves = {
        name: corruption_curve(of.model, of.batches, modality=name, levels=LEVELS, seed=of.seed) for name in of.names
    }
    metrics = {f"area/{name}": curve.area for name, curve in curves.items()}
    return Found(metrics, {"curves": {name: asdict(curve) for name, curve in curves.items()}})


def masking(of: Examination) -> Found:
    """The score without each modality."""
    of.needs_targets()
    of.needs_parts()
    of.needs_several("without it nothing is left")
    found = mask_modality(of.model, of.batches())
    each = {f"{of.score}_mask/{name}": pack(part) for name, part in found.outcomes.items()}
    details = {"semantics": found.semantics, "full": found.full, "without": found.without, "drop": found.drop}
    metrics = {f"{of.score}_mask/{name}": left for name, left in found.without.items()}
    return Found(metrics, {**details, "outcomes": each})


def shapley(of: Examination) -> Found:
    """What each modality adds to the score, over all orders in which they may come."""
    of.needs_targets()
    of.needs_parts()
    of.needs_several("it is owed everything")
    worth = modality_shapley(of.model, of.batches())
    return Found({f"shapley/{name}": value for name, value in worth.items()}, {"values": worth})


def quag(of: Examination) -> Found:
    """The score with parts of the fusion's attention averaged."""
    of.needs_targets()
    of.needs_several("there are no quadrants")
    found = quag_of(of.model, of.batches())
    metrics = {f"quag/{operator}": value for operator, value in found.scores.items()}
    each = {f"quag/{operator}": pack(part) for operator, part in found.outcomes.items()}
    details = {"origin": found.origin, "drops": dict(found.drops), "changed": dict(found.changed)}
    return Found(metrics, {**details, "outcomes": each})


def gradients(of: Examination) -> Found:
    """How much the fused loss teaches each encoder."""
    of.needs_targets()
    of.needs_parts()
    found = gradient_norms(of.model, of.batches())
    metrics = {f"gradient/{name}": norm for name, norm in found.parameters.items()}
    return Found(metrics | {f"gradient_output/{name}": n for name, n in found.outputs.items()}, asdict(found))


def keys(of: Examination) -> Found:
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
    return Found(metrics, {**found.to_dict(), "noise": noisy})


def attention(of: Examination) -> Found:
    """Where attention goes, by layer and head, how it is divided, and how it changes from sample to sample."""
    layers = [] if of.seen is None or not of.seen.sites else attention_rows(of.seen)
    if of.clean.share is None and not layers:
        raise Skipped("the model has no attention over several modalities that can be seen")
    details: dict[str, Any] = {"layers": layers}
    if of.seen is not None and of.seen.missing:
        details["missing"] = of.seen.missing
    share = of.clean.share
    if share is None:
        return Found({}, details)
    spread = share_spread(share)
    metrics = {f"share/{name}": float(share[..., place].nanmean()) for place, name in enumerate(of.names)}
    metrics |= {f"share_spread/{name}": float(value) for name, value in zip(of.names, spread.spread, strict=True)}
    if len(of.names) > 1:
        metrics["share_entropy"] = float(share_entropy(share, normalised=True).nanmean())
        metrics |= _follows(of, share)
    details["readout"] = share_statistics(share, of.names)
    return Found(metrics, details)


def _follows(of: Examination, share: Tensor) -> dict[str, float]:
    """Correlation of share and quality, where heads tell how good each modality of each sample is."""
    if of.task != "classification" or set(of.heads) != set(of.names) or not len(of.clean.target):
        return {}
    sure = []
    for name in of.names:
        right = torch.cat(of.heads[name]).softmax(dim=1).gather(1, of.clean.target.long()[:, None])[:, 0]
        sure.append(right.masked_fill(~torch.cat(of.has[name]), math.nan))
    found = share_quality_correlation(share, torch.stack(sure, dim=1))
    return {f"share_quality_r/{name}": float(r) for name, r in zip(of.names, found.r, strict=True)}


def gap(of: Examination) -> Found:
    """Do the tokens of each modality look at their own or across?"""
    found = None if of.seen is None else gaps(of.seen)
    if found is None:
        raise Skipped("no layer of the fusion has tokens of several modalities that read both kinds")
    return Found({f"attention_gap/{name}": value for name, value in found.items()}, {"gap": found})


def consistency(of: Examination) -> Found:
    """Do the maps between modalities agree, so that going round leads back?"""
    of.needs_several("there is nobody to agree with")
    try:
        found = attention_consistency(of.model, of.batches(), tokens=of.tokens)
    except ConfigError as error:
        raise Skipped(f"it takes {error.expected}; here is {error.got}") from error
    metrics = {f"consistency/{layer.site}": layer.score for layer in found.layers}
    metrics |= {f"pair_error/{layer.site}": layer.pair_error for layer in found.layers}
    if len(found.names) > 2:
        metrics |= {f"cycle_error/{layer.site}": layer.cycle_error for layer in found.layers}
    return Found(metrics, found.to_dict())


def collapse(of: Examination) -> Found:
    """Do the tokens become alike with depth?"""
    rows = collapse_rows(of.residuals)
    if len(rows) < 2:
        raise Skipped("the fusion has no blocks behind one another that pass on several tokens")
    return Found({"residual_first": rows[0]["mean"], "residual_last": rows[-1]["mean"]}, {"layers": rows})


def ood(of: Examination) -> Found:
    """Does confidence tell known inputs from those of ``outside``?"""
    if of.outside is None:
        raise Skipped("no inputs of unknown kind were given; see outside")
    if of.task != "classification":
        raise Skipped(f"confidence is that of a classifier, and the task is {of.task}")
    found = ood_of(of.model, of.batches(), of.outside)
    both = torch.cat([found.inside, found.outside])
    low, high = float(both.min()), float(both.max())
    shown = {name: _histogram(part, low, high) for name, part in (("in", found.inside), ("out", found.outside))}
    metrics = {"auroc": found.auroc, "fpr95": found.fpr95, "fpr95_id": found.fpr95_id}
    return Found(metrics, {"score": found.score, "outside": len(found.outside), "confidence": shown})


def cost(of: Examination) -> Found:
    """Parameters and operations of one sample, counted in full and as published tables count."""
    batch = {name: value for name, value in next(iter(of.batches())).items() if name != "target"}
    device = next((parameter.device for parameter in of.model.parameters()), torch.device("cpu"))
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    full, thop = (costs(of.model, batch, convention=convention) for convention in ("full", "thop"))
    metrics = {"parameters": full.parameters, "flops": full.flops}
    return Found(metrics | {"parameters_thop": thop.parameters, "flops_thop": thop.flops}, {"table": thop.gflops})


def _histogram(values: Tensor, low: float, high: float) -> dict[str, list[float]]:
    kept = values[~values.isnan()].clamp(low, high).numpy()
    counts, edges = np.histogram(kept, bins=40, range=(low, high if high > low else low + 1.0))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}


QUESTIONS: dict[str, Callable[[Examination], Found]] = {
    question.__name__: question
    for question in (
        score, noise, masking, response, attention, corruption, shapley, quag, keys, gap, consistency, collapse,
        gradients, ood, cost,
    )
}  # fmt: skip
"""Name of the test -> the function, in the order in which they run."""
