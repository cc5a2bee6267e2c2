"""Command ``compare``: methods x seeds x folds."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.corruptions import check_corruptions
from ..errors import ConfigError
from ..io.atomic_files import check_path_component
from ..training.recipes import Recipe
from ..training.recipes.recipe_changes import parse_value
from .command_line import Parser, described, fail, path, whole, with_recipe_options
from .compare_search import add_search_options, search_options
from .data_options import add_data_options, chosen_recipe
from .report_command import write_report


def compare_parser() -> Parser:
    parser = described(
        "Runs methods x seeds x folds in parallel; finished runs are not repeated.",
        "equipoise compare --config digits --methods concat,joint,joint+rollingq --seeds 5",
        "equipoise compare --config av_digits --folds A,B,C --out runs/folds",
        "equipoise compare --config mine.yaml --train.epochs 3 --data.audio_noise 1.5",
        "equipoise compare --data people.csv --target label --group speaker --methods concat,joint --seeds 5",
        "equipoise compare --config cremad --executor slurm --slurm timeout_min=240 --slurm slurm_partition=gpu",
        "equipoise compare --config digits --methods joint --search train.learning_rate=1e-4..1e-2:log --trials 30",
    )
    add_data_options(parser)
    parser.add_argument("--methods", default=None, help="comma-separated; by default those of the recipe")
    parser.add_argument("--seeds", type=whole, default=None, help="number of seeds, starting at 0")
    parser.add_argument("--folds", default=None, help="comma-separated, for data sets with folds")
    parser.add_argument("--out", type=path, default=None, help="output folder; runs/<recipe> by default")
    parser.add_argument(
        "--leave-one-kind-out",
        metavar="KIND",
        default=None,
        help="a corruption of the catalog, such as blur, or several separated by commas: training with corruption and "
        "+reliability use the others, and the test measures the score under it",
    )
    add_workers(parser)
    parser.add_argument(
        "--accelerator", default="cpu",
        help="accelerator of Lightning; cpu by default, so that results do not depend on the machine; with gpu each "
        "run uses one device, and runs are distributed over the available ones",
    )  # fmt: skip
    parser.add_argument(
        "--executor", choices=("local", "slurm"), default="local",
        help="local: processes of this machine; slurm: one job per run (needs submitit). Jobs resume after a "
        "preemption; repeat the command to wait for jobs that are still queued or running",
    )  # fmt: skip
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="OPTION=VALUE",
        help="option of submitit's AutoExecutor, such as timeout_min=240, mem_gb=16, slurm_partition=gpu; repeatable",
    )  # fmt: skip
    add_search_options(parser)
    return with_recipe_options(parser)


def compare(options: Namespace) -> int:
    recipe, title = chosen_recipe(options)
    if options.leave_one_kind_out is not None:
        left_out = _split(options.leave_one_kind_out, "--leave-one-kind-out")
        check_corruptions(left_out, "--leave-one-kind-out")
        recipe = replace(recipe, left_out=left_out)
        title = "-".join([title, "without", *left_out])
    options.out = options.out or Path("runs") / check_path_component(title, "--config")
    names = recipe.methods if options.methods is None else _split(options.methods, "--methods")
    folds = recipe.folds if options.folds is None else _split(options.folds, "--folds")
    seeds = recipe.seeds if options.seeds is None else options.seeds
    if options.search:
        folds = recipe.folds[:1] if options.folds is None else folds
        return _search(recipe, names, folds, options, title=title)
    if options.trials is not None:
        raise ConfigError("compare", expected="--trials only with --search", got=f"--trials {options.trials}")
    return run_comparison(
        recipe, names, seeds, folds, options, title=title, accelerator=options.accelerator, executor=options.executor,
        slurm_options=_slurm_options(options.slurm),
    )  # fmt: skip


def _slurm_options(texts: Sequence[str]) -> dict[str, Any]:
    options = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ConfigError("--slurm", expected="OPTION=VALUE", got=f"'{text}'")
        options[name] = parse_value(value, f"--slurm {name}")
    return options


def add_workers(parser: Parser) -> None:
    parser.add_argument(
        "--workers", type=whole, default=None, help="number of parallel runs; by default the number of cores"
    )


def _split(names: str, option: str) -> list[str]:
    parts = [name.strip() for name in names.split(",") if name.strip()]
    if not parts:
        # An empty list would silently run the defaults.
        raise ConfigError("compare", expected=f"names after {option}, separated by commas", got=f"'{names}'")
    return parts


def run_comparison(
    recipe: Recipe, names: Sequence[str], seeds: int, folds: Sequence[str], options: Namespace, *, title: str,
    accelerator: str = "cpu", executor: str = "local", slurm_options: dict[str, Any] | None = None,
) -> int:  # fmt: skip
    # The report is imported before training, so that a missing package is reported at once.
    from ..report import comparison_figures, comparison_page  # noqa: F401
    from ..training.comparison import compare
    from .console import out
    from .progress_bars import ComparisonProgress
    from .results_table import show

    with ComparisonProgress(out) as progress:
        content = compare(
            recipe, names, seeds=seeds, folds=folds, out=options.out, title=title, workers=options.workers,
            listener=progress, begin=progress.begin, accelerator=accelerator, executor=executor,
            slurm_options=slurm_options,
        )  # fmt: skip
    show(content, out)
    results = options.out / "results.json"
    write_report(content, results, options.out / "report.html")
    for failure in content["failures"]:
        # Errors of other libraries include a traceback; results.json keeps it.
        error = str(failure["error"]).strip().splitlines()[-1]
        fail(f"{failure['method']}, seed {failure['seed']} failed. {error}")
    return 1 if content["failures"] else 0


def _search(recipe: Recipe, names: Sequence[str], folds: Sequence[str], options: Namespace, *, title: str) -> int:
    # The report is imported before training, so that a missing package is reported at once.
    from ..report import comparison_figures, comparison_page  # noqa: F401
    from .console import out
    from .results_table import show

    content = search_options(recipe, names, folds, options, title=title)
    show(content, out)
    write_report(content, options.out / "results.json", options.out / "report.html")
    return 0
