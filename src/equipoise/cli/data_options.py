"""Options for data of the user: ``--data``, ``--target`` and the other columns; the recipe that follows from them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..integrations.loggers import check_loggers, parse_loggers
from ..io.atomic_files import check_path_component
from ..io.typed_values import shorten_repr
from ..training.recipes import Recipe
from ..training.recipes.recipe_changes import Change, apply_changes
from . import recipe_overrides
from .command_line import Parser

DEFAULT = "digits"
"""Recipe of train and compare without --config and --data."""

HELP = {
    "--target": "column of the target; several columns separated by commas are several labels or numbers",
    "--pair": "two columns separated by commas, such as image,text, to align for retrieval and search, in place of a "
    "target",
    "--group": "column of groups, such as the speaker, that are never in two splits",
    "--split": "column with train, val or test; by default the column split if there is one",
    "--weight": "column of sampling weights of the training rows",
    "--task": "classification, multilabel or regression; by default recognized from the target",
}


def add_data_options(parser: Parser) -> None:
    """Adds ``--config``, ``--data`` and the options that describe a table."""
    parser.add_argument(
        "--config", default=None, help=f"name of a packaged recipe, or a YAML file; {DEFAULT} without --data"
    )
    parser.add_argument(
        "--data", default=None, metavar="TABLE",
        help="your data: a csv, tsv, jsonl or parquet file, a folder or name of Hugging Face datasets, or "
        "FILE.py:FUNCTION that returns a data set. Without --config, encoders are chosen from the columns",
    )  # fmt: skip
    for option, text in HELP.items():
        parser.add_argument(option, default=None, help=text)
    parser.add_argument(
        "--kind", action="append", default=[], metavar="COLUMN=KIND",
        help="kind of a column: audio, image, video, frames, text, vector, sequence, array, number, category, "
        "ignore; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--logger", action="append", default=[], metavar="NAME",
        help="logs of the training, repeatable or comma-separated: csv, tensorboard, wandb (offline), trackio (local)",
    )  # fmt: skip
    parser.add_argument(
        "--stream", "--streaming", action="store_true",
        help="read the rows of --data in order with bounded memory, as datasets does with streaming=True",
    )  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows with files that cannot be read")


def chosen_recipe(options: Namespace) -> tuple[Recipe, str]:
    """Returns the recipe and its title: of ``--config``, or derived from ``--data``; with the loggers of ``--logger``.

    Raises:
        ConfigError: options of a table without one, or an unknown logger. DataError: the table or its files cannot be
            read. MissingExtraError: the package of a logger is not installed.
    """
    loggers = parse_loggers(options.logger, "--logger")
    recipe, title = _read_recipe(options)
    check_loggers(loggers or recipe.logger)
    return (replace(recipe, logger=loggers) if loggers else recipe), title


def _read_recipe(options: Namespace) -> tuple[Recipe, str]:
    given = {name: value for name in ("target", "pair", "group", "split", "weight", "task")
             if (value := getattr(options, name)) is not None}  # fmt: skip
    if options.data is None or (options.config is not None and "pair" not in given):
        if given or options.kind or options.skip_bad or options.stream:
            raise ConfigError(
                "command line", expected="--data without --config for options of a table",
                got=", ".join(f"--{name}" for name in given) or "--kind, --stream or --skip-bad",
                fix="Add --data TABLE; in a recipe, these options are under data.",
            )  # fmt: skip
        config = options.config or DEFAULT
        recipe = recipe_overrides.load_with_changes(config, options.changes)
        if options.data is not None:
            recipe = _relocated(recipe, options.data)
        return recipe, shorten_repr(Path(config).stem)
    from ..data.user_code import is_code

    if is_code(options.data):
        if given or options.kind or options.stream:
            raise ConfigError("command line", expected="options of a table only with a table", got=options.data)
        recipe, lines, title = _from_code(options.data)
        changes = options.changes
    else:
        recipe, lines, title = _derived(options, given)
        changes = [one for one in options.changes if not any(_is_read(one, part) for part in READ)]
    _print(lines)
    return apply_changes(recipe, changes, f"recipe of '{title}'"), title


def _derived(options: Namespace, data_options: dict[str, Any]) -> tuple[Recipe, list[str], str]:
    from ..training import recipes
    from ..training.own_data import own_data_recipe
    from .console import err
    from .progress_bars import counted_progress

    if "pair" in data_options:
        if "target" in data_options:
            raise ConfigError("command line", expected="--target or --pair", got="both")
        data_options["pair"] = _names(data_options["pair"])
    if "target" in data_options:
        names = _names(data_options["target"])
        data_options["target"] = names[0] if len(names) == 1 else names
    kinds = {}
    for text in options.kind:
        column, sign, kind = text.rpartition("=")
        if not sign or not column:
            raise ConfigError("--kind", expected="COLUMN=KIND", got=f"'{text}'")
        kinds[column] = kind
    if kinds:
        data_options["kinds"] = kinds
    base = None if options.config is None else recipes.load_recipe(options.config)
    with counted_progress("checking files", "rows", err) as progress:
        recipe, lines = own_data_recipe(
            options.data, options=data_options, skip_bad=options.skip_bad, progress=progress, base=base,
            encoders=_options_of(options.changes, ENCODERS), readers=_options_of(options.changes, READERS),
            streaming=options.stream,
        )  # fmt: skip
    return recipe, lines, check_path_component(Path(options.data.rstrip("/")).stem or "data", "--data")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


ENCODERS, READERS = READ = (("encoders",), ("data", "modalities"))
"""Parts of a recipe with entry -> option -> value that decide how a table is read."""


def _is_read(change: Change, part: tuple[str, ...]) -> bool:
    return change.where[: len(part)] == part and len(change.where) == len(part) + 2


def _options_of(changes: Sequence[Change], part: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Returns entry -> option -> value of the changes in a part of the recipe."""
    result: dict[str, dict[str, Any]] = {}
    for change in changes:
        if _is_read(change, part):
            result.setdefault(change.where[-2], {})[change.where[-1]] = change.value
    return result


def _from_code(source: str) -> tuple[Recipe, list[str], str]:
    from ..training.own_data import recipe_for

    absolute = str(allow_named_code(source))
    file, _, function = absolute.rpartition(":")
    recipe, lines = recipe_for(absolute)
    return recipe, lines, check_path_component(f"{Path(file).stem}-{function}", "--data")


def allow_named_code(source: str | None) -> str | None:
    """Allows code that the user named with ``--data``; returns the location of the data, with an absolute path."""
    from ..data.user_code import allow_code, is_code

    if source is None or not is_code(source):
        return source
    file, _, function = source.rpartition(":")
    absolute = f"{Path(file).resolve()}:{function}"
    allow_code([absolute])
    return absolute


def _relocated(recipe: Recipe, location: str) -> Recipe:
    from ..training.run_loading import with_data

    return with_data(recipe, allow_named_code(location))


def _print(lines: list[str]) -> None:
    from .console import out

    for line in lines:
        out.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
