"""Metrics of a diagnosis, statistical tests between them, and the type of a finding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from ..results.result_rows import finite_or_none
from ..results.significance import SURE, paired_p, resampled_p, unpack_outcomes, unpaired_p
from .text_format import format_delta, format_p, format_value, gain, is_fraction, main_score, pluralize

Judgment = Literal["good", "bad", "neutral"]

ERRORS = NormalDist().inv_cdf(1 - SURE / 2)
"""Half width of the 95 % interval in standard errors."""


@dataclass(frozen=True)
class Verdict:
    """One finding and its evidence.

    Attributes:
        key: the rule, and the modality where there is one, as in "use/audio".
        claim: short form for a headline.
        text: sentence with the values.
        figures: metric name -> value.
        test: name of the test with the evidence.
        ok: "good", "bad", or "neutral" if it is inconclusive or neither.
    """

    key: str
    claim: str
    text: str
    figures: dict[str, float] = field(default_factory=dict)
    test: str = "score"
    ok: Judgment = "neutral"


@dataclass(frozen=True)
class Comparison:
    """Two scores and the test of their difference.

    Attributes:
        value, base: both scores, over the samples for which both are known.
        p: two-sided p-value; None if it cannot be computed.
        samples: number of samples.
        paired: whether the outcomes of single samples were compared.
        partial: whether the samples are a subset of those of the diagnosis.
        reach: half width of the 95 % interval of the difference; NaN if unknown.
        lower: whether smaller values are better.
    """

    value: float
    base: float
    p: float | None
    samples: int
    paired: bool = False
    partial: bool = False
    reach: float = math.nan
    lower: bool = False

    @property
    def difference(self) -> float:
        return self.value - self.base

    @property
    def gain(self) -> float:
        """The difference with the sign that is positive where the value is better."""
        return -self.difference if self.lower else self.difference

    @property
    def sure(self) -> bool:
        """Whether the difference is significant."""
        return self.p is not None and self.p < SURE

    @property
    def better(self) -> bool:
        return self.sure and self.gain > 0

    @property
    def worse(self) -> bool:
        return self.sure and self.gain < 0

    def within(self, size: float) -> bool:
        """Whether the 95 % interval of the difference is within [-size, size]."""
        return abs(self.difference) + self.reach <= size


class VerdictEvidence:
    """Metrics of one diagnosis and statistical tests between them.

    Args:
        content: a ``Diagnosis.to_dict()`` with names, task, samples, metrics and details.

    Scores are compared on the same samples: classes by McNemar's test, labels and errors by a bootstrap over samples
    (``equipoise.results.significance``). If the outcomes of single samples are unknown, for example if the score of
    another model was provided as a number, a conservative normal test treats the two as scores of different samples.

    Example:
        >>> each = {"accuracy": "1" * 60 + "0" * 40, "accuracy_mask/a": "0" * 10 + "1" * 50 + "0" * 40}
        >>> metrics = {"accuracy": 0.6, "accuracy_mask/a": 0.5}
        >>> content = {"names": ["a"], "samples": 100, "metrics": metrics, "details": {"score": {"outcomes": each}}}
        >>> round(VerdictEvidence(content).compare("accuracy_mask/a", "accuracy").p, 4)
        0.001
        >>> round(VerdictEvidence({**content, "details": {}}).compare("accuracy_mask/a", "accuracy").p, 2)
        0.16
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.names = tuple(content["names"])
        self.samples = int(content["samples"])
        self.metrics: Mapping[str, Any] = content["metrics"]
        self.details: Mapping[str, Any] = content.get("details") or {}
        self.score = main_score(content.get("protocol") or {}, self.metrics)
        self.lower = gain(self.score, 1.0) < 0
        self.constant = f"{self.score}_constant"
        self.fraction = is_fraction(self.score)
        self._deviation = finite_or_none((self.details.get("score") or {}).get("deviation"))
        self._outcomes, self._resamples = self._stored("outcomes"), self._stored("resamples")
        self._compared: dict[tuple, Comparison | None] = {}

    def _stored(self, kind: str) -> dict[str, np.ndarray]:
        return {
            metric: unpack_outcomes(packed)
            for part in self.details.values()
            if isinstance(part, Mapping)
            for metric, packed in (part.get(kind) or {}).items()
        }

    def get(self, metric: str) -> float | None:
        """The value of a metric; None if it is missing or not finite."""
        return finite_or_none(self.metrics.get(metric))

    def of(self, kind: str, name: str) -> float | None:
        """The score under a condition, such as ``of("noise", "audio")``."""
        return self.get(self.named(kind, name))

    def named(self, kind: str, name: str) -> str:
        """Name of the metric of a condition."""
        return f"{self.score}_{kind}/{name}"

    def compare(self, metric: str, base: str, other: VerdictEvidence | None = None) -> Comparison | None:
        """Compares ``metric`` with ``base``; None if one of them is missing.

        Args:
            other: the diagnosis that ``base`` belongs to; by default this one.
        """
        key = metric, base, id(other)
        if key not in self._compared:
            self._compared[key] = self._compare(metric, base, other or self)
        return self._compared[key]

    def _compare(self, metric: str, base: str, other: VerdictEvidence) -> Comparison | None:
        value, against = self.get(metric), other.get(base)
        if value is None or against is None:
            return None
        lower = self.lower
        rows, others = self._resamples.get(metric), other._resamples.get(base)
        if rows is not None and others is not None and len(rows) == len(others) and self._same_samples(other):
            p = resampled_p(value - against, rows, others)
            reach = ERRORS * float(np.nanstd(rows - others)) if p is not None else math.nan
            return Comparison(value, against, p, self.samples, True, reach=reach, lower=lower)
        first, second = self._outcomes.get(metric), other._outcomes.get(base)
        if first is None or second is None or len(first) != len(second) or not self._same_samples(other):
            variances = self._variance(metric, value), other._variance(base, against)
            # Shrink fractions toward 1/2: a standard error of 0 would make every difference significant.
            shrunk = (self._shrink(value), other._shrink(against)) if self.fraction else (value, against)
            p = 1.0 if value == against else unpaired_p(*shrunk, *variances)
            reach = ERRORS * math.sqrt(sum(variances))
            return Comparison(value, against, p, min(self.samples, other.samples), reach=reach, lower=lower)
        both = ~(np.isnan(first) | np.isnan(second))
        count, partial = int(both.sum()), not bool(both.all())
        if not count:
            return None
        first, second = first[both], second[both]
        if partial:
            value, against = float(first.mean()), float(second.mean())
        reach = _reach(first - second, self.fraction)
        return Comparison(value, against, paired_p(first, second), count, True, partial, reach, lower)

    def _same_samples(self, other: VerdictEvidence) -> bool:
        """Whether both have the same samples in the same order: by their targets, or the outcomes of a constant."""
        if self is other:
            return True
        mine, theirs = ((one.details.get("score") or {}).get("target") for one in (self, other))
        if mine is not None or theirs is not None:
            return mine == theirs
        outcomes, its = self._outcomes.get(self.constant), other._outcomes.get(other.constant)
        return outcomes is not None and its is not None and np.array_equal(outcomes, its)

    def _shrink(self, value: float) -> float:
        return (value * self.samples + 1) / (self.samples + 2)

    def _variance(self, metric: str, value: float) -> float:
        """Squared standard error of a score; NaN if unknown."""
        rows = self._resamples.get(metric, self._resamples.get(self.score))
        if rows is not None:
            return float(np.nanvar(rows)) if np.isfinite(rows).any() else math.nan
        each = self._outcomes.get(metric)
        if not self.fraction and each is not None:
            finite = each[~np.isnan(each)]
            return float(finite.var(ddof=1)) / len(finite) if len(finite) > 1 else math.nan
        if self.fraction:
            count = self.samples if each is None else int((~np.isnan(each)).sum())
            shrunk = (value * count + 1) / (count + 2)
            return max(shrunk * (1 - shrunk), 0.0) / (count + 2)
        return math.nan if self._deviation is None else self._deviation**2 / max(self.samples, 1)

    def reach(self, metric: str) -> float:
        """Half width of the 95 % interval of a score; NaN if unknown."""
        value = self.get(metric)
        return math.nan if value is None else ERRORS * math.sqrt(self._variance(metric, value))

    @property
    def informed(self) -> bool | None:
        """Whether the score is significantly above that of the constant prediction; None if unknown."""
        compared = self.compare(self.score, self.constant)
        return None if compared is None else compared.better

    def say(self, value: float) -> str:
        return format_value(self.score, value)

    def differ(self, value: float) -> str:
        return format_delta(self.score, value)

    def proof(self, found: Comparison) -> str:
        """The difference and its p-value as text."""
        parts = [self.differ(found.difference)]
        parts += [] if found.p is None else [format_p(found.p)]
        parts += [] if found.paired or found.p is None else ["unpaired"]
        parts += [f"on the {pluralize(found.samples, 'sample')} with both"] if found.partial else []
        return ", ".join(parts)


def _reach(differences: np.ndarray, fraction: bool) -> float:
    """Half width of the 95 % interval of the mean of paired differences.

    For fractions, two pseudo-observations +1 and -1 are added, so that the interval is not empty if all samples agree
    (Bonett, Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data",
    J. Educ. Behav. Stat. 2012).
    """
    values = np.concatenate([differences, [1.0, -1.0]]) if fraction else differences
    return ERRORS * float(values.std()) / math.sqrt(len(values))
