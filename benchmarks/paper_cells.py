"""Formats a table of the paper in Markdown: our values next to the published ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import equipoise as eq
from equipoise import data

Values = Mapping[int, float]
"""Seed -> value."""
Figures = dict[str, dict[str, dict[int, float]]]
"""Method -> name of the value -> seed -> value."""


@dataclass(frozen=True)
class Table:
    """One of the paper's tables.

    Args:
        number: number of the table in the paper.
        title: title of the table.
        theirs: data sets of the paper; each published cell has one value per data set, in this order.
        base, rolled: methods without and with RollingQ.
        measure: (model, data set) -> name -> value, as a fraction.
        rows: name of a value -> label of its row.
        paper: name of a value -> published values without and with RollingQ, for each data set.
        scale: 100 to print values in percent.
        origin: name of the value from which drops are computed.
        alone: name of a value -> unimodal model whose accuracy is printed in the same row, and the published accuracy.
        also: additional methods that are not in the paper.
    """

    number: str
    title: str
    theirs: str
    base: str
    rolled: str
    measure: Callable[[eq.FusionModel, data.Dataset], dict[str, float]]
    rows: dict[str, str]
    paper: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    scale: int = 100
    origin: str | None = None
    alone: dict[str, tuple[str, float]] = field(default_factory=dict)
    also: tuple[str, ...] = ("ensemble+corruption",)

    @property
    def methods(self) -> tuple[str, ...]:
        return self.base, self.rolled, *self.also


def rows(table: Table, figures: Figures) -> list[list[str]]:
    """Returns the cells of the table: a header, then a row per value."""
    head = ["", f"`{table.base}`", "paper", f"`{table.rolled}`", "paper", "difference", "paper"]
    head += [f"`{method}`" for method in table.also] + (["alone", "paper"] if table.alone else [])
    lines = [head]
    for name, label in table.rows.items():
        base, rolled = (figures.get(method, {}).get(name, {}) for method in (table.base, table.rolled))
        theirs = table.paper.get(name, ((), ()))
        origin = table.paper.get(table.origin or "", ((), ()))
        cells = [label]
        for method, number in ((table.base, 0), (table.rolled, 1)):
            cells += [ours(table, figures.get(method, {}), name), paper(table, theirs[number], origin[number], name)]
        change = [there - here for here, there in zip(*theirs, strict=True)] if all(theirs) else []
        cells += [difference(table, base, rolled), " / ".join(signed(value, table) for value in change)]
        cells += [ours(table, figures.get(method, {}), name) for method in table.also]
        if table.alone:
            modality, value = table.alone.get(name, ("", math.nan))
            alone = figures.get(modality, {}).get("accuracy", {})
            cells += [spread(alone, table), plain(value, table) if modality else ""]
        lines.append(cells)
    return lines


def ours(table: Table, own: Mapping[str, Values], name: str) -> str:
    """Returns mean ± sample standard deviation over seeds, and the mean drop from ``origin``."""
    cell = spread(own.get(name, {}), table)
    if not cell or table.origin in (None, name):
        return cell
    before = own.get(table.origin, {})
    drops = [value - before[seed] for seed, value in own[name].items() if seed in before]
    return f"{cell} ({signed(statistics.mean(drops) * table.scale, table)})" if drops else cell


def paper(table: Table, values: tuple[float, ...], origin: tuple[float, ...], name: str) -> str:
    cells = [plain(value, table) for value in values]
    if table.origin not in (None, name):
        drops = [value - before for value, before in zip(values, origin, strict=False)]
        cells = [f"{cell} ({signed(drop, table)})" for cell, drop in zip(cells, drops, strict=True)]
    return " / ".join(cells)


def difference(table: Table, base: Values, rolled: Values) -> str:
    """Returns the mean difference on the same seeds, and the number of seeds with a positive difference."""
    found = [rolled[seed] - base[seed] for seed in base if seed in rolled]
    found = [value for value in found if math.isfinite(value)]
    if not found:
        return ""
    higher = sum(value > 0 for value in found)
    return f"{signed(statistics.mean(found) * table.scale, table)} (higher on {higher} of {len(found)})"


def spread(values: Values, table: Table) -> str:
    known = [value * table.scale for value in values.values() if math.isfinite(value)]
    if not known:
        return ""
    mean = plain(statistics.mean(known), table)
    return mean if len(known) == 1 else f"{mean} ± {plain(statistics.stdev(known), table)}"


def plain(value: float, table: Table) -> str:
    return f"{value:.{2 if table.scale == 1 else 1}f}".replace("-", "−")


def signed(value: float, table: Table) -> str:
    return f"{value:+.{2 if table.scale == 1 else 1}f}".replace("-", "−")


def markdown(table: Table, figures: Figures, title: str) -> str:
    """Returns title, seeds and table."""
    seeds = {method: sorted({s for values in own.values() for s in values}) for method, own in figures.items()}
    listed = "; ".join(f"`{method}` {', '.join(map(str, of))}" for method, of in seeds.items()) or "none is finished"
    head, *body = rows(table, figures)
    lines = [
        f"## Table {table.number}. {table.title}", "", f"Ours: {title}. Seeds: {listed}. Paper: {table.theirs}.", "",
        f"| {' | '.join(head)} |", f"|{'---|' * len(head)}",
    ]  # fmt: skip
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])
