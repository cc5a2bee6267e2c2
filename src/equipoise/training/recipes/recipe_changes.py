"""Changes of single options of a recipe, such as ``train.epochs`` or ``encoders.audio.dim``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ...errors import ConfigError
from . import Recipe, is_float, recipe_from_dict

NAMED = ("encoders", "fusions", "balancers", "variants")
"""Parts whose entries have names of their own, each with its options."""

DEEPEST = 10


class Change(NamedTuple):
    """An option: its path in the recipe, and its value."""

    where: tuple[str, ...]
    value: Any


def parse_value(text: str, who: str) -> Any:
    """Parses a value as in a recipe; unlike in YAML, 1e-3 is a number.

    Raises:
        ConfigError: not YAML, or not a valid value of a recipe.
    """
    from .recipe_parsing import parse

    if not text or is_float(text):
        return float(text) if text else ""
    return parse(text, who)


def apply_changes(base: Recipe, changes: Sequence[Change], who: str) -> Recipe:
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
    return recipe_from_dict(content, who)
