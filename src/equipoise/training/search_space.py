"""Options of a recipe to search, such as ``train.learning_rate=1e-4..1e-2:log``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .recipes import Recipe
from .recipes.recipe_changes import Change, apply_changes, parse_value

WHO = "compare --search"
PARTS = ("train", "encoders", "fusions", "balancers", "model", "variants")
"""Parts of a recipe that can be searched; other data would be another validation split."""
FIX = "Such as train.learning_rate=1e-4..1e-2:log, train.batch_size=32..128 or train.optimizer=adamw,sgd."


@dataclass(frozen=True)
class SearchedOption:
    """An option of a recipe and its range.

    Args:
        name: path of the option in the recipe, with dots.
        choices: values to choose from; empty for a range of numbers.
        low, high: bounds of a range, both included; whole numbers if both are.
        log: whether numbers are drawn uniformly on a logarithmic scale.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that show whether the option can be applied: all choices, or both bounds."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: Any) -> Any:
        """Returns the value of an Optuna trial."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        suggest = trial.suggest_int if isinstance(self.low, int) else trial.suggest_float
        return suggest(self.name, self.low, self.high, log=self.log)


def parse_searched_option(text: str) -> SearchedOption:
    """Parses ``OPTION=RANGE``: ``LOW..HIGH``, ``LOW..HIGH:log``, or choices separated by commas.

    Raises:
        ConfigError: another form, a part of the recipe that cannot be searched, or an empty range.

    Example:
        >>> parse_searched_option("train.learning_rate=1e-4..1e-2:log")
        SearchedOption(name='train.learning_rate', choices=(), low=0.0001, high=0.01, log=True)
        >>> parse_searched_option("train.optimizer=adamw,sgd").choices
        ('adamw', 'sgd')
    """
    name, sign, values = text.partition("=")
    if not sign or not values or "." not in name.strip("."):
        raise ConfigError(WHO, expected="OPTION=RANGE", got=repr(text), fix=FIX)
    if name.partition(".")[0] not in PARTS:
        raise ConfigError(WHO, expected=f"an option of {', '.join(PARTS)}", got=repr(name), fix=FIX)
    if ".." not in values:
        choices = tuple(parse_value(value.strip(), WHO) for value in values.split(","))
        if len(set(map(repr, choices))) < 2 or any(isinstance(value, list | dict) for value in choices):
            raise ConfigError(
                WHO, expected=f"LOW..HIGH, or two or more single values, for {name}", got=repr(values), fix=FIX
            )
        return SearchedOption(name, choices)
    bounds, colon, scale = values.partition(":")
    low, high = (parse_value(bound.strip(), WHO) for bound in bounds.split("..", 1))
    if any(isinstance(bound, bool) or not isinstance(bound, int | float) for bound in (low, high)) or low >= high:
        raise ConfigError(WHO, expected=f"numbers LOW < HIGH for {name}", got=repr(bounds), fix=FIX)
    if (colon and scale != "log") or (colon and low <= 0):
        raise ConfigError(WHO, expected="LOW..HIGH, or LOW..HIGH:log with LOW > 0", got=repr(values), fix=FIX)
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    return SearchedOption(name, low=low, high=high, log=bool(colon))


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Returns the recipe with the given values of options.

    Raises:
        ConfigError: an option is unknown, or a value has the wrong type.
    """
    changes = [Change(tuple(name.split(".")), value) for name, value in values.items()]
    return apply_changes(recipe, changes, WHO)
