"""Paired difference of two methods on one metric, shared by titles, sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from ..results.result_rows import RunResult, finite_or_none, paired, run_pairs
from ..results.significance import SURE, grouped_p, holm, paired_p, resampled_p, unpack_outcomes
from .results_view import ResultsView
from .text_format import (
    as_read,
    format_delta,
    format_p,
    format_value,
    is_fraction,
    method_title,
    metric_label,
    pluralize,
)


@dataclass(frozen=True)
class Effect:
    """Difference of a method to its reference in one metric, on the same seeds.

    Attributes:
        method, reference, metric: names.
        before, after: means of the reference and of the method over the pairs, as stored.
        p: two-sided p-value of a paired t-test over the pairs, None if all differences are equal; for a single pair,
            of a paired test over the test samples, or over their groups, None if their outcomes are unknown.
        pairs: number of seeds and folds that both have.
        agree: number of pairs whose difference has the sign of the mean.
        unit: name of a pair, "seed" or "run".
        groups: number of groups of test samples that are a random factor in the test of a single pair; 0 without.
    """

    method: str
    reference: str
    metric: str
    before: float
    after: float
    p: float | None
    pairs: int
    agree: int | None
    unit: str
    groups: int = 0

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def sure(self) -> bool:
        """Whether the difference is significant."""
        return self.p is not None and self.p < SURE

    @property
    def size(self) -> float:
        """The difference relative to the range of the metric: 1 for fractions, 2 for r, otherwise the reference."""
        if self.metric == "noise_attention_r":
            return abs(self.difference) / 2
        scale = 1.0 if is_fraction(self.metric) else abs(self.before)
        return abs(self.difference) / scale if scale else 0.0

    @property
    def course(self) -> str:
        return f"{format_value(self.metric, self.after)} instead of {format_value(self.metric, self.before)}"

    @property
    def proof(self) -> str:
        """The difference, the number of pairs with a difference of this sign, and the p-value if there is one."""
        parts = [format_delta(self.metric, self.difference)]
        if self.pairs < 2:
            over = pluralize(self.groups, "group") + " of test samples" if self.groups else "the test samples"
            tested = [] if self.p is None else [f"{format_p(self.p)} over {over}"]
            return ", ".join([*parts, f"one {self.unit} only", *tested])
        if self.agree is not None:
            parts.append(f"{'higher' if self.more else 'lower'} on {self.agree} of {pluralize(self.pairs, self.unit)}")
        if self.p is not None:
            parts.append(format_p(self.p))
        return ", ".join(parts)

    @property
    def more(self) -> bool:
        """Whether the displayed value increases; an error increases if the stored score decreases."""
        return as_read(self.metric, self.difference) > 0

    @property
    def sentence(self) -> str:
        """The effect in words, no stronger than its evidence."""
        words = describe_effect(self.metric)
        if self.difference == 0:
            return f"{words} is the same, {format_value(self.metric, self.after)}"
        if self.sure:
            return f"{words} is significantly {'higher' if self.more else 'lower'}, {self.course} ({self.proof})"
        if self.p is None and self.pairs < 2:
            return f"{words} is {self.course} ({self.proof})"
        return f"{words} does not differ significantly, {self.course} ({self.proof})"


def describe_effect(metric: str) -> str:
    """The name of a metric inside a sentence.

    Example:
        >>> describe_effect("accuracy_noise/audio"), describe_effect("noise_attention_r")
        ('accuracy with audio replaced by noise', 'attention–noise correlation r')
    """
    kind, _, name = metric.partition("/")
    for condition, words in (("_noise", "replaced by noise"), ("_corrupted", "damaged")):
        if name and kind.endswith(condition):
            return f"{metric_label(kind.removesuffix(condition))} with {name} {words}"
    return (
        metric_label(metric)
        if metric != "noise_attention_r"
        else method_title(metric)[:1].lower() + method_title(metric)[1:]
    )


def effect(readings: ResultsView, method: str, metric: str) -> Effect | None:
    """A method compared with its reference; None without a pair of runs with this metric."""
    row = readings.row(method, metric)
    if row is None or row["difference"] is None:
        return None
    reference = row.get("reference")
    pairs = readings.pairs(method, reference, metric)
    if pairs:
        after, before = (fmean(side) for side in zip(*pairs, strict=True))
    else:
        after, before = row["mean"], row["mean"] - row["difference"]
    return _build(readings, row, str(reference or "its reference"), before, after, [a - b for a, b in pairs])


def between(readings: ResultsView, method: str, other: str, metric: str) -> Effect | None:
    """A method compared with any other one; None without a pair of runs."""
    pairs = readings.pairs(method, other, metric)
    if not pairs:
        return None
    after, before = (fmean(side) for side in zip(*pairs, strict=True))
    differences = [a - b for a, b in pairs]
    row = {"method": method, "metric": metric, "n": len(pairs), **paired(differences)}
    return _build(readings, row, other, before, after, differences)


def _build(
    readings: ResultsView, row: Mapping[str, Any], reference: str, before: float, after: float, differences: list[float]
) -> Effect:
    difference = row["difference"]
    agree = sum(one * difference > 0 for one in differences) if differences else None
    count = int(row.get("pairs", row["n"]))
    p, groups = finite_or_none(row["p"]), 0
    if p is None and count == 1:
        p, groups = _p_over_samples(readings, row["method"], reference, row["metric"])
    return Effect(row["method"], reference, row["metric"], before, after, p, count, agree, readings.unit, groups)


def _p_over_samples(
    readings: ResultsView, method: str, reference: str, metric: str
) -> tuple[float | None, int]:  # fmt: skip
    """p-value of the paired test over test samples and the number of their groups, 0 without.

    The p-value is None without a single pair of runs with stored outcomes.
    """
    pairs = run_pairs(readings.runs, method, reference, metric)
    if len(pairs) != 1:
        return None, 0
    stored = [run.get("outcomes", {}).get(metric) for run in pairs[0]]
    if None in stored:
        # Resamples are of single samples, which are not independent if there are groups.
        grouped = any("groups" in run for run in pairs[0])
        return None if grouped else _p_over_resamples(*pairs[0], metric), 0
    first, second = (unpack_outcomes(outcomes) for outcomes in stored if outcomes is not None)
    if len(first) != len(second):
        return None, 0
    valid = ~(np.isnan(first) | np.isnan(second))
    groups = _groups(pairs[0], len(first))
    if groups is not None and valid.any():
        return grouped_p((first - second)[valid], groups[valid]), len(np.unique(groups[valid]))
    return paired_p(first[valid], second[valid]) if valid.any() else None, 0


def _groups(pair: tuple[RunResult, RunResult], samples: int) -> np.ndarray | None:
    """The group of each test sample; None if there are none, or if those of two runs differ.

    One run is enough, since runs of earlier versions have none.
    """
    packed = {run["groups"] for run in pair if "groups" in run}
    groups = unpack_outcomes(packed.pop()) if len(packed) == 1 else None
    return None if groups is None or len(groups) != samples else groups


def _p_over_resamples(run: RunResult, other: RunResult, metric: str) -> float | None:
    """p-value of the paired bootstrap; None without the metric of the same resamples of the same samples."""
    first, second = (one.get("resamples", {}).get(metric) for one in (run, other))
    values = [finite_or_none(one["metrics"].get(metric)) for one in (run, other)]
    if first is None or second is None or None in values or run.get("bootstrap") != other.get("bootstrap"):
        return None
    rows = [unpack_outcomes(packed) for packed in (first, second)]
    return resampled_p(float(values[0]) - float(values[1]), *rows) if len(rows[0]) == len(rows[1]) else None  # type: ignore[arg-type]


def tested_effects(readings: ResultsView) -> list[Effect]:
    """Differences to the references in the score, the score under noise or damage, and the response of attention.

    Unimodal baselines are only included if there are no other methods, differences without a p-value not at all.
    """
    score = readings.score
    metrics = [
        m
        for m in readings.metrics
        if m in (score, "noise_attention_r") or m.startswith((f"{score}_noise/", f"{score}_corrupted/"))
    ]
    methods = [m for m in readings.methods if m not in readings.single] or readings.methods
    found = (effect(readings, method, metric) for method in methods for metric in metrics)
    return [one for one in found if one is not None and one.p is not None]


def largest(effects: Sequence[Effect]) -> Effect | None:
    """The largest of the effects that are significant after Holm's correction for their number; None without one."""
    corrected = holm([one.p or 0.0 for one in effects])
    sure = [one for one, p in zip(effects, corrected, strict=True) if p < SURE]
    return max(sure, key=lambda one: one.size, default=None)
