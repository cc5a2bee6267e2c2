"""Command ``demo``: the bundled data, from training to diagnosis."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..training import recipes
from .command_line import Parser, described, path
from .compare_command import add_workers, run_comparison
from .diagnose_command import diagnose, diagnose_parser

DEMO_SEEDS = 4
"""One fewer than the recipe has, so that the demo takes less than five minutes on two cores."""
DEMO_TESTS = "score,noise,masking,response,attention,shapley"


def demo_parser() -> Parser:
    parser = described(
        "Trains seven methods on the bundled digits; writes a table, results.json and report.html. Then diagnoses "
        "joint attention on the digits, and on generated data where it has no negative finding.",
        "equipoise demo",
        "equipoise demo --quick                one seed, under three minutes",
        "equipoise demo --out runs/mine        run again with the same folder to resume",
    )
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="output folder of runs, results and report")
    parser.add_argument("--quick", action="store_true", help="one seed instead of four")
    add_workers(parser)
    return parser


def demo(options: Namespace) -> int:
    recipe = recipes.load_recipe("digits")
    failed = run_comparison(recipe, recipe.methods, 1 if options.quick else DEMO_SEEDS, [], options, title="digits")
    return failed or _healthy_demo(options)


def _healthy_demo(options: Namespace) -> int:
    """Trains joint attention on data where it is healthy, and diagnoses it there and on the digits."""
    from ..training.comparison import compare
    from .console import out
    from .progress_bars import ComparisonProgress

    recipe, folder = recipes.load_recipe("generated_failures"), options.out / "generated_failures"
    with ComparisonProgress(out) as progress:
        # In this process: the runs are short, and worker processes would have to start again.
        compare(
            recipe, recipe.methods, seeds=1, out=folder, title="generated_failures", workers=0, listener=progress,
            begin=progress.begin,
        )  # fmt: skip
    for title, runs in (("digits", options.out), ("generated_failures", folder)):
        out.print(f"\n[bold]{title}[/bold]: diagnosis of joint attention, seed 0")
        run = runs / "runs" / "all" / "joint" / "seed0"
        diagnose(diagnose_parser().parse_args([str(run), "--tests", DEMO_TESTS]))
    return 0
