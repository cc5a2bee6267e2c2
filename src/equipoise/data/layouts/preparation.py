"""Prepares a published data set: converts every sample, and writes a manifest with checksums and a report."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from ...io.atomic_files import check_folder, make_folder, to_jsonable
from ...io.folder_lock import locked_folder
from . import prepared_files
from .preparation_report import no_samples, write_outputs
from .published_layout import Layout, Settings
from .raw_folder import RawFolder
from .sample_conversion import convert_samples
from .split_assignment import split_by_group

SPLITS = ("published", "disjoint")
SCRATCH = ".scratch"


@dataclass(frozen=True)
class Preparation:
    """Result of ``prepare``.

    Args:
        folder: the prepared folder.
        report: content of prepare.json.
        reused: samples that an earlier, interrupted or finished preparation had converted already.
    """

    folder: Path
    report: dict[str, Any]
    reused: int


def prepare(
    layout: Layout, root: str | Path, out: str | Path, *, split: str = "published",
    options: Mapping[str, Any] | None = None, paths: Mapping[str, str] | None = None, copy: bool = False,
    workers: int = 1, progress: Callable[[int, int], None] | None = None,
) -> Preparation:  # fmt: skip
    """Reads a published data set and writes a folder with a manifest.

    An interrupted preparation is resumed by the same call: samples are not converted again while their raw files have
    the same size and time. Files are only written in ``out``; nothing in ``root`` is executed.

    Args:
        layout: from ``find_layout``.
        root: folder of the published files.
        out: folder to write: new, empty, or of an earlier preparation with the same options.
        split: "published", or "disjoint": no actor, speaker or source video occurs in two splits.
        options: options of the layout.
        paths: places of the layout -> paths, where they are not the usual ones.
        copy: copy raw files that the manifest refers to, so that the folder is complete without ``root``.
        workers: processes.
        progress: called with (samples done, samples in total).

    Raises:
        DataError: files or lists are missing or damaged, or no sample is usable.
        ConfigError: unknown options, or a folder that contains something else.
    """
    out, who = Path(out), f"data prepare {layout.name}"
    if split not in SPLITS:
        raise ConfigError(who, expected=f"--split {' or '.join(SPLITS)}", got=split)
    if split == "disjoint" and not layout.groups:
        raise ConfigError(
            f"{who} --split disjoint", expected="a data set with actors, speakers or source videos",
            got=f"'{layout.name}', whose published form names none", fix="Use --split published.",
        )  # fmt: skip
    if not 1 <= workers <= 256:
        raise ConfigError(who, expected="--workers from 1 to 256", got=str(workers))
    root = Path(root).absolute()
    raw = RawFolder(root, layout.places, dict(paths or {}), who)
    chosen = {**layout.check_options(options or {}), "split": split}
    choice = {"options": chosen, "copy": copy, "paths": dict(raw.chosen)}
    _check_out(out, raw, layout, choice, who)
    make_folder(out, who)
    with _locked(out, who):
        settings = Settings(raw, chosen, out.absolute() / SCRATCH)
        _write_unfinished(out, layout, choice)
        scan = layout.scan(settings)
        samples = scan.samples
        if split == "disjoint":
            in_distribution = [sample for sample in samples if sample.split != "ood"]
            samples = split_by_group(in_distribution, who) + [sample for sample in samples if sample.split == "ood"]
        if not samples:
            raise no_samples(raw, scan.dropped, who)
        entries, reused = convert_samples(layout, samples, settings, out, copy, workers, progress)
        report = write_outputs(layout, scan, samples, entries, raw, out, choice, who)
        layout.finish(settings)
        shutil.rmtree(settings.scratch, ignore_errors=True)
    return Preparation(out, report, reused)


def _check_out(out: Path, raw: RawFolder, layout: Layout, choice: Mapping[str, Any], who: str) -> None:
    """Checks the output folder before anything is written."""
    if out.exists() and os.path.realpath(out) == os.path.realpath(raw.root):
        raise ConfigError(who, expected="another folder than ROOT after --out", got=f"'{out}'")
    check_folder(out, who)
    if (out / prepared_files.REPORT).exists():
        try:
            before = prepared_files.read_report(out, who)
        except DataError:
            # Damaged by an interruption; the journal is checked sample by sample.
            return
        if before["layout"] != layout.name or before.get("choice") != to_jsonable(choice):
            raise ConfigError(
                who, expected=f"the layout and options that '{out}' was begun with",
                got=f"other settings: {before['layout']} with {json.dumps(before.get('choice'), sort_keys=True)}",
                fix="Choose another --out.",
            )  # fmt: skip


@contextlib.contextmanager
def _locked(out: Path, who: str) -> Iterator[None]:
    """Prevents two preparations from writing the same folder."""
    error = ConfigError(
        who, expected="a folder that no other process prepares", got=f"'{out}', which one does",
        fix="Wait for it, or choose another --out.",
    )  # fmt: skip
    with locked_folder(out, error):
        yield


def _write_unfinished(out: Path, layout: Layout, choice: Mapping[str, Any]) -> None:
    content = {"schema": prepared_files.SCHEMA, "layout": layout.name, "complete": False, "choice": choice}
    prepared_files.write_report(out / prepared_files.REPORT, content)
