"""Verifies a prepared folder: every file exists and has the checksum that was written."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from . import prepared_files

OWN = frozenset({
    prepared_files.MANIFEST, prepared_files.OOD, prepared_files.CHECKSUMS, prepared_files.REPORT,
    prepared_files.JOURNAL, ".lock",
})  # fmt: skip


@dataclass(frozen=True)
class Verification:
    """Result of ``verify``.

    Args:
        report: content of prepare.json.
        files: number of files with a checksum.
        missing, changed: files that do not exist, or have another content.
        unlisted: files in the folder without a checksum.
        rows: number of samples in the manifest.
    """

    report: dict[str, Any]
    files: int
    missing: list[str]
    changed: list[str]
    unlisted: list[str]
    rows: int

    @property
    def complete(self) -> bool:
        """Whether no file is missing or changed, and the manifest has the number of samples given in the report."""
        expected = sum(count for name, count in self.report["samples"].items() if name != "ood")
        return not self.missing and not self.changed and self.rows == expected


def verify(
    folder: str | Path, *, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> Verification:  # fmt: skip
    """Checks all files of a prepared folder, and the raw files that its manifest refers to.

    Args:
        folder: as written by ``prepare``.
        workers: threads that read files.
        progress: called with (files done, files in total).

    Raises:
        DataError: the folder was not written by ``prepare``, the preparation is not finished, or its report or
            checksums are damaged.
    """
    folder, who = Path(folder), "data verify"
    report = prepared_files.read_report(folder, who)
    if not report["complete"]:
        raise DataError(
            f"{who} '{folder}'", expected="a finished preparation", got="an interrupted one",
            fix="Run data prepare again with the same folder and options; it continues.",
        )  # fmt: skip
    path = folder / prepared_files.CHECKSUMS
    if path.is_file() and prepared_files.hash_file(path)[0] != report["checksums"]:
        raise DataError(
            f"{who} '{path}'", expected="the checksums that data prepare wrote", got="a file that was changed since",
            fix="Run data prepare again with the same folder.",
        )  # fmt: skip
    expected = prepared_files.read_checksums(path)
    missing, changed = [], []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for done, (name, digest) in enumerate(
            zip(expected, pool.map(_hash_of(folder), expected), strict=True), start=1
        ):
            if digest is None:
                missing.append(name)
            elif digest != expected[name]:
                changed.append(name)
            if progress is not None:
                progress(done, len(expected))
    unlisted = [name for name in _files_in(folder) if name not in expected and name not in OWN]
    return Verification(report, len(expected), missing, changed, unlisted, _rows(folder / prepared_files.MANIFEST))


def _hash_of(folder: Path) -> Callable[[str], str | None]:
    def found(name: str) -> str | None:
        try:
            return prepared_files.hash_file(folder / name)[0]
        except (OSError, ValueError):
            return None

    return found


def _files_in(folder: Path) -> list[str]:
    paths = []
    for directory, _, files in os.walk(folder):
        paths += [os.path.relpath(os.path.join(directory, name), folder) for name in files if not name.endswith(".tmp")]
    return sorted(paths)


def _rows(path: Path) -> int:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return max(0, sum(1 for _ in csv.reader(file)) - 1)
    except (OSError, ValueError, csv.Error):
        return 0
