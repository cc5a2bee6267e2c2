"""Options of a recipe on the command line, such as ``--train.epochs 3`` and ``--encoders.audio.dim=32``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..training import recipes
from ..training.recipes import Recipe
from ..training.recipes.recipe_changes import Change, apply_changes, parse_value

PARTS = tuple(name for name in Recipe.__dataclass_fields__ if name not in ("methods", "seeds", "folds", "logger"))
OPTION = re.compile(rf"--((?:{'|'.join(PARTS)})(?:\.[^.=]+)*)(?:=(.*))?", re.DOTALL)
HELP = """options of the recipe, which replace its values:
  --data.OPTION VALUE            of the data set; --data.name is its name
  --encoders.MODALITY.OPTION     of one encoder; also --fusions.NAME., --balancers.NAME., --variants.NAME.
  --train.OPTION VALUE           of the training: epochs, batch_size, learning_rate, weight_decay, warmup, optimizer,
                                 momentum, clip, accumulate, precision, unimodal, workers, checkpoint_steps,
                                 gradient_checkpointing
  --model.OPTION VALUE           of a self-contained model
  --noise_modality NAME, --reference METHOD
VALUE is written as in a recipe: 0.3, true, null, a string, [1, 2], '{dim: 32, depth: 1}'"""


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


def load_with_changes(name: str, changes: Sequence[Change]) -> Recipe:
    """Loads a recipe and applies changes of its options.

    Raises:
        ConfigError: unknown recipe or option, or a value of the wrong type.
    """
    who = f"recipe {Path(name).name if Path(name).suffix else name}"
    return apply_changes(recipes.load_recipe(name), changes, who)
