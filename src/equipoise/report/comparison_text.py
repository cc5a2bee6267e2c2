"""Text of the comparison report: main findings with their statistical evidence, and figure captions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from ..results.significance import SURE
from .effect_sizes import Effect, between, describe_effect, effect, largest, tested_effects
from .results_view import ResultsView
from .text_format import (
    LEVEL,
    depends_on_level,
    format_delta,
    format_signed,
    format_value,
    gain,
    is_error,
    is_fraction,
    join_and,
    method_title,
    metric_label,
    pluralize,
    with_spread,
)


def verdict(readings: ResultsView) -> list[str]:
    """The main findings, most important first; at least one sentence.

    Example:
        >>> runs = [{"method": "joint", "seed": seed, "fold": None, "metrics": {"accuracy": 0.5}} for seed in (0, 1)]
        >>> verdict(ResultsView({"protocol": {}, "runs": runs, "summary": []}))
        ['joint has an accuracy of 50.0 ± 0.0 %, 2 seeds.']
    """
    if not readings.runs:
        return ["No run has finished yet."]
    once = bool(readings.rows) and all(row["n"] < 2 for row in readings.rows.values())
    sentences = [_single_run_text(readings)] if once else []
    tests = tested_effects(readings)
    first = largest(tests)
    if first is not None:
        corrected = f" after Holm's correction for {len(tests)} tests" if len(tests) > 1 else ""
        sentences.append(
            f"The largest significant effect{corrected} is that of {first.method} compared with {first.reference}: "
            f"{first.sentence}."
        )
    elif any(one.sure for one in tests):
        sentences.append(f"No difference to a reference is significant after Holm's correction for {len(tests)} tests.")
    for method in readings.methods:
        sentences.append(_response_sentence(readings, method))
        if method not in readings.single:
            sentences.append(_effects_text(readings, method, first))
    sentences = [sentence for sentence in [*sentences, *_ranking_text(readings)] if sentence]
    return sentences or ["No metric is defined for any run."]


def _single_run_text(readings: ResultsView) -> str:
    """The limits of a comparison with a single run of each method."""
    text = f"Every method was run on one {readings.unit} only, so "
    if not _tested(readings):
        return f"{text}no difference can be tested."
    return (
        f"{text}scores are compared over the test samples: a significant difference holds for these trained models and "
        f"may change with another {readings.unit}."
    )


def _tested(readings: ResultsView) -> bool:
    """Whether any difference to a reference has a p-value."""
    effects = (effect(readings, method, metric) for method, metric in readings.rows)
    return any(one is not None and one.p is not None for one in effects)


def notices(results: Mapping[str, Any]) -> list[str]:
    """Notices on an incomplete comparison: pending runs, failed runs and missing references.

    Example:
        >>> notices({"complete": False, "runs": []})
        ['Not all planned runs have finished: the results may still change.']
    """
    failures = results.get("failures") or []
    notes = [
        f"{run.get('method')}, seed {run.get('seed')}" + (f", fold {run['fold']}" if run.get("fold") else "")
        + f" failed and is not included: {run.get('error')}"
        for run in failures
    ]  # fmt: skip
    if results.get("complete") is False and not failures:
        notes.append("Not all planned runs have finished: the results may still change.")
    done = {run["method"] for run in results["runs"]}
    for method, reference in ((results.get("protocol") or {}).get("references") or {}).items():
        if method in done and reference not in done:
            notes.append(f"{method} is not compared: its reference {reference} was not run.")
    return notes


def headline(readings: ResultsView) -> str:
    """Title of the page: the largest significant effect, or that there is no significant difference."""
    strongest, names = largest(tested_effects(readings)), readings.methods
    if strongest is not None:
        course = "higher" if strongest.more else "lower"
        words = describe_effect(strongest.metric).removesuffix(" r")
        much = format_delta(strongest.metric, strongest.difference) + (
            "" if strongest.pairs > 1 else f", one {strongest.unit} only"
        )
        return f"{strongest.method} has a {course} {words} than {strongest.reference} ({much})"
    if len(names) < 2:
        return f"Results of {names[0]}" if names else "No run yet"
    if _tested(readings):
        # Unimodal baselines have no part in ``largest``, so they are not claimed to be equal.
        fusions = [name for name in names if name not in readings.single]
        return f"No significant difference between {_methods(fusions if len(fusions) > 1 else names)}"
    return f"Comparison of {_methods(names)} without a statistical test"


def _methods(names: Sequence[str]) -> str:
    """Up to four names, or the number of methods."""
    return join_and(list(names)) if len(names) <= 4 else f"{len(names)} methods"


def _response(readings: ResultsView, method: str) -> str:
    """The response of attention to noise in words; "" if unknown."""
    row = readings.row(method, "noise_attention_r")
    if row is None:
        return ""
    r = row["mean"]
    low, high = _interval(row)
    if row["n"] > 1 and low <= 0 <= high:
        return "has no significant effect on attention"
    if abs(r) < 0.1:
        return "hardly changes attention"
    if r < 0:
        return "moves attention toward it"
    return "moves attention away from it" if r >= 0.5 else "moves attention slightly away from it"


def _response_sentence(readings: ResultsView, method: str) -> str:
    row, response = readings.row(method, "noise_attention_r"), _response(readings, method)
    if row is None or not response:
        return ""
    away = readings.disturbed(method) or "a modality"
    own_level = _own_level(readings, method, row["mean"])
    return f"In {method}, replacing {away} by noise {response} ({_spread(readings, row, 'r = ')}).{own_level}"


def _own_level(readings: ResultsView, method: str, r: float) -> str:
    """The response to noise of the mean and standard deviation of each sample, and a warning if the signs differ."""
    row = readings.row(method, "noise_attention_r_own")
    if row is None:
        return ""
    text = f" With noise of the mean and standard deviation of each sample, {_spread(readings, row, 'r = ')}."
    return f"{text} {LEVEL}" if depends_on_level(r, row["mean"]) else text


def _effects_text(readings: ResultsView, method: str, reported: Effect | None) -> str:
    """The differences of a method to its reference, without the effect that was already reported."""
    disturbed = readings.noise_modality
    score = readings.score
    metrics = ["noise_attention_r", score, *([f"{score}_noise/{disturbed}"] if disturbed else [])]
    effects = [one for metric in metrics if (one := effect(readings, method, metric)) is not None]
    if not effects:
        return ""
    parts, reference = [one.sentence for one in effects if one != reported], effects[0].reference
    method_row, its = (readings.row(m, "noise_attention_r") for m in (method, reference))
    if method_row and its and method_row["difference"] is None:
        parts.append("r is not compared, since no pair of runs replaced the same modality")
    return f"{method} compared with {reference}: {'; '.join(parts)}." if parts else ""


def _ranking_text(readings: ResultsView) -> list[str]:
    """The best methods, and the comparison of every fusion with the best unimodal baseline."""
    score, words = readings.score, metric_label(readings.score)
    means = {m: row["mean"] for m in readings.methods if (row := readings.row(m, score))}
    ranked = sorted(means, key=lambda m: -gain(score, means[m]))
    sentences = []
    if len(ranked) > 1:
        best, second = ranked[:2]
        most = f"lowest {words}" if is_error(score) else f"highest mean {words}"
        sentences.append(f"{best} has the {most}: {_mean(readings, best)}")
        if (gap := between(readings, best, second, score)) is not None:
            verb = "is significant" if gap.sure else "is not significant" if gap.p is not None else "is not tested"
            sentences[-1] += f"; the difference to the second best, {second}, {verb} ({gap.proof})"
        sentences[-1] += "."
    elif ranked:
        alone, article = ranked[0], "an" if words[0] in "aeiou" else "a"
        sentences.append(f"{alone} has {article} {words} of {_mean(readings, alone)}.")
    best = next((m for m in ranked if m in readings.single), None)
    fusions = [m for m in means if m not in readings.single]
    if best is not None and fusions:
        gaps = [gap for m in fusions if (gap := between(readings, m, best, score)) is not None]
        groups = {
            "significantly worse": [gap for gap in gaps if gap.sure and gain(score, gap.difference) < 0],
            "significantly better": [gap for gap in gaps if gap.sure and gain(score, gap.difference) > 0],
            "no significant difference": [gap for gap in gaps if not gap.sure],
        }
        parts = [
            f"{group}: {join_and([f'{gap.method} ({gap.proof})' for gap in methods])}"
            for group, methods in groups.items()
            if methods
        ]
        baseline = f"The best unimodal baseline is {best} with {_mean(readings, best)}"
        sentences.append(f"{baseline}. Compared with it, {'; '.join(parts)}." if parts else f"{baseline}.")
    return sentences


def scores_text(readings: ResultsView, metric: str) -> str:
    """Caption of ``comparison_figures.scores``."""
    means = {m: fmean(values) for m in readings.methods if (values := readings.values(m, metric))}
    ranked = sorted(means, key=lambda m: -gain(metric, means[m]))
    order = join_and([f"{m} {format_value(metric, means[m])}" for m in ranked])
    return f"{method_title(metric)}: {order}."


def share_text(readings: ResultsView, method: str) -> str:
    """Caption of ``comparison_figures.attention_share``."""
    curves = {name: readings.curve(method, "share", name) for name in readings.modalities}
    moves = [
        f"{name} changes from {100 * curve.mean[0]:.0f} % (epoch {curve.epochs[0]}) "
        f"to {100 * curve.mean[-1]:.0f} % (epoch {curve.epochs[-1]})"
        for name, curve in curves.items()
        if curve is not None
    ]
    rotated, runs = readings.rotation_epochs(method), len(readings.of(method))
    text = f"Attention shares of {method}: {join_and(moves)}."
    if rotated:
        when = join_and([f"{epoch} (in {n} of {pluralize(runs, 'run')})" for epoch, n in sorted(rotated.items())])
        text += f" Dotted lines: rotation of the query after epoch {when}."
    elif readings.curve(method, "rotations") is not None and "+" in method:
        text += " The query was never rotated."
    return text


def noise_text(readings: ResultsView, method: str) -> str:
    """Caption of ``comparison_figures.share_on_noise``."""
    clean, noise = (readings.histogram(method, "shares", state) for state in ("clean", "noise"))
    if clean is None or noise is None:
        return ""
    away = readings.disturbed(method) or "the modality"
    row, response = readings.row(method, "noise_attention_r"), _response(readings, method)
    end = "" if row is None else f"; noise {response} ({_spread(readings, row, 'r = ')})"
    return (
        f"{method}: the other modalities receive about {100 * clean.mean:.0f} % of attention on clean input and "
        f"{100 * noise.mean:.0f} % with {away} replaced by noise{end}."
    )


def keys_text(readings: ResultsView, method: str, moment: str) -> str:
    """Caption of ``comparison_figures.key_cosines``."""
    parts = {name: readings.histogram(method, "keys", moment, "clean", name, "cosine") for name in readings.modalities}
    means = {name: part.mean for name, part in parts.items() if part is not None}
    ahead = max(means, key=lambda name: means[name])
    when = "just before the first rotation" if moment == "before" else "at the end of training"
    gap = max(means.values()) - min(means.values())
    text = f"{method}, {when}: the query is closest to the keys of {ahead}; mean cosines "
    text += f"{join_and([f'{name} {format_signed(mean)}' for name, mean in means.items()])}, a range of {gap:.2f}."
    disturbed = readings.replaced(method, moment) or ""
    noise = readings.histogram(method, "keys", moment, "noise", disturbed, "cosine")
    if noise is not None and disturbed in means:
        text += (
            f" With noise, the mean cosine of {disturbed} changes by {format_signed(noise.mean - means[disturbed])} "
            f"to {format_signed(noise.mean)}."
        )
    return text


def imbalance_text(readings: ResultsView) -> str:
    """Caption of ``comparison_figures.imbalance``."""
    curves = {method: readings.curve(method, "air") for method in readings.dynamic}
    parts = []
    for method, curve in curves.items():
        if curve is not None:
            peak = int(np.nanargmax(np.abs(curve.mean)))
            widest = f"{format_signed(curve.mean[peak])} at epoch {curve.epochs[peak]}"
            parts.append(f"{method} ends at {format_signed(curve.mean[-1])} (largest magnitude: {widest})")
    meaning = (
        "The attention imbalance rate (AIR) is the difference of the mean query–key cosines of the modalities; "
        "0 is balanced."
    )
    return f"{meaning} {'. '.join(parts)}."


def rotations_text(readings: ResultsView) -> str:
    """Caption of ``comparison_figures.rotations``."""
    curves = {method: readings.curve(method, "rotations") for method in readings.dynamic}
    ends = {method: curve.mean[-1] for method, curve in curves.items() if curve is not None}
    counts = [f"{method} {mean:.3g}" for method, mean in ends.items() if mean > 0]
    return f"Total number of rotations of the query, mean over runs: {join_and(counts)}."


def differences_text(readings: ResultsView, metric: str) -> str:
    """Caption of ``comparison_figures.paired_differences``."""
    effects = [one for method in readings.methods if (one := effect(readings, method, metric)) is not None]
    return f"{'; '.join(f'{one.method} compared with {one.reference}: {one.proof}' for one in effects)}."


def _mean(readings: ResultsView, method: str) -> str:
    row = readings.rows[method, readings.score]
    return _spread(readings, row, "")


def _spread(readings: ResultsView, row: Mapping[str, Any], prefix: str) -> str:
    metric = row["metric"]
    sd = row["sd"] if row["n"] > 1 else None
    text = prefix + with_spread(metric, row["mean"], sd) + (" %" if is_fraction(metric) else "")
    return text if sd is None else f"{text}, {pluralize(row['n'], readings.unit)}"


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Confidence interval of a mean; the mean itself for a single run."""
    if row["n"] < 2 or not row["sd"]:
        return row["mean"], row["mean"]
    from scipy import stats

    reach = float(stats.t.ppf(1 - SURE / 2, row["n"] - 1)) * row["sd"] / math.sqrt(row["n"])
    return row["mean"] - reach, row["mean"] + reach
