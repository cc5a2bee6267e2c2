"""The program ``equipoise``: demo, compare, train, bench, diagnose, look, evaluate, search, report, data, recipes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..errors import EquipoiseError, MissingExtraError, require_extra
from ..io import interrupt_handling
from ..io.typed_values import shorten_repr
from .command_line import Parser, fail, replace_unencodable_characters
from .commands import COMMANDS

EPILOG = """examples:
  equipoise demo                                    bundled data, minutes on two cores -> table and report.html
  equipoise compare --config digits --methods concat,joint,joint+rollingq --seeds 5
  equipoise train --config digits --method joint+rollingq --out runs/mine
  equipoise bench --config digits --method joint    what would it cost? -> FLOPs, memory, time
  equipoise diagnose runs/mine                      does it use all modalities? -> verdicts and a page
  equipoise look MODEL --image cat.png --text "What is on the mat?"    attention of a vision-language model
  equipoise search --model runs/emoji "red heart"   image search by text, in a model of train --config emoji_clip
  equipoise evaluate openai/clip-vit-base-patch32      a pretrained model on our benchmarks
  equipoise report runs/demo                        results.json -> one self-contained page
  equipoise data prepare cremad downloads/CREMA-D   a published data set -> a folder to train on
  equipoise recipes cp digits                       copy a recipe to this folder

equipoise COMMAND --help describes each command."""


TRACE = "EQUIPOISE_TRACEBACK"
"""Environment variable that makes internal errors show their traceback."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; exits with 0, 1 (error), 2 (usage or missing extra) or 130 (Ctrl-C)."""
    try:
        interrupt_handling.ready()
        replace_unencodable_characters()
        status = run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        status = 130
    except SystemExit as exit_:
        status = exit_.code
    if threading.current_thread() is threading.main_thread():
        # All output is written; ignore further interrupts during shutdown.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OSError:
        _close_output()
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Runs one command and returns the exit status."""
    try:
        command = next((word for word in arguments if word in COMMANDS), "")
        with require_extra(f"equipoise {command}".rstrip()):
            parsed = parser().parse_args(arguments)
            return COMMANDS[parsed.command].run(parsed)
    except MissingExtraError as error:
        return fail(str(error), 2)
    except EquipoiseError as error:
        return fail(str(error))
    except BrokenPipeError:
        # The reader of the output, such as head, has exited.
        _close_output()
        return 1
    except OSError as error:
        return fail(f"{shorten_repr(str(error.filename or 'a file'))}: {error.strerror or error}.")
    except KeyboardInterrupt:
        return fail("Interrupted. Finished runs are saved; repeat the command to resume.", 130)
    except Exception as error:
        if os.environ.get(TRACE):
            raise
        return fail(f"{FAULT}: {_where(error)}. Set {TRACE}=1 to see the traceback, and report it.")


FAULT = "internal error"


def _where(error: Exception) -> str:
    """Returns the error in one line, with the source line of this package that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "equipoise" in frame.filename]
    location = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {shorten_repr(str(error)).rstrip('.')}{location}"


def _close_output() -> None:
    """Redirects remaining output to the null device, so that Python does not raise at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


def parser() -> Parser:
    """Builds the argument parser with all commands."""
    top = Parser(
        prog="equipoise", epilog=EPILOG,
        description="Measure how a multimodal transformer uses its modalities, and train it to use all of them.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        built = command.parser()
        sub = commands.add_parser(name, parents=[built], help=command.summary, description=built.description,
                                  epilog=built.epilog, add_help=False)  # fmt: skip
        sub.reads_recipe = built.reads_recipe
    return top
