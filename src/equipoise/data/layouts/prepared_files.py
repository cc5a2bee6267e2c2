"""Files of a prepared folder: manifest, checksums, report and journal."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError, EquipoiseError
from ...io.atomic_files import atomic_write, read_json, to_jsonable
from ...io.checksums import add_checksum, verify_checksum

MANIFEST, OOD, CHECKSUMS, REPORT, JOURNAL = "manifest.csv", "ood.csv", "checksums.txt", "prepare.json", "journal.jsonl"
SCHEMA = 1


@dataclass(frozen=True)
class JournalEntry:
    """Result of the conversion of one sample.

    Args:
        id: of the sample.
        signature: hash of the sample, its options, and the sizes and times of its raw files.
        cells: column -> value in the manifest.
        files: path relative to the prepared folder -> (SHA-256, size).
        dropped: why it was left out; "" if it was not.
    """

    id: str
    signature: str
    cells: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    dropped: str = ""

    def line(self) -> str:
        """Returns the entry as a line of the journal."""
        content = {
            "id": self.id, "signature": self.signature, "cells": self.cells, "files": self.files,
            "dropped": self.dropped,
        }  # fmt: skip
        return json.dumps(to_jsonable(content), ensure_ascii=False) + "\n"


def read_journal(path: Path) -> dict[str, JournalEntry]:
    """Reads the journal; lines that an interruption cut off are ignored."""
    entries: dict[str, JournalEntry] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return entries
    for line in lines:
        try:
            content = json.loads(line)
            files = {str(name): (str(value[0]), int(value[1])) for name, value in content["files"].items()}
            entry = JournalEntry(
                str(content["id"]), str(content["signature"]), dict(content["cells"]), files, str(content["dropped"])
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            continue
        entries[entry.id] = entry
    return entries


def hash_file(path: Path) -> tuple[str, int]:
    """Returns the SHA-256 hash and the size of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, os.fstat(file.fileno()).st_size


def array_path(column: str, name: str, suffix: str = ".npy") -> str:
    """Returns the relative path of the array of a sample; ids that differ give paths that differ.

    Example:
        >>> array_path("audio", "1001_DFA_ANG_XX")
        'audio/84/1001_DFA_ANG_XX.npy'
    """
    shard = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    unchanged = safe == name and not name.startswith(".")
    return f"{column}/{shard[:2]}/{safe if unchanged else f'{safe.lstrip(chr(46))}-{shard[:12]}'}{suffix}"


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes a csv file; missing values are empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if row.get(name) is None else row[name] for name in columns])
    return atomic_write(path, text.getvalue())


def write_checksums(path: Path, files: Mapping[str, str]) -> Path:
    """Writes checksums in the format of ``sha256sum``."""
    return atomic_write(path, "".join(f"{value}  {name}\n" for name, value in sorted(files.items())))


def read_checksums(path: Path) -> dict[str, str]:
    """Reads checksums in the format of ``sha256sum``.

    Raises:
        DataError: the file is missing, or a line has another form.
    """
    who = f"checksums '{path}'"
    fix = "Run data prepare again with the same folder."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        got = "no such file" if isinstance(error, FileNotFoundError) else "a file that cannot be read"
        raise DataError(who, expected="the checksums that data prepare wrote", got=got, fix=fix) from error
    checksums = {}
    for number, line in enumerate(lines, start=1):
        value, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", value) or not name:
            raise DataError(who, expected="lines of a SHA-256 and a path", got=f"another line {number}", fix=fix)
        checksums[name] = value
    return checksums


def write_report(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes prepare.json, including its own checksum."""
    report = add_checksum(to_jsonable(content))
    return atomic_write(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def read_report(folder: Path, who: str) -> dict[str, Any]:
    """Reads prepare.json.

    Raises:
        DataError: it is missing, damaged, changed, or of a later version.
    """
    path = folder / REPORT
    try:
        content = read_json(path)
    except OSError as error:
        raise DataError(
            f"{who} '{folder}'", expected=f"a folder of data prepare, with {REPORT}",
            got="no such folder" if not folder.is_dir() else "none", fix="Name the folder that data prepare wrote.",
        ) from error  # fmt: skip
    except ValueError as error:
        raise DataError(f"{who} '{path}'", expected="JSON", got="a damaged file") from error
    if not isinstance(content, dict) or not {"layout", "schema", "complete"} <= set(content):
        raise DataError(f"{who} '{path}'", expected="the report of data prepare", got="another content")
    if content["schema"] != SCHEMA:
        raise DataError(f"{who} '{path}'", expected=f"schema {SCHEMA}", got=ascii(content["schema"])[:40])
    try:
        return verify_checksum(content, f"{who} '{path}'", "Run data prepare again with the same folder.")
    except EquipoiseError as error:
        raise DataError(error.who, expected=error.expected, got=error.got, fix=error.fix) from error
