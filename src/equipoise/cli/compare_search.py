"""``compare --search``: searches options of each method and prints the trials and the held-out result."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..results import ComparisonResults
from ..training.recipes import Recipe
from .command_line import Parser, whole

if TYPE_CHECKING:
    from ..training.method_study import SearchTrial

TRIALS = 20
NOT_WITH = {"seeds": "--seeds", "workers": "--workers", "slurm": "--slurm"}


def add_search_options(parser: Parser) -> None:
    """Adds ``--search`` and ``--trials``."""
    parser.add_argument(
        "--search", action="append", default=[], metavar="OPTION=RANGE",
        help="search an option of the recipe with Optuna, such as train.learning_rate=1e-4..1e-2:log, "
        "balancers.ogm.alpha=0.1..1 or train.optimizer=adamw,sgd; repeatable. The best trial of each method is chosen "
        "on the validation split and evaluated on the test split once; repeat the command to resume",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=whole, default=None, help=f"with --search: trials of each method; {TRIALS} by default"
    )


def search_options(
    recipe: Recipe, names: Sequence[str], folds: Sequence[str], options: Namespace, *, title: str
) -> ComparisonResults:
    """Runs the search, and prints each trial and what was chosen.

    Raises:
        ConfigError: options of ``compare`` that a search does not take.
    """
    from ..training.hyperparameter_search import search
    from ..training.search_space import parse_searched_option
    from .console import out

    given = [option for name, option in NOT_WITH.items() if getattr(options, name)]
    given += ["--executor slurm"] if options.executor != "local" else []
    given += [f"folds {', '.join(folds)}"] if len(folds) > 1 else []
    if given:
        raise ConfigError(
            "compare --search", expected="one seed and one fold, and trials one after the other in this process",
            got=", ".join(given),
            fix="Search first, then compare the recipes in the folder best with --seeds, --folds and --executor.",
        )  # fmt: skip

    def listener(trial: SearchTrial, count: int) -> None:
        out.print(_trial_line(trial, count), soft_wrap=True, highlight=False, markup=False)

    content = search(
        recipe, names, [parse_searched_option(text) for text in options.search],
        trials=TRIALS if options.trials is None else options.trials, out=options.out,
        fold=folds[0] if folds else None, title=title, accelerator=options.accelerator, listener=listener,
    )  # fmt: skip
    out.print(f"Chosen: {content['protocol']['selection']}.", soft_wrap=True, highlight=False, markup=False)
    for method, values in content["protocol"]["best"].items():
        out.print(f"  {method}: {_settings(values)}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"recipes: {options.out / 'best'}", soft_wrap=True, highlight=False, markup=False)
    return content


def _trial_line(trial: SearchTrial, count: int) -> str:
    value = "no value" if trial.value is None else f"{trial.value:.4f} after {trial.epochs} epochs"
    return f"{trial.method}, trial {trial.number + 1} of {count}, {trial.state}: {value}, {_settings(trial.options)}"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} = {v:.4g}" if isinstance(v, float) else f"{n} = {v}" for n, v in values.items())
