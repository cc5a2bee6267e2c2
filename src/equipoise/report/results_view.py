"""Read access to complete or partial results for figures and sentences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from ..results.result_rows import RunResult, finite_or_none, paired_values
from ..results.result_rows import build_results as results_of
from .text_format import LABELS, SCORES, main_score


@dataclass(frozen=True, eq=False)
class MetricCurve:
    """A metric over the epochs: ``values`` is (run, epoch), NaN where a run has no value."""

    epochs: np.ndarray
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return np.nanmean(self.values, axis=0)


@dataclass(frozen=True, eq=False)
class BinnedCounts:
    """Fractions of samples between edges, pooled over runs."""

    edges: np.ndarray
    fraction: np.ndarray

    @property
    def mean(self) -> float:
        """Mean of the samples, up to half a bin width."""
        return float(((self.edges[1:] + self.edges[:-1]) / 2) @ self.fraction)


class ResultsView:
    """Read access to the content of ``results.json``, complete or partial.

    Args:
        results: content of a ``results.json``.

    Attributes:
        methods: in the order of the runs.
        score: main metric; ``text_format.gain`` gives the sign of a better difference.
        modalities: every modality named by a metric or a history.
        single: unimodal baselines.
        dynamic: methods with attention between modalities.
        noise_modality: modality that was replaced by noise for ``noise_attention_r``; None if unknown.

    Example:
        >>> run = {"method": "joint", "seed": 0, "fold": None, "metrics": {"accuracy": 0.5, "share/image": 1.0}}
        >>> readings = ResultsView({"protocol": {}, "runs": [run], "summary": []})
        >>> readings.dynamic, readings.modalities
        (['joint'], ('image',))
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.runs: list[RunResult] = list(results["runs"])
        self.protocol = results["protocol"]
        # An interrupted comparison has no summary yet.
        rows = results["summary"] or results_of(self.runs, self.protocol)["summary"]
        self.rows = {(row["method"], row["metric"]): row for row in rows}
        self.methods = list(dict.fromkeys(run["method"] for run in self.runs))
        self.metrics = sorted(dict.fromkeys(metric for _, metric in self.rows), key=_order_index)
        self.score = main_score(self.protocol, self.metrics)
        if self.protocol.get("metrics"):
            # The main metric and its noise come before other scores.
            self.metrics.sort(key=lambda m: m != self.score and not m.startswith(f"{self.score}_noise/"))
        self.modalities = self._modalities()
        self.single = [method for method in self.methods if method in self.modalities]
        self.dynamic = [method for method in self.methods if self._attends(method)]
        self.noise_modality = self._noise_modality()
        self.unit = "run" if len({run["fold"] for run in self.runs}) > 1 else "seed"

    def of(self, method: str) -> list[RunResult]:
        return [run for run in self.runs if run["method"] == method]

    def row(self, method: str, metric: str) -> Mapping[str, Any] | None:
        """The summary row; None if its mean is undefined."""
        row = self.rows.get((method, metric))
        return row if row is not None and row["mean"] is not None else None

    def values(self, method: str, metric: str) -> list[float]:
        """The values of a metric, one for each run that has it."""
        kind, _, replaced = metric.partition("/")
        values = [value for run in self.of(method) if (value := finite_or_none(run["metrics"].get(metric))) is not None]
        if not values and kind == f"{self.score}_noise" and method in self.modalities and method != replaced:
            # A unimodal model is unaffected by noise in another modality.
            return self.values(method, self.score)
        return values

    def interval(self, method: str, metric: str) -> tuple[float, float] | None:
        """95 % interval of a metric over the test samples, mean over the runs that have one."""
        intervals = [pair for run in self.of(method) if (pair := (run.get("intervals") or {}).get(metric)) is not None]
        return (fmean(low for low, _ in intervals), fmean(high for _, high in intervals)) if intervals else None

    def pairs(self, method: str, reference: str | None, metric: str) -> list[tuple[float, float]]:
        """(method, reference) values for every seed and fold that both have."""
        return paired_values(self.runs, method, reference, metric)

    def differences(self, method: str, reference: str | None, metric: str) -> list[float]:
        """method - reference, on the same seeds and folds."""
        return [value - base for value, base in self.pairs(method, reference, metric)]

    def curve(self, method: str, *path: str) -> MetricCurve | None:
        """One entry of the history over the epochs, as in ``curve("joint", "share", "audio")``."""
        tracks = []
        for run in self.of(method):
            track = {int(e["epoch"]): finite_or_none(_dig(e, path)) for e in run.get("history") or () if "epoch" in e}
            tracks.append({epoch: value for epoch, value in track.items() if value is not None})
        tracks = [track for track in tracks if track]
        epochs = sorted({epoch for track in tracks for epoch in track})
        if not epochs:
            return None
        values = [[track.get(epoch, math.nan) for epoch in epochs] for track in tracks]
        return MetricCurve(np.array(epochs), np.array(values))

    def rotation_epochs(self, method: str) -> Counter[int]:
        """epoch -> number of runs in which the query was rotated at its end."""
        curve = self.curve(method, "rotations")
        if curve is None:
            return Counter()
        counts = np.nan_to_num(curve.values)
        steps = np.diff(counts, axis=1, prepend=0.0) > 0
        return Counter({int(epoch): int(n) for epoch, n in zip(curve.epochs, steps.sum(axis=0), strict=True) if n})

    def histogram(self, method: str, *path: str) -> BinnedCounts | None:
        """Returns a histogram pooled over runs with equal weight, as in ``histogram("joint", "shares", "clean")``."""
        parts = [part for run in self.of(method) if (part := as_histogram(_dig(run, path))) is not None]
        if not parts:
            return None
        first = parts[0].edges
        if not all(len(part.edges) == len(first) and np.allclose(part.edges, first) for part in parts):
            low, high = min(part.edges[0] for part in parts), max(part.edges[-1] for part in parts)
            parts = [_rebin(part, np.linspace(low, high, len(first))) for part in parts]
        return BinnedCounts(parts[0].edges, np.mean([part.fraction for part in parts], axis=0))

    def moments(self, method: str) -> list[str]:
        """Which of "before" and "after" the first rotation have key distributions."""
        return [m for m in ("before", "after") if any(_dig(run, ("keys", m, "clean")) for run in self.of(method))]

    def replaced(self, method: str, moment: str) -> str | None:
        """The modality whose keys are shown under noise: that of the method, unless its keys did not change.

        The most attended modality, which is replaced, may differ before and after a rotation.
        """
        moved = {}
        for name in self.modalities:
            clean, noise = (self.histogram(method, "keys", moment, s, name, "cosine") for s in ("clean", "noise"))
            if clean is not None and noise is not None and len(clean.edges) == len(noise.edges):
                moved[name] = float(np.abs(clean.fraction - noise.fraction).sum())
        if moved.get(modality := self.disturbed(method) or "", 0.0) > 0:
            return modality
        return max(moved, key=lambda name: moved[name]) if moved else None

    def _modalities(self) -> tuple[str, ...]:
        names = [m.partition("/")[2] for m in self.metrics if m.startswith(("share/", f"{self.score}_noise/"))]
        in_history = [name for run in self.runs for e in run.get("history") or () for name in e.get("share") or {}]
        return tuple(dict.fromkeys([*(self.protocol.get("modalities") or ()), *names, *in_history]))

    def _attends(self, method: str) -> bool:
        metrics = {metric for (name, metric) in self.rows if name == method}
        return (
            "noise_attention_r" in metrics
            or any(metric.startswith("share/") for metric in metrics)
            or any(self.curve(method, "share", name) is not None for name in self.modalities)
        ) and method not in self.modalities

    def _noise_modality(self) -> str | None:
        modality = self.protocol.get("noise_modality")
        # The protocol may also describe in words how each run selects its modality.
        if isinstance(modality, str) and (modality in self.modalities or not self.modalities):
            return modality
        return _only(self.runs)

    def disturbed(self, method: str) -> str | None:
        """The modality that all runs of a method replace by noise; None if they differ or it is unknown."""
        return _only(self.of(method)) or self.noise_modality


def _only(runs: Sequence[RunResult]) -> str | None:
    """The modality that all runs replaced by noise; None if they differ."""
    modalities = {str(name) for run in runs if (name := run.get("noise_modality"))}
    return modalities.pop() if len(modalities) == 1 else None


ALL_SCORES = (*SCORES, *(name for name in LABELS if name not in SCORES))

ORDER = (
    *ALL_SCORES,
    *(f"{name}_noise" for name in ALL_SCORES),
    *(f"{name}_corrupted" for name in ALL_SCORES),
    "noise_attention_r",
    "noise_attention_r_own",
    "share",
    "air",
    "",
    "parameters",
    "flops",
    "seconds_per_epoch",
)
"""Order of metrics in tables: scores, attention, cost; unknown metrics take the position of ""."""


def _order_index(metric: str) -> int:
    kind = metric.partition("/")[0]
    return ORDER.index(kind if kind in ORDER else "")


def _dig(part: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def as_histogram(part: Any) -> BinnedCounts | None:
    """A part of a results file as a histogram; None if it is not a histogram or is empty."""
    if not isinstance(part, Mapping) or len(part.get("edges") or ()) != len(part.get("counts") or ()) + 1:
        return None
    counts = np.asarray(part["counts"], dtype=float)
    total = counts.sum()
    return BinnedCounts(np.asarray(part["edges"], dtype=float), counts / total) if total > 0 else None


def _rebin(part: BinnedCounts, edges: np.ndarray) -> BinnedCounts:
    middles = (part.edges[1:] + part.edges[:-1]) / 2
    return BinnedCounts(edges, np.histogram(middles, bins=edges, weights=part.fraction)[0])
