"""Options of a recipe on the command line, such as ``--train.epochs 3`` and ``--encoders.audio.dim=32``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..training import recipes
from ..training.recipes import Recipe

PARTS = tuple(name for name in Recipe.__dataclass_fields__ if name not in ("methods", "seeds", "folds", "logger"))
OPTION = re.compile(rf"--((?:{'|'.join(PARTS)})(?:\.[^.=]+)*)(?:=(.*))?", re.DOTALL)
NAMED = ("encoders", "fusions", "balancers", "variants")
"""Parts whose entries have names of their own, each with its options."""

DEEPEST = 10

HELP = """options of the recipe, which replace its values:
  --data.OPTION VALUE            of the data set; --data.name is its name
  --encoders.MODALITY.OPTION     of one encoder; also --fusions.NAME., --balancers.NAME., --variants.NAME.
  --train.OPTION VALUE           of the training: epochs, batch_size, learning_rate, weight_decay, warmup, optimizer,
                                 momentum, clip, accumulate, precision, unimodal, workers, checkpoint_steps
  --model.OPTION VALUE           of a self-contained model
  --noise_modality NAME, --reference METHOD
VALUE is written as in a recipe: 0.3, true, null, a string, [1, 2], '{dim: 32, depth: 1}'"""


class Change(NamedTuple):
    """An option: its path in the recipe, and its value."""

    where: tuple[str, ...]
    value: Any


def split_recipe_options(words: Sequence[str], error: Callable[[str], Any]) -> tuple[list[str], list[Change]]:
    """Splits arguments into those of argparse and changes of the recipe.

    Calls ``error`` for an option without a value.
    """
    rest, changes, remaining = [], [], iter(words)
    for word in remaining:
        option = OPTION.fullmatch(word)
        if option is None or option[1] == "data":
            rest.append(word)
            continue
        text = option[2] if option[2] is not None else next(remaining, None)
        if text is None:
            error(f"argument --{option[1]}: expected one argument")
        changes.append(Change(tuple(option[1].split(".")), parse_value(str(text), f"--{option[1]}")))
    return rest, changes


def parse_value(text: str, who: str) -> Any:
    """Parses a value as in a recipe; unlike in YAML, 1e-3 is a number.

    Raises:
        ConfigError: not YAML, or not a valid value of a recipe.
    """
    from ..training.recipes.recipe_parsing import parse

    if not text or recipes.is_float(text):
        return float(text) if text else ""
    return parse(text, who)


def load_with_changes(name: str, changes: Sequence[Change]) -> Recipe:
    """Loads a recipe and applies changes of its options.

    Raises:
        ConfigError: unknown recipe or option, or a value of the wrong type.
    """
    who = f"recipe {Path(name).name if Path(name).suffix else name}"
    return apply(recipes.load_recipe(name), changes, who)


def apply(base: Recipe, changes: Sequence[Change], who: str) -> Recipe:
    """Applies changes to a recipe; error messages start with ``who``.

    Raises:
        ConfigError: unknown option, or a value of the wrong type.
    """
    content = asdict(base)
    for where, changed in changes:
        if len(where) > DEEPEST:
            raise ConfigError("command line", expected=f"at most {DEEPEST} names in an option", got=str(len(where)))
        *path, last = where
        parent = content
        for part in path:
            if not isinstance(parent.get(part), dict):
                parent[part] = {}
            parent = parent[part]
        keeps = where[0] == "train" or (where[0] in NAMED and len(where) == 2)
        if keeps and isinstance(changed, dict) and isinstance(parent.get(last), dict):
            changed = {**parent[last], **changed}
        elif where[0] in NAMED and len(where) == 1 and isinstance(changed, dict):
            former = parent[last]
            changed = {
                key: {**former.get(key, {}), **part} if isinstance(part, dict) else part
                for key, part in changed.items()
            }
        parent[last] = changed
    return recipes.recipe_from_dict(content, who)
