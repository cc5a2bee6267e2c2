"""Command ``report``: the page of a results.json."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from ..io.atomic_files import atomic_write, check_file
from ..results import result_rows
from .command_line import Parser, described, path


def report_parser() -> Parser:
    parser = described(
        "Writes results.json as a self-contained HTML page.",
        "equipoise report runs/demo",
        "equipoise report runs/demo/results.json --out page.html",
    )
    parser.add_argument("results", type=path, help="results.json, or its folder")
    parser.add_argument(
        "--out", type=path, default=None, help="output file; by default report.html next to the results"
    )
    return parser


def report(options: Namespace) -> int:
    from ..training.run_spec import check_against

    results = options.results / "results.json" if options.results.is_dir() else options.results
    page = options.out or results.with_name("report.html")
    if not page.is_dir() or page.is_symlink():
        check_file(page, "report")
    content = result_rows.load_results(options.results)
    check_against(results.parent, content["runs"])
    write_report(content, results, page)
    return 0


def write_report(content: dict[str, Any], results: Path, path: Path) -> None:
    """Writes report.html, and summary.png if the report is written next to results.json."""
    from ..report import ResultsView
    from ..report import report as draw
    from ..report.comparison_figures import summary_png
    from ..report.damage_figure import damage_png
    from .console import out

    page = draw(content, path)
    is_next_to_results = page.parent.resolve() == results.parent.resolve()
    view = ResultsView(content)
    image = (damage_png(view) or summary_png(view)) if is_next_to_results else None
    if image is not None:
        atomic_write(results.with_name("summary.png"), image)
    out.print(f"results: {results}", soft_wrap=True, highlight=False)
    out.print(f"report:  {page}", soft_wrap=True, highlight=False)
