"""Base class of the published layouts: what is expected in a raw folder, and how a sample is converted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...errors import ConfigError, unknown_name
from .raw_folder import Place, RawFolder


@dataclass(frozen=True)
class RawSample:
    """A sample of a published data set, before conversion.

    Args:
        id: unique name.
        split: "train", "val", "test" or "ood"; "" where the layout has no lists.
        target: class number or value.
        group: actor, speaker or source video; "" where the layout has none.
        label: name of the class.
        files: name -> raw files that the sample is made of.
        rows: name -> row in an array of all samples.
        extra: further columns of the manifest.
    """

    id: str
    split: str
    target: float
    group: str = ""
    label: str = ""
    files: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scan:
    """The samples that a raw folder contains.

    Args:
        samples: in the order of the manifest.
        dropped: id -> reason, for samples that are left out before conversion.
        notes: sentences for the report.
        classes: names of the classes by number; empty for a regression.
    """

    samples: list[RawSample]
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Option:
    """An option of a layout: default, the values it may have (None: any positive integer), description."""

    default: Any
    choices: tuple[Any, ...] | None
    help: str


@dataclass(frozen=True)
class Settings:
    """Options of the conversion of a sample.

    Args:
        raw: the raw folder.
        options: name -> value, checked.
        scratch: folder of intermediate arrays, in the output folder.
    """

    raw: RawFolder
    options: Mapping[str, Any]
    scratch: Path


class Layout(ABC):
    """Base class of the published layouts that ``equipoise data prepare`` reads.

    Attributes:
        name: as on the command line.
        title, source, license: for listings and reports.
        groups: what a group is, such as "actor"; "" where the layout has none.
        columns: modality -> kind of its column in the manifest; see ``kind``.
        places: name -> folder or file to find.
        options: name -> option besides the split.
        published: split -> number of samples as published; without "val" where validation is taken from training.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    license: ClassVar[str]
    groups: ClassVar[str] = ""
    columns: ClassVar[dict[str, str]]
    places: ClassVar[dict[str, Place]]
    options: ClassVar[dict[str, Option]] = {}
    published: ClassVar[dict[str, int]] = {}

    @abstractmethod
    def scan(self, settings: Settings) -> Scan:
        """Lists the samples of a raw folder.

        Raises:
            DataError: lists or folders are missing or damaged.
        """

    @abstractmethod
    def convert(self, sample: RawSample, settings: Settings) -> dict[str, np.ndarray | Path | float | str | None]:
        """Reads the files of a sample, in a worker process.

        Returns:
            column -> array to write, raw file to refer to, number, text, or None for a missing modality.

        Raises:
            DataError: a file is missing or damaged; the sample is dropped.
        """

    def kind(self, column: str, options: Mapping[str, Any]) -> str:
        """Returns the kind of a column in the manifest, which depends on the options."""
        if column == "audio" and options.get("audio") == "wav":
            return "audio"
        return "image" if self.columns[column] == "frames" and options.get("frames") == 1 else self.columns[column]

    def finish(self, settings: Settings) -> None:  # noqa: B027
        """Removes intermediate files after the last sample."""

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all options with their values.

        Raises:
            ConfigError: an unknown option or value.
        """
        who = f"data prepare {self.name}"
        checked = {name: option.default for name, option in self.options.items()}
        for name, value in options.items():
            if name not in self.options:
                raise unknown_name(who, "option", f"--{name}", [f"--{option}" for option in self.options])
            option = self.options[name]
            if option.choices is not None and value not in option.choices:
                raise unknown_name(who, f"value of --{name}", str(value), map(str, option.choices))
            if option.choices is None and (not isinstance(value, int) or not 1 <= value <= 4096):
                raise ConfigError(who, expected=f"--{name} from 1 to 4096", got=str(value))
            checked[name] = value
        return checked
