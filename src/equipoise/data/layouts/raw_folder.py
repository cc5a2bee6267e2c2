"""A published data set as it was downloaded: finds its files, and never follows links out of its folder."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ConfigError, DataError, unknown_name

MOST_LIST = 2**26
"""Largest size of a list of samples in bytes."""


@dataclass(frozen=True)
class Place:
    """A folder or file of a layout.

    Args:
        candidates: relative paths in the order of preference; the first one that exists is used.
        content: description for listings and error messages.
        required: whether its absence is an error.
    """

    candidates: tuple[str, ...]
    content: str
    required: bool = True


@dataclass(frozen=True)
class RawFolder:
    """The folder of a published data set.

    Args:
        root: the folder.
        places: name -> where to look; of the layout.
        chosen: name -> path given by the user, relative to the root or absolute.
        who: start of the error messages.

    Raises:
        DataError: the root is missing, no folder, or empty.
        ConfigError: a chosen place is unknown or does not exist.
    """

    root: Path
    places: Mapping[str, Place]
    chosen: Mapping[str, str] = field(default_factory=dict)
    who: str = "data prepare"

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            got = "no folder but a file" if self.root.exists() else "no such folder"
            raise DataError(f"{self.who} '{self.root}'", expected="the folder of the published files", got=got)
        try:
            with os.scandir(self.root) as entries:
                empty = next(entries, None) is None
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{self.who} '{self.root}'", expected="a folder that can be read", got=reason) from error
        if empty:
            raise DataError(
                f"{self.who} '{self.root}'", expected="the published files", got="an empty folder", fix=self.describe()
            )
        for name, path in self.chosen.items():
            if name not in self.places:
                raise unknown_name(f"{self.who} --path", "place", name, self.places)
            if not (self.root / path).exists():
                raise ConfigError(
                    f"{self.who} --path {name}", expected="a path that exists", got=f"'{path}'",
                    fix="It is relative to ROOT, or absolute.",
                )  # fmt: skip

    def describe(self) -> str:
        """Returns the expected files in one sentence."""
        parts = (
            f"{location.candidates[0]} ({location.content})" for location in self.places.values() if location.required
        )
        return f"Expected in it: {'; '.join(parts)}."

    def find(self, name: str) -> Path | None:
        """Returns the path of a place.

        Raises:
            DataError: it is required and missing, or a link out of the root.
        """
        if name in self.chosen:
            return self.root / self.chosen[name]
        location = self.places[name]
        for candidate in location.candidates:
            if (self.root / candidate).exists():
                return self.inside(self.root / candidate)
        if location.required:
            raise self.missing(name)
        return None

    def require(self, name: str) -> Path:
        """Returns the path of a place, whether or not the layout requires it.

        Raises:
            DataError: it is missing, or a link out of the root.
        """
        path = self.find(name)
        if path is None:
            raise self.missing(name)
        return path

    def missing(self, name: str) -> DataError:
        """Returns the error for a missing place."""
        location = self.places[name]
        return DataError(
            f"{self.who} '{self.root}'", expected=f"{' or '.join(location.candidates)}: {location.content}", got="none",
            fix=f"Put it there, or name its place: --path {name}=PATH.",
        )  # fmt: skip

    def inside(self, path: Path) -> Path:
        """Returns the path after checking that it is inside the root or a folder that the user passed.

        Raises:
            DataError: a link leads elsewhere.
        """
        real = os.path.realpath(path)
        for base in (self.root, *(self.root / chosen for chosen in self.chosen.values())):
            home = os.path.realpath(base)
            if real == home or real.startswith(home.rstrip(os.sep) + os.sep):
                return path
        raise DataError(
            f"file '{path}'", expected="a file in the folder of the data set", got="a link that leads out of it",
            fix="Replace the link with the file, or name the folder that it leads to: --path NAME=PATH.",
        )  # fmt: skip


def list_files(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Returns the sorted names of the files in a folder with one of the suffixes, in lower case."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return sorted(name for name in names if name.lower().endswith(tuple(suffixes)))


def read_list(path: Path, columns: int, *, last: int | None = None) -> list[tuple[int, list[str]]]:
    """Reads a list of samples: one line each, separated by commas or white space.

    Args:
        path: the file, in UTF-8 with or without a byte order mark.
        columns: least number of columns.
        last: if given, the first ``last`` columns and the last one are kept.

    Returns:
        list of (line number, columns).

    Raises:
        DataError: the file is empty, too large, no text, or a line has too few columns.
    """
    who = f"list '{path}'"
    try:
        if path.stat().st_size > MOST_LIST:
            raise DataError(who, expected=f"a list of at most {MOST_LIST:,} bytes", got=f"{path.stat().st_size:,}")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(who, expected="a text in UTF-8", got="a file in another encoding, or no text") from error
    except OSError as error:
        raise DataError(who, expected="a list that can be read", got=error.strerror or str(error)) from error
    rows = []
    comma = "," in text
    lines = csv.reader(io.StringIO(text)) if comma else (line.split() for line in io.StringIO(text))
    try:
        for number, values in enumerate(lines, start=1):
            values = [value.strip() for value in values]
            if not any(values):
                continue
            if len(values) < columns:
                raise DataError(
                    who, expected=f"at least {columns} columns, separated by commas or spaces",
                    got=f"{len(values)} in line {number}",
                )  # fmt: skip
            rows.append((number, values if last is None else [*values[:last], values[-1]]))
    except csv.Error as error:
        raise DataError(who, expected="comma-separated lines", got=str(error)) from error
    if not rows:
        raise DataError(who, expected="one line for each sample", got="an empty file", fix="Fetch the file again.")
    return rows


def check_unique(ids: Iterable[tuple[str, str]]) -> None:
    """Raises DataError if an id occurs twice in the lists.

    Args:
        ids: (id, description of its place) of all samples of all splits.
    """
    locations: dict[str, str] = {}
    for name, location in ids:
        if name in locations:
            raise DataError(
                "lists of the splits", expected="every sample once, in one split",
                got=f"'{name}' twice: {locations[name]} and {location}", fix="Remove one of the two lines.",
            )  # fmt: skip
        locations[name] = location


def check_label(text: str, classes: int, location: str) -> int:
    """Returns a class number in a list.

    Raises:
        DataError: it is no integer in the range.
    """
    if not text.isdecimal() or int(text) >= classes:
        raise DataError(location, expected=f"a class from 0 to {classes - 1}", got=f"'{text[:40]}'")
    return int(text)
