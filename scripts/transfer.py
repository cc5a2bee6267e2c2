"""Draws docs/pictures/transfer.png, and prints the tables of docs/methods/consistency.md and moda.md.

    equipoise compare --config transfer --out runs/transfer
    python scripts/transfer.py runs/transfer/results.json

Variants with MODA are compared with the same blocks and ordinary attention, all other variants with ``plain``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from equipoise.report import plot_style
from equipoise.report.text_format import format_signed
from equipoise.results.result_rows import load_results, summarize_runs
from equipoise.training import recipes

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "transfer.png"
METRICS = {
    "transfer": "unsupervised", "transfer_composed": "composed", "transfer_synchronized": "synchronized",
    "matching": "supervised pairs", "accuracy": "accuracy", "consistency": "score", "cycle_error": "cycle error",
}  # fmt: skip
"""Metric -> column header."""
PLAIN_NUMBERS = ("consistency", "cycle_error")
AGAINST = {"moda": "attention", "moda_consistency": "attention_consistency"}

ROUTES = {
    "plain, composed": ("plain", "transfer_composed"),
    "consistency, direct": ("consistency", "transfer"),
    "supervised, direct": ("supervised", "transfer"),
    "plain, synchronized": ("plain", "transfer_synchronized"),
    "consistency, synchronized": ("consistency", "transfer_synchronized"),
    "supervised, synchronized": ("supervised", "transfer_synchronized"),
}
"""Method to match the unsupervised pair -> variant and metric."""


def routes(runs: Sequence[Any]) -> str:
    """Table of the methods to match the unsupervised pair, compared with composing the supervised maps."""
    ways = [
        {**run, "method": name, "metrics": {"found": run["metrics"][metric]}}
        for name, (method, metric) in ROUTES.items()
        for run in runs
        if run["method"] == method
    ]
    return table(ways, {"found": "matched"}, "found", default="plain, composed")


def table(runs: Sequence[Any], metrics: Mapping[str, str], score: str, default: str = "plain") -> str:
    """Markdown table of mean and standard deviation over seeds, and the paired difference of ``score``."""
    rows = {(row["method"], row["metric"]): row for row in summarize_runs(runs, AGAINST, default=default)}
    methods = list(dict.fromkeys(method for method, _ in rows))
    shown = [name for name in metrics if any(metric == name for _, metric in rows)]
    lines = ["| variant | " + " | ".join(metrics[name] for name in shown) + " | against | difference |"]
    lines.append("|---" * (len(shown) + 3) + "|")
    for method in methods:
        cells = [_cell(rows[method, name], name) for name in shown]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {_difference(rows[method, score])} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], metric: str) -> str:
    factor, digits = (1, 2) if metric in PLAIN_NUMBERS else (100, 1)
    spread = "" if row["sd"] is None else f" ± {factor * row['sd']:.{digits}f}"
    return f"{factor * row['mean']:.{digits}f}{spread}"


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return " | "
    chance = "" if row["p"] is None else ", p < 0.001" if row["p"] < 0.001 else f", p = {row['p']:.3f}"
    return (
        f"{row['reference']} | {format_signed(100 * row['difference'], 1)} ({row['higher']} of {row['pairs']}{chance})"
    )


def figure(runs: Sequence[Any]) -> Figure:
    """Plots the unsupervised pair for every variant and seed, and the composition of the supervised maps."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    drawn, axes = plot_style.new_axes(6.6, 0.36 * len(methods) + 1.15, grid="x")
    for row, method in enumerate(methods):
        own = [run["metrics"] for run in runs if run["method"] == method]
        places = row + 0.8 * plot_style.jitter(len(own))
        for metric, shade, mark in (
            ("transfer_composed", plot_style.MODALITY[1], "D"),
            ("transfer", plot_style.ACCENT, "o"),
        ):
            values = [metrics[metric] for metrics in own]
            axes.scatter(values, places, s=16, color=shade, marker=mark, alpha=0.75, linewidths=0, zorder=3)
            mean = sum(values) / len(values)
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color=shade, zorder=2)
    chance = runs[0]["metrics"]["chance"]
    axes.axvline(chance, color=plot_style.MUTED, linewidth=1, linestyle=(0, (4, 2)))
    axes.text(chance, -0.62, " chance", color=plot_style.MUTED, fontsize=8.5, va="bottom")
    plot_style.name_rows(axes, [method.replace("_", " + ") for method in methods])
    axes.set_xlim(0.15, 0.9)
    axes.set_xlabel("items matched correctly", color=plot_style.INK)
    plot_style.percent(axes.xaxis)
    for shade, mark, words in (
        (plot_style.ACCENT, "o", "audio to text, direct"),
        (plot_style.MODALITY[1], "D", "composed through the image"),
    ):
        axes.scatter([], [], s=22, color=shade, marker=mark, linewidths=0, label=words)
    axes.legend(frameon=False, fontsize=8.5, loc="center", bbox_to_anchor=(0.35, 0.8))
    plot_style.set_title(drawn, "Audio and text, a pair without supervision (except in “supervised”)")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a comparison with the recipe transfer")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = parser.parse_args()
    order = recipes.load_recipe("transfer").methods
    runs = sorted(load_results(given.results)["runs"], key=lambda run: order.index(run["method"]))
    first = table(runs, METRICS, "transfer")
    sys.stdout.write(f"{first}\n\n{routes(runs)}\n\n{table(runs, {'accuracy': 'accuracy'}, 'accuracy')}\n")
    with plot_style.style_context():
        given.picture.write_bytes(plot_style.to_png(figure(runs), dpi=160))


if __name__ == "__main__":
    main()
