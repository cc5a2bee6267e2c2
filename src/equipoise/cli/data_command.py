"""``equipoise data``: lists, prepares and verifies published data sets."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .command_line import Parser, described, path, whole

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.layouts import Layout, Preparation, Verification

EXAMPLES = (
    "equipoise data ls                                           data sets that can be prepared",
    "equipoise data ls cremad                                    expected files and options of one",
    "equipoise data prepare cremad downloads/CREMA-D             writes prepared/cremad",
    "equipoise data prepare cremad downloads/CREMA-D --split disjoint --out prepared/cremad_actors",
    "equipoise data prepare mosei downloads --path pickle=mosei_senti_data.pkl --task acc7",
    "equipoise data prepare ucf101 downloads/UCF --workers 8     the same command resumes after an interruption",
    "equipoise data verify prepared/cremad                       which files are missing or changed?",
)
OPTIONS = ("audio", "frames", "size", "task", "fold", "ood")
MOST_LISTED = 10


def data_parser() -> Parser:
    parser = described(
        "Reads published data sets as they were downloaded, and writes folders with a manifest to train on.", *EXAMPLES
    )
    parser.add_argument("action", choices=("ls", "prepare", "verify"), help="ls lists, prepare converts, verify checks")
    parser.add_argument("name", nargs="?", default=None, help="ls, prepare: the data set; verify: the prepared folder")
    parser.add_argument("root", type=path, nargs="?", default=None, help="prepare: folder of the published files")
    parser.add_argument("--out", type=path, default=None, help="prepare: output folder; prepared/NAME by default")
    parser.add_argument(
        "--split", choices=("published", "disjoint"), default=None,
        help="published (default), or disjoint: no actor, speaker or source video in two splits",
    )  # fmt: skip
    parser.add_argument("--workers", type=whole, default=None, help="processes; by default the number of cores")
    parser.add_argument("--copy", action="store_true", help="copy the raw files that the manifest refers to")
    parser.add_argument(
        "--path", action="append", default=[], metavar="PLACE=PATH",
        help="where a part of the raw files is, if elsewhere; repeat for several; `data ls NAME` lists the places",
    )  # fmt: skip
    parser.add_argument("--audio", default=None, help="cremad, kinetics_sounds: spectrogram, or wav")
    parser.add_argument("--frames", type=whole, default=None, help="frames of each clip")
    parser.add_argument("--size", type=whole, default=None, help="height and width of frames in pixels")
    parser.add_argument(
        "--task", default=None, help="mosei, mosi: acc3, acc2_has0, acc2_non0, acc7, acc7_round, regression"
    )
    parser.add_argument("--fold", type=whole, default=None, help="ucf101, hmdb51: number of the published split")
    parser.add_argument("--ood", default=None, help="hmdb51: near or far, for tests with unknown classes")
    return parser


def manage_data(options: Namespace) -> int:
    """Runs one of the actions."""
    used = _used(options)
    allowed = {
        "ls": set(),
        "verify": {"workers"},
        "prepare": {*OPTIONS, "out", "split", "workers", "copy", "path", "root"},
    }
    for name in used:
        if name not in allowed[options.action]:
            shown = "a third argument" if name == "root" else f"--{name}"
            raise ConfigError(f"data {options.action}", expected="no options of data prepare", got=shown)
    if options.action == "ls":
        return _list(options)
    return _prepare(options) if options.action == "prepare" else _verify(options)


def _used(options: Namespace) -> list[str]:
    names = (*OPTIONS, "out", "split", "workers", "copy", "path", "root")
    return [name for name in names if getattr(options, name) not in (None, False, [])]


def _list(options: Namespace) -> int:
    from ..data.layouts import available_layouts, find_layout
    from .console import out

    if options.name is not None:
        describe(find_layout(options.name), out)
        return 0
    for name, layout in available_layouts().items():
        count, groups = sum(layout.published.values()), layout.groups or "none"
        said = f"{layout.title}: {', '.join(layout.columns)}; {count:,} samples; groups: {groups}; {layout.license}"
        out.print(f"[bold]{name}[/bold]  {said}", highlight=False, soft_wrap=True)
    out.print("Expected files and options: equipoise data ls NAME", style="dim", highlight=False)
    return 0


def describe(layout: Layout, console: Console) -> None:
    """Prints the expected files and the options of a layout."""

    def say(text: str = "") -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    say(f"{layout.name}: {layout.title}. {layout.source}")
    say(f"license: {layout.license}")
    counts = ", ".join(f"{name} {count:,}" for name, count in layout.published.items())
    say(f"published: {counts}; groups: {layout.groups or 'none, so no --split disjoint'}")
    say("\nfiles under ROOT (--path PLACE=PATH where they are elsewhere):")
    for name, location in layout.places.items():
        needed = "" if location.required else ", not always needed"
        say(f"  {name}: {' or '.join(location.candidates)}\n    {location.content}{needed}")
    if layout.options:
        say("\noptions:")
    for name, option in layout.options.items():
        values = f" ({', '.join(map(str, option.choices))})" if option.choices else ""
        say(f"  --{name} {option.default}{values}: {option.help}")


def _prepare(options: Namespace) -> int:
    from ..data.layouts import find_layout, prepare
    from .console import out
    from .progress_bars import counted_progress

    if options.name is None or options.root is None:
        raise ConfigError(
            "data prepare", expected="the name of a data set and the folder of its files",
            got="neither" if options.name is None else f"only '{options.name}'",
            fix="Write for example: equipoise data prepare cremad downloads/CREMA-D.",
        )  # fmt: skip
    layout = find_layout(options.name)
    settings = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    folder = options.out or Path("prepared") / layout.name
    with counted_progress(f"preparing {layout.name}", "samples", out) as progress:
        preparation = prepare(
            layout,
            options.root,
            folder,
            split=options.split or "published",
            options=settings,
            paths=_places(options.path),
            copy=options.copy,
            workers=_workers(options.workers),
            progress=progress,
        )
    show_preparation(preparation, out)
    return 0


def _workers(value: int | None) -> int:
    return value if value is not None else os.cpu_count() or 1


def _places(options: list[str]) -> dict[str, str]:
    locations = {}
    for text in options:
        name, equals, location = text.partition("=")
        if not equals or not name or not location or "\0" in location:
            raise ConfigError("data prepare --path", expected="PLACE=PATH", got=ascii(text)[:80])
        locations[name] = location
    return locations


def show_preparation(preparation: Preparation, console: Console) -> None:
    """Prints the numbers of samples, and what was dropped and why."""

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)

    report = preparation.report
    for split, count in report["samples"].items():
        say(f"{split}: {count:,} samples")
    published = report["published"]
    split_sizes = {name: report["samples"].get(name, 0) for name in ("train", "val", "test")}
    if "val" not in published:
        split_sizes["train"] += split_sizes.pop("val")
    if any(split_sizes[name] != count for name, count in published.items()):
        counts = " / ".join(f"{count:,}" for count in published.values())
        say(
            f"published: {counts} ({' / '.join(published)}); here {' / '.join(f'{n:,}' for n in split_sizes.values())}",
            "yellow",
        )
    if preparation.reused:
        say(f"{preparation.reused:,} samples were already converted.", "dim")
    groups = report["groups"]
    if groups.get("shared_by_train_and_test"):
        said = f"{groups['shared_by_train_and_test']:,} groups ({groups['kind']}) are in training and test"
        say(f"{said}; --split disjoint separates them.", "yellow")
    for name, count in report["missing"].items():
        say(f"{name}: missing in {count:,} samples", "yellow")
    for note in report["notes"]:
        say(note, "yellow")
    if report["dropped"]:
        say(
            f"dropped: {report['dropped']:,} samples; each with its reason in {preparation.folder / 'prepare.json'}",
            "yellow",
        )
        for reason, count in list(report["dropped_reasons"].items())[:MOST_LISTED]:
            say(f"  {count:,} x {reason}", "yellow")
    say(f"manifest: {preparation.folder / 'manifest.csv'}")


def _verify(options: Namespace) -> int:
    from ..data.layouts import verify
    from .command_line import fail
    from .console import out
    from .progress_bars import counted_progress

    if options.name is None:
        raise ConfigError(
            "data verify", expected="the folder that data prepare wrote", got="none",
            fix="Write for example: equipoise data verify prepared/cremad.",
        )  # fmt: skip
    with counted_progress("verifying", "files", out) as progress:
        verification = verify(Path(options.name), workers=_workers(options.workers), progress=progress)
    for line in verification_lines(verification):
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    if verification.complete:
        return 0
    return fail(
        f"'{options.name}' is damaged: {len(verification.missing)} files are missing, {len(verification.changed)} have "
        "changed. The same `equipoise data prepare` command restores what it wrote."
    )


def verification_lines(verification: Verification) -> list[str]:
    """Returns what ``verify`` found, in lines."""
    lines: list[str] = []
    kinds: tuple[tuple[str, list[Any]], ...] = (
        ("missing", verification.missing), ("changed", verification.changed), ("not listed", verification.unlisted)
    )  # fmt: skip
    for kind, names in kinds:
        lines += [f"{kind}: {name}" for name in names[:MOST_LISTED]]
        if len(names) > MOST_LISTED:
            lines.append(f"{kind}: {len(names) - MOST_LISTED:,} more")
    right = verification.files - len(verification.missing) - len(verification.changed)
    return [
        *lines,
        f"{right:,} of {verification.files:,} files as written; {verification.rows:,} samples in the manifest",
    ]
