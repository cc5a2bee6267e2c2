"""Parts that all commands share: the argument parser, types of arguments, and error output."""

from __future__ import annotations

import codecs
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from argparse import RawDescriptionHelpFormatter as KeepsLines
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from ..io.typed_values import shorten_repr
from ..training.recipes.recipe_changes import Change
from . import recipe_overrides


@dataclass(frozen=True)
class Command:
    """A command: its summary for the help, its parser, and the function that runs it."""

    summary: str
    parser: Callable[[], Parser]
    run: Callable[[Namespace], int]


def fail(message: str, status: int = 1) -> int:
    """Prints an error to stderr, unwrapped, and returns the exit status."""
    text = f"equipoise: {message}"
    try:
        from .console import err
    except ImportError:
        sys.stderr.write(f"{text}\n")
    else:
        err.print(text, style="red" if status == 1 else "", soft_wrap=True, markup=False, highlight=False)
    return status


class Lines(KeepsLines, ArgumentDefaultsHelpFormatter):
    """Help formatter that keeps the line breaks of examples and shows defaults other than None and False."""

    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(ArgumentParser):
    """Argument parser without abbreviations that also accepts recipe options if its command reads a recipe."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": Lines, **options})
        self.reads_recipe = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                # argparse would strip the two hyphens and return an empty list.
                self.error(f"argument {word.removesuffix('=--')}: expected one argument")
        changes: list[Change] = []
        if self.reads_recipe:
            words, changes = recipe_overrides.split_recipe_options(words, self.error)
        options, rest = super().parse_known_args(words, namespace)
        if self.reads_recipe:
            options.changes = changes
        return options, rest


def described(description: str, *examples: str) -> Parser:
    """Builds a parser without options, with examples at the end of its help."""
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else None
    return Parser(description=fill(description, 100), epilog=epilog)


def path(text: str) -> Path:
    """Argument type: a file or a folder."""
    if not text.strip() or "\0" in text:
        raise ArgumentTypeError(f"expected a path, got {text!a}")
    return Path(text)


def whole(text: str) -> int:
    """Argument type: a whole number of at most 18 digits."""
    if not text.strip().lstrip("+-").isdecimal() or len(text) > 18:
        raise ArgumentTypeError(f"expected a whole number, got {shorten_repr(text)}")
    return int(text)


REPLACED = {"±": "+-", "–": "-", "—": "-", "…": "...", "“": '"', "”": '"', "’": "'", "✓": "+", "✗": "x", "○": "o",
            "·": "-", "×": "x", "−": "-", "\N{NO-BREAK SPACE}": " ", "→": "->", "≥": ">=", "≤": "<="}  # fmt: skip
"""ASCII replacements of characters in our output, for terminals that cannot show them."""


def replace_unencodable_characters() -> None:
    """Replaces characters that the terminal encoding, such as ASCII, cannot represent."""
    codecs.register_error("equipoise", _replacement)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="equipoise")


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(REPLACED.get(one, ascii(one)[1:-1] if one != "'" else one) for one in letters), error.end


def with_recipe_options(parser: Parser) -> Parser:
    """Makes the parser accept the options of a recipe as well."""
    parser.reads_recipe = True
    parser.epilog = f"{recipe_overrides.HELP}\n\n{parser.epilog}"
    return parser
