"""Finished runs as tidy rows: the statistics over seeds, and ``results.json`` that survives interruptions."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch

from ..errors import DataError, SchemaError
from ..io.atomic_files import atomic_write as atomic_write
from ..io.atomic_files import read_json
from ..io.atomic_files import to_jsonable as to_jsonable
from ..io.checksums import add_checksum, verify_checksum
from .comparison_results import ComparisonResults
from .results_schema import SCHEMA as SCHEMA
from .results_schema import check_results
from .significance import SURE, Outcomes

STATIC = ("concat", "sum", "film", "gated")  # without attention: the fair opponents of every dynamic fusion
AGAIN_WHOLE = "Delete it and run the command that wrote it again."


class RunResult(TypedDict):
    """One training: its identity, its final figures, and what was seen on the way.

    Attributes:
        method: a modality or fusion, plus balancers: ``"joint+rollingq"``.
        seed: the seed of weights, order and noise.
        fold: name of the split, or None where there is one only.
        metrics: metric name -> number; accuracies and shares are fractions in [0, 1]; None where undefined.
        history: one dictionary for each epoch: ``epoch`` from 1, and what is known of ``loss``, ``val_accuracy``
            (``val_negative_error`` of a regression), ``share`` {modality: fraction}, ``air``, ``rotations`` (so far).
        keys: for fusions with attention: ``{"before" | "after": {"clean" | "noise": {modality: {"cosine": {"edges",
            "counts"}, "cosine_mean", "cosine_std", "norm_mean", "norm_std"}}}}``.
        shares: ``{"clean" | "noise": {"edges", "counts"}}``, over the test samples, of the attention that goes to the
            other modalities while ``noise_modality`` is whole, or replaced by noise.
        outcomes: metric name -> how good the answer to each test sample is, as ``significance.unpack`` reads it; files
            of earlier versions have none.
        intervals: metric name -> [low, high], the 95 % interval over the test samples by the bootstrap; for runs whose
            recipe names ``metrics``, like all that follows.
        resamples: metric name -> the metric of every resample, as text; for metrics that are no mean of outcomes.
        undefined: metric name -> why it has no value.
        bootstrap: ``samples``, ``resamples``, ``seed`` and ``level`` of the intervals.
        groups: the number of the group (speaker, subject) of each test sample, as ``significance.pack_text`` writes it;
            for data with groups.
    """

    method: str
    seed: int
    fold: str | None
    metrics: dict[str, float | None]
    history: NotRequired[list[dict[str, Any]]]
    keys: NotRequired[dict[str, Any]]
    shares: NotRequired[dict[str, Any]]
    noise_modality: NotRequired[str]
    outcomes: NotRequired[dict[str, Outcomes]]
    intervals: NotRequired[dict[str, list[float]]]
    resamples: NotRequired[dict[str, str]]
    undefined: NotRequired[dict[str, str]]
    bootstrap: NotRequired[dict[str, Any]]
    groups: NotRequired[str]


Reference = Mapping[str, str] | Callable[[str], str | None]


def describe_environment() -> dict[str, Any]:
    """Returns versions and hardware that results depend on; nothing that identifies the computer.

    Example:
        >>> sorted(describe_environment())
        ['accelerator', 'cpus', 'equipoise', 'numpy', 'platform', 'python', 'threads', 'torch']
    """
    # The version is read from the loaded package, since installed metadata may belong to another copy; the platform
    # is not platform.platform(), whose kernel string may name the provider of the computer.
    return {
        "equipoise": sys.modules["equipoise"].__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def merge_results(runs: Iterable[RunResult], *more: Iterable[RunResult]) -> list[RunResult]:
    """Merges lists of runs, one run per (method, seed, fold); later ones replace earlier ones.

    Example:
        >>> old = {"method": "joint", "seed": 0, "fold": "A", "metrics": {"accuracy": 0.5}}
        >>> [run["metrics"]["accuracy"] for run in merge_results([old], [old | {"metrics": {"accuracy": 0.6}}])]
        [0.6]
    """
    merged: dict[tuple, RunResult] = {}
    for part in (runs, *more):
        for run in part:
            merged[run_identity(run)] = run
    return list(merged.values())


def run_identity(run: RunResult) -> tuple[str, int, str | None]:
    """Returns (method, seed, fold), which identifies a run."""
    return run["method"], run["seed"], run["fold"]


def build_results(
    runs: Sequence[RunResult],
    protocol: Mapping[str, Any],
    *,
    reference: Reference | None = None,
    default: str | None = None,
) -> ComparisonResults:
    """Builds the content of ``results.json``: runs in a fixed order, environment and summary.

    Runs are sorted by method in the order of ``protocol["methods"]``, then fold, then seed. ``reference`` and
    ``default`` are passed to ``summarize_runs``; by default they are the protocol's ``references`` and ``reference``.

    Example:
        >>> runs = [{"method": "joint", "seed": s, "fold": None, "metrics": {"accuracy": 0.5}} for s in (1, 0)]
        >>> [run["seed"] for run in build_results(runs, {"data": "digits"})["runs"]]
        [0, 1]
    """
    order = list(dict.fromkeys([*(protocol.get("methods") or ()), *(run["method"] for run in runs)]))
    ordered = sorted(merge_results(runs), key=lambda run: (order.index(run["method"]), run["fold"] or "", run["seed"]))
    return ComparisonResults({
        "schema": SCHEMA,
        "protocol": dict(protocol),
        "environment": describe_environment(),
        "runs": ordered,
        "summary": summarize_runs(
            ordered, reference or controls(protocol), default=default or protocol.get("reference")
        ),
    })  # fmt: skip


def controls(protocol: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Returns {method: its control} from the recipe's ``references``; None if there are none."""
    return protocol.get("references") or None


def summarize_runs(
    runs: Sequence[RunResult], reference: Reference | None = None, *, default: str | None = None
) -> list[dict[str, Any]]:
    """Summarizes runs: mean, standard deviation and paired difference to a reference per method and metric.

    d_i = metric(method, seed_i, fold_i) - metric(reference, seed_i, fold_i);  t = mean(d) sqrt(n) / sd(d), n-1 degrees
    of freedom, two-sided.

    Args:
        runs: finished runs; missing pairs and undefined (None, NaN) values are skipped.
        reference: {method: the method it is compared with}, or a function that returns it; by default ``x+balancer`` is
            compared with ``x`` if that was run, and all others with ``default``.
        default: reference of methods without a base; by default the first static fusion that was run.

    Returns:
        rows with ``method, metric, mean, sd`` (sample, ddof 1; None for one run), ``n`` (runs), ``reference``,
        ``difference`` (mean of d), ``p``, ``low, high`` (95 % interval of the difference), ``pairs`` (how many d) and
        ``higher`` (how many d > 0). ``difference`` is None without a pair, ``p`` with fewer than two or where all d
        are equal. Seeds of one split share its test samples, so p holds for new seeds, not for new data.

    Example:
        >>> runs = [{"method": m, "seed": s, "fold": None, "metrics": {"accuracy": a}}
        ...         for m, s, a in [("joint", 0, 0.5), ("joint", 1, 0.6), ("joint+x", 0, 0.6), ("joint+x", 1, 0.8)]]
        >>> row = summarize_runs(runs)[1]
        >>> row["reference"], round(row["difference"], 2), round(row["p"], 3)
        ('joint', 0.15, 0.205)
    """
    runs = merge_results(runs)
    methods = list(dict.fromkeys(run["method"] for run in runs))
    rows = []
    for method in methods:
        other = _reference(method, methods, reference, default)
        metrics = [run["metrics"] for run in runs if run["method"] == method]
        for metric in dict.fromkeys(name for metrics in metrics for name in metrics):
            values = [value for metrics in metrics if (value := finite_or_none(metrics.get(metric))) is not None]
            if values:
                mean, sd = _mean_sd(values)
                pair = paired(
                    [own_value - other_value for own_value, other_value in paired_values(runs, method, other, metric)]
                )
                rows.append({"method": method, "metric": metric, "mean": mean, "sd": sd, "n": len(values),
                             "reference": other if pair["pairs"] else None, **pair})  # fmt: skip
    return rows


def paired_values(
    runs: Iterable[RunResult], method: str, reference: str | None, metric: str
) -> list[tuple[float, float]]:
    """Returns (value of the method, value of the reference) of every seed and fold where both are comparable."""
    pairs = run_pairs(runs, method, reference, metric)
    return [(float(run["metrics"][metric] or 0), float(other["metrics"][metric] or 0)) for run, other in pairs]


def run_pairs(
    runs: Iterable[RunResult], method: str, reference: str | None, metric: str
) -> list[tuple[RunResult, RunResult]]:
    """Returns (run of the method, run of the reference) of every seed and fold where both have a comparable value.

    ``noise_attention_r`` of two runs is not comparable if they replaced different modalities.
    """
    runs = list(runs)
    references = {run_identity(run)[1:]: run for run in runs if run["method"] == reference}
    pairs = []
    for run in runs:
        other = references.get(run_identity(run)[1:])
        if run["method"] != method or other is None:
            continue
        values = [finite_or_none(one["metrics"].get(metric)) for one in (run, other)]
        same = not metric.startswith("noise_attention_r") or run.get("noise_modality") == other.get("noise_modality")
        if None not in values and same:
            pairs.append((run, other))
    return pairs


def finite_or_none(value: Any) -> float | None:
    """Converts a finite number to float; returns None for anything else."""
    return float(value) if isinstance(value, (int, float, np.number)) and math.isfinite(value) else None


def _reference(method: str, methods: Sequence[str], rule: Reference | None, default: str | None) -> str | None:
    base = method.partition("+")[0]
    if callable(rule):
        chosen = rule(method)
    elif rule is not None and method in rule:
        chosen = rule[method]
    elif base != method and base in methods:
        chosen = base
    else:
        chosen = default or next((name for name in methods if name in STATIC), None)
    return chosen if chosen != method else None


def _mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Returns the paired columns of a summary row: mean difference, paired t-test and confidence interval."""
    n = len(differences)
    row: dict[str, Any] = {"difference": None, "p": None, "low": None, "high": None, "pairs": n, "higher": 0}
    if n == 0:
        return row
    mean, sd = _mean_sd(differences)
    row["difference"], row["higher"] = mean, sum(d > 0 for d in differences)
    # Differences that are equal up to rounding would give t = 1e15 and p = 0.
    if sd is not None and sd > 1e-12 * max(1.0, abs(mean)):
        from scipy import stats

        error = sd / math.sqrt(n)
        row["p"] = float(2 * stats.t.sf(abs(mean) / error, n - 1))
        half_width = float(stats.t.ppf(1 - SURE / 2, n - 1)) * error
        row["low"], row["high"] = mean - half_width, mean + half_width
    return row


def write_results(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Writes results as JSON, atomically.

    NaN and infinities become null; tensors and arrays become lists.

    Raises:
        SchemaError: the content is not a results dictionary, or not serializable as JSON.
    """
    name = Path(path).name
    content = to_jsonable(content, name)
    check_results(content, f"write '{name}'")
    return atomic_write(path, json.dumps(add_checksum(content), indent=1, allow_nan=False) + "\n")


def load_results(path: str | os.PathLike[str]) -> ComparisonResults:
    """Loads ``results.json``, given its path or its folder.

    Raises:
        DataError: there is no such file.
        SchemaError: the file is not JSON, truncated, incomplete, of another schema, or was changed after it was
            written.
    """
    path = Path(path, "results.json") if Path(path).is_dir() else Path(path)
    who = f"read '{path.name}'"
    try:
        content = read_json(path)
    except FileNotFoundError:
        fix = "equipoise demo, compare and train write one; give it or its folder."
        raise DataError(who, expected="a results file", got="no such file", fix=fix) from None
    except OSError as error:
        raise DataError(who, expected="a results file", got=f"'{path}' ({error.strerror})") from error
    except ValueError as error:
        got = f"a file that is truncated or not JSON ({error})"
        raise SchemaError(who, expected="JSON", got=got, fix=AGAIN_WHOLE) from error
    return ComparisonResults(verify_checksum(validate_results(content, who), who, AGAIN_WHOLE))


def validate_results(content: Any, who: str) -> dict[str, Any]:
    """Validates and returns the content of ``results.json``.

    Raises:
        SchemaError: another schema, missing parts, or a part of the wrong type.
    """
    check_results(to_jsonable(content, who), who)
    return dict(content)
