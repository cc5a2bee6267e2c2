"""The program ``equipoise``: demo, compare, train, diagnose, look, report, recipes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from .. import __version__, recipes
from ..errors import EquipoiseError
from .command import Lines, fail
from .commands import COMMANDS

EPILOG = """examples:
  equipoise demo                                    bundled data, minutes on two cores -> table and report.html
  equipoise compare --config digits --methods concat,joint,joint+rollingq --seeds 5
  equipoise train --config digits --method joint+rollingq --out runs/mine
  equipoise diagnose runs/mine                      does it use what it is given? -> verdicts and a page
  equipoise look MODEL --image cat.png --text "What is on the mat?"    where does a vision-language model look?
  equipoise search --model runs/emoji "red heart"   pictures by words, in a space of train --config emoji_clip
  equipoise judge openai/clip-vit-base-patch32      a published model at the work of ours
  equipoise report runs/demo                        results.json -> one self-contained page
  equipoise recipes cp digits                       take a recipe into this folder and own it

equipoise COMMAND --help tells more about each."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; ends the process with 0, 1 (an error, told in one sentence), 2 (usage) or 130 (Ctrl-C)."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Runs one command and returns the exit status."""
    arguments = gathered(arguments)
    try:
        parsed = parser(arguments).parse_args(arguments)
        return COMMANDS[parsed.command].run(parsed[parsed.command])
    except EquipoiseError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or 'a file'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        return fail("Stopped. What is finished is written down; the same command goes on from there.", 130)


def parser(arguments: Sequence[str] = ()) -> ArgumentParser:
    """The whole command line. The recipe that ``--config`` names gives the recipe's options their defaults."""
    top = ArgumentParser(
        prog="equipoise", version=__version__, epilog=EPILOG, formatter_class=Lines,
        description="See how a multimodal transformer divides its attention, and train it so that none is wasted.",
    )  # fmt: skip
    commands = top.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        recipe = None
        if command.takes_recipe and name == next(iter(arguments), None):
            recipe = recipes.read(_config(arguments))
        commands.add_subcommand(name, command.parser(recipe), help=command.summary)
    return top


OWN = re.compile(r"--((?:encoders|fusions|balancers|variants)\.[^.=]+)\.([^=]+)(?:=(.*))?", re.DOTALL)
"""An option of one encoder, fusion, balancer or variant, with its value where that stands in the same word."""

PLAIN = re.compile(r"""[\w.+-]+|\[.*\]|\{.*\}|".*"|'.*'""", re.DOTALL)
"""Values that mean the same inside a YAML mapping; others are texts that need quotes there."""


def gathered(arguments: Sequence[str]) -> list[str]:
    """The arguments with the options of one encoder, fusion, balancer or variant as one; the parser keeps the last one.

    Example:
        >>> gathered(["compare", "--balancers.ogm.alpha", "0.3", "--seeds", "2", "--balancers.ogm.end=4"])
        ['compare', '--seeds', '2', '--balancers.ogm={alpha: 0.3, end: 4}']
    """
    rest: list[str] = []
    found: dict[str, dict[str, str]] = {}
    words = iter(arguments)
    for word in words:
        option = OWN.fullmatch(word)
        value = option and (option[3] if option[3] is not None else next(words, None))
        if option is None or value is None:
            rest.append(word)
        else:
            found.setdefault(option[1], {})[option[2]] = value
    for name, options in found.items():
        pairs = (f"{key}: {value if PLAIN.fullmatch(value) else json.dumps(value)}" for key, value in options.items())
        one = next(iter(options.items()))
        rest.append(f"--{name}={{{', '.join(pairs)}}}" if len(options) > 1 else f"--{name}.{one[0]}={one[1]}")
    return rest


def _config(arguments: Sequence[str]) -> str:
    """The value of --config, which must be known before the options that it fills."""
    for here, after in zip(arguments, [*arguments[1:], None], strict=True):
        if here == "--config" and after is not None:
            return after
        if here.startswith("--config="):
            return here.removeprefix("--config=")
    return "digits"
