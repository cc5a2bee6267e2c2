"""Prints the table of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

AGAINST, SEEDS = "against", "seeds"
"""Columns of paired differences and of the number of runs."""


def show(content: dict[str, Any], console: Console) -> None:
    """Prints the score on clean input and under noise, and the response of attention to noise.

    If the terminal is too narrow, columns are dropped and listed below the table. Method, score and paired difference
    are always shown, wrapped if necessary; numbers are never truncated.
    """
    from ..report.text_format import is_error, is_fraction, main_score, metric_label

    rows = {(row["method"], row["metric"]): row for row in content["summary"]}
    score = main_score(content["protocol"], {metric for _, metric in rows})
    target = content["protocol"].get("noise_modality")
    replaced = list(dict.fromkeys(metric for _, metric in rows if metric.startswith(f"{score}_noise/")))
    # Columns at the end are dropped first; keep the noise modality of the attention test longest.
    replaced.sort(key=lambda metric: metric != f"{score}_noise/{target}")
    short = "MAE" if score == "negative_error" else metric_label(score)
    counts = {row["n"] for (_, metric), row in rows.items() if metric == score}
    columns = ({SEEDS: SEEDS} if len(counts) > 1 else {}) | {score: short}
    columns |= {metric: f"{metric.partition('/')[2]} = noise" for metric in replaced}
    corrupted = [metric for metric in dict.fromkeys(m for _, m in rows) if metric.startswith(f"{score}_corrupted/")]
    columns |= {metric: f"{metric.partition('/')[2]} = damaged" for metric in corrupted}
    further_metrics = [metric for metric in (content["protocol"].get("metrics") or ())[1:] if isinstance(metric, str)]
    columns |= {metric: metric_label(metric) for metric in further_metrics}
    # Self-contained models report several metrics.
    others = [] if replaced else [metric for metric in dict.fromkeys(m for _, m in rows) if _shown(metric, score)]
    columns |= {metric: metric.replace("_", " ") for metric in others}
    columns |= {"noise_attention_r": "attention r", AGAINST: f"{short} against", "seconds_per_epoch": "s/epoch"}
    droppable = [
        "seconds_per_epoch",
        *reversed(others),
        *reversed(further_metrics),
        *reversed(replaced),
        *reversed(corrupted),
        "noise_attention_r",
        SEEDS,
    ]
    available = {AGAINST, SEEDS, *(metric for _, metric in rows)}
    columns = {name: words for name, words in columns.items() if name in available}
    droppable = [name for name in droppable if name in columns]
    dropped = []
    while droppable and _width(table := _table(rows, columns, score), console) > console.width:
        dropped.append(columns.pop(droppable.pop(0)))
    table = _table(rows, columns, score)
    console.print(table if _width(table, console) <= console.width else _table(rows, columns, score, ",\n"))
    unit, difference_unit = (" in %", " in points") if is_fraction(score) else ("", "")
    unit += " (lower is better)" if is_error(score) else ""
    noise = ", also with one modality replaced by noise," if any(name in columns for name in replaced) else ""
    caption = (
        f"{metric_label(score)}{unit}{noise} and its paired difference{difference_unit} to the named reference method"
    )
    if len(counts) == 1:
        seeds = counts.pop()
        caption = f"{seeds} {'run' if seeds == 1 else 'runs'} per method; {caption}"
    if "noise_attention_r" in columns:
        caption += "; attention r: correlation of attention with a modality being replaced by noise"
    console.print(caption, style="dim", highlight=False)
    if intervals := _intervals(content, score):
        console.print(intervals, style="dim", highlight=False)
    if dropped:
        what = ": " + ", ".join(dropped) if len(dropped) < 7 else f": {len(dropped)} more metrics"
        text = f"Not shown for lack of space{what}. The report has all columns."
        console.print(text, style="dim", highlight=False)


def _intervals(content: Mapping[str, Any], score: str) -> str:
    """95 % intervals of the score over the test samples; "" without any."""
    from ..report.results_view import ResultsView
    from ..report.text_format import as_read, format_value

    view = ResultsView(content)
    parts = []
    for method in view.methods:
        if (over := view.interval(method, score)) is not None:
            low, high = (format_value(score, end, unit=False) for end in sorted(as_read(score, end) for end in over))
            parts.append(f"{method} {low} to {high}")
    return f"95 % intervals over the test samples (bootstrap, mean over runs): {', '.join(parts)}" if parts else ""


def _shown(metric: str, score: str) -> bool:
    """Returns whether a metric of a self-contained model is an evaluation metric, not one of training or cost."""
    return metric not in (score, "parameters", "flops", "seconds_per_epoch", "air") and not metric.startswith(
        ("val_", "share/", "chance")
    )


def _table(
    rows: Mapping[tuple[str, str], dict[str, Any]], columns: Mapping[str, str], score: str, comma: str = ", "
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    # If no column can be dropped, wrap long names.
    table.add_column("method", overflow="fold")
    for name, header in columns.items():
        table.add_column(header, no_wrap=name != AGAINST, overflow="fold")
    for method in dict.fromkeys(method for method, _ in rows):
        table.add_row(method, *_cells(method, rows, list(columns), score, comma))
    return table


def _cells(
    method: str, rows: Mapping[tuple[str, str], dict[str, Any]], columns: Sequence[str], score: str, comma: str
) -> list[str]:
    from ..report.text_format import format_delta, format_p, with_spread

    cells = []
    for metric in columns:
        row = rows.get((method, score if metric in (AGAINST, SEEDS) else metric))
        if row is None or (metric == AGAINST and row["difference"] is None):
            cells.append("")
        elif metric == SEEDS:
            cells.append(str(row["n"]))
        elif metric == AGAINST:
            p = "" if row["p"] is None else f"{comma}{format_p(row['p'])}"
            points = format_delta(score, row["difference"]).removesuffix(" points")
            cells.append(f"{row['reference']} {points}{p}")
        else:
            cells.append(with_spread(metric, row["mean"], row["sd"]))
    return cells


def _width(table: Table, console: Console) -> int:
    """Returns the width of the table on an unlimited terminal."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum
