"""``ComparisonResults``: the content of ``results.json``, shown as a table in notebooks and converted to tidy rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from ..errors import unknown_name
from ..io.atomic_files import atomic_write
from ..io.table_display import csv_text, html_table, to_pandas

COLUMNS = ("run", "method", "seed", "fold", "metric", "value", "low", "high")
"""Columns of ``results.csv``."""


class ComparisonResults(dict):
    """Content of ``results.json``: a dict with ``schema``, ``protocol``, ``environment``, ``runs`` and ``summary``.

    Returned by ``equipoise.training.compare`` and ``eq.results.load_results``. A notebook shows the summary as a table.

    Example:
        >>> run = {"method": "joint", "seed": 0, "fold": None, "metrics": {"accuracy": 0.5, "air": None}}
        >>> ComparisonResults(runs=[run], summary=[]).rows()[0]["run"]
        'joint/seed0'
    """

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row for each run and metric: run, method, seed, fold, metric, value, low, high.

        ``value`` is None where a metric is undefined; ``low`` and ``high`` are the 95 % interval over test samples, if
        the recipe names metrics.
        """
        return [
            {
                "run": "/".join(
                    [*([str(run["fold"])] if run.get("fold") else []), run["method"], f"seed{run['seed']}"]
                ),
                "method": run["method"],
                "seed": run["seed"],
                "fold": run.get("fold"),
                "metric": metric,
                "value": value,
                **dict(zip(("low", "high"), (run.get("intervals") or {}).get(metric, (None, None)), strict=True)),
            }
            for run in self["runs"]
            for metric, value in run["metrics"].items()
        ]

    def to_pandas(self, part: Literal["runs", "summary"] = "runs") -> Any:
        """Returns ``rows()``, or the summary with paired differences, as a ``pandas.DataFrame``.

        Args:
            part: ``"runs"``, or ``"summary"`` with one row for each method and metric, see ``summarize_runs``.

        Raises:
            ConfigError: another part; pandas is not installed.
        """
        if part not in ("runs", "summary"):
            raise unknown_name("to_pandas", "part", str(part), ("runs", "summary"))
        return to_pandas(self.rows() if part == "runs" else self["summary"], type(self).__name__)

    def write_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes ``rows()`` as CSV, atomically."""
        return atomic_write(path, csv_text(self.rows(), COLUMNS))

    def _repr_html_(self) -> str:
        """Metrics by method: mean and standard deviation over runs; the first metric is the main one."""
        protocol: Mapping[str, Any] = self.get("protocol") or {}
        summary: Sequence[Mapping[str, Any]] = self.get("summary") or ()
        methods = list(dict.fromkeys(row["method"] for row in summary))
        cells = {(row["metric"], row["method"]): _mean_sd(row) for row in summary}
        metrics = dict.fromkeys(row["metric"] for row in summary)
        main = protocol.get("score")
        ordered = [*([main] if main in metrics else []), *(name for name in metrics if name != main)]
        rows = [{"metric": name, **{method: cells.get((name, method)) for method in methods}} for name in ordered]
        runs = f"{len(self['runs'])} runs" if self.get("runs") else "no runs"
        note = escape(f"{protocol.get('recipe') or 'results'}: {runs}; mean ± standard deviation")
        failures = "".join(
            f"<li>{escape(str(one['method']))}, seed {escape(str(one['seed']))}: {escape(str(one['error']))}</li>"
            for one in self.get("failures") or ()
        )
        failed = f"<p>failed:</p><ul>{failures}</ul>" if failures else ""
        return f"<p>{note}</p>{html_table(rows, ['metric', *methods])}{failed}"


def _mean_sd(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:.4g}" + ("" if row["sd"] is None else f" ± {row['sd']:.2g}")
