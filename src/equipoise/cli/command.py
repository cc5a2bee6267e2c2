"""What every command of the program is, and where it speaks."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import fill

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console

from ..recipes import Recipe

out, err = Console(), Console(stderr=True)


@dataclass(frozen=True)
class Command:
    """A line for the list of commands, a parser, and what to do with what it parsed."""

    summary: str
    parser: Callable[[Recipe | None], ArgumentParser]
    run: Callable[[Namespace], int]
    takes_recipe: bool = False


def fail(message: str, status: int = 1) -> int:
    """Tells an error on the error stream, whole and unwrapped."""
    style = "red" if status == 1 else ""
    err.print(f"equipoise: {message}", style=style, soft_wrap=True, markup=False, highlight=False)
    return status


class Lines(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help whose examples keep their lines."""


def described(description: str, *examples: str) -> ArgumentParser:
    """A parser without options, with examples at the end of its help."""
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else None
    return ArgumentParser(description=fill(description, 100), epilog=epilog, formatter_class=Lines)
