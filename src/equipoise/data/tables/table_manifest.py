"""A table of samples: its modalities, target, groups and splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError, unknown_name
from .column_kinds import find_modalities, modalities_from_options
from .column_pairs import complete_rows, is_blank, matching_rows, pair_modalities, shared_cells
from .modality_readers import BLOCK
from .row_splits import split_rows
from .table_reading import SPLIT, read_table
from .target_columns import TargetReader, Task, column_numbers

if TYPE_CHECKING:
    import datasets
    import pandas


class Manifest:
    """A table with one row per sample: which columns are inputs, and which are target, group, split and weight.

    An empty cell is a missing modality. Kinds of columns are recognized from their types and contents: paths of audio,
    image, video and .npy files, folders of frames, texts, numbers and categories; see ``kinds``.

    Args:
        source: csv, tsv, jsonl or parquet file, data set of Hugging Face ``datasets`` (folder, name or object), or
            pandas.DataFrame.
        target: column of the target: classes, or numbers for a regression. Several columns, or cells such as "a;b" or
            lists, are a multi-label target where they hold labels, and a regression with several outputs where they
            hold numbers. None with ``pair``.
        pair: columns to align instead of a target, such as images and their captions. Rows that lack one of them are
            not used; rows with the same text (case and punctuation aside) or the same file match each other.
        group: column of groups that must not be in two splits, such as the speaker. A row without a value is a group
            of its own.
        split: column with train, val or test in each row; by default the column "split" if there is one.
        weight: column of sampling weights of training rows.
        kinds: column -> kind ("audio", "image", "video", "frames", "text", "vector", "sequence", "array", "number",
            "category", "ignore"), or a dict with "kind" and options of the reader; replaces what is recognized.
        modalities: name -> {"kind", "column" or "columns", options}; replaces the grouping of columns altogether.
        task: "classification", "multilabel" or "regression"; by default recognized from the target.
        root: folder that relative paths refer to; by default that of the table.

    Attributes:
        table: ``datasets.Dataset``, memory-mapped if it is on disk.
        modalities: name -> Modality.
        unused: column -> reason.
        task, num_outputs, classes: of the target; ``classes`` are the names of classes, labels or outputs. The task of
            pairs is "retrieval".
        target: (row,) class indices, or (row, output); of pairs, (row,) numbers that are equal for matching rows.
        usable: rows that are used: all, or the complete ones of pairs.

    Raises:
        DataError: the table is damaged or empty, or a target is missing or invalid.
        ConfigError: unknown column, kind or task; neither target nor pair, or both.

    Example:
        >>> import pandas
        >>> rows = {"a_0": [0.1, 0.2, 0.3], "a_1": [1.0, 2.0, 3.0], "note": ["x", "y", None], "y": ["no", "yes", "no"]}
        >>> manifest = Manifest(pandas.DataFrame(rows), target="y")
        >>> {name: one.kind for name, one in manifest.modalities.items()}, manifest.classes
        ({'a': 'vector', 'note': 'category'}, ('no', 'yes'))
    """

    def __init__(
        self, source: str | Path | datasets.Dataset | pandas.DataFrame, *,
        target: str | Sequence[str] | None = None, pair: Sequence[str] | None = None, group: str | None = None,
        split: str | None = None, weight: str | None = None,
        kinds: Mapping[str, Any] | None = None, modalities: Mapping[str, Any] | None = None, task: Task | None = None,
        root: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.source = source
        self.table = _undecoded(read_table(source))
        self.targets = [target] if isinstance(target, str) else list(target or ())
        self.pair = [pair] if isinstance(pair, str) else list(pair or ())
        if bool(self.targets) == (pair is not None):
            raise ConfigError(
                "Manifest", expected="a target, or a pair of columns without one",
                got="neither" if pair is None else f"both, {', '.join(self.targets)} and {', '.join(self.pair)}",
            )  # fmt: skip
        if split is None and SPLIT in self.table.column_names and SPLIT not in self.targets:
            split = SPLIT
        self.group, self.split, self.weight = group, split, weight
        special = [name for name in (*self.targets, group, split, weight) if name is not None]
        for name in special:
            if name not in self.table.column_names:
                raise unknown_name("Manifest", "column", name, self.table.column_names)
        if len(set(special)) < len(special):
            raise ConfigError(
                "Manifest", expected="different columns for target, group, split and weight", got=", ".join(special)
            )
        self.root = table_root(source, root)
        columns = [name for name in self.table.column_names if name not in special]
        self.unused: dict[str, str] = {}
        if modalities:
            self.modalities = modalities_from_options(modalities, columns)
        elif self.pair:
            self.modalities, self.unused = pair_modalities(self.table, self.root, self.pair, kinds or {}, set(special))
        else:
            self.modalities, self.unused = find_modalities(
                self.table, self.root, exclude=set(special), kinds=kinds or {}
            )
        self.task: Task
        self.classes: tuple[str, ...]
        self.usable = np.arange(len(self))
        if self.pair:
            if task not in (None, "retrieval"):
                raise ConfigError("Manifest", expected="a task only with a target", got=f"task = {task!r} with a pair")
            self.task, self.classes = "retrieval", ()
            self.usable = complete_rows(self.table, self.modalities)
            self.target = torch.from_numpy(matching_rows(self.table, self.modalities))
        else:
            reader = TargetReader(self.table.features, self.targets, task)
            blocks = self.table.select_columns(self.targets).with_format("arrow")
            for start in range(0, len(self), BLOCK):
                reader.observe(blocks[start : start + BLOCK], np.arange(start, min(start + BLOCK, len(self))))
            reader.finish()
            self.task, self.classes = reader.task, reader.classes
            parts = [reader.read(blocks[start : start + BLOCK]) for start in range(0, len(self), BLOCK)]
            self.target = torch.cat(parts)

    @property
    def num_outputs(self) -> int:
        return len(self.target[self.usable].unique()) if self.pair else len(self.classes)

    def __len__(self) -> int:
        return len(self.table)

    def checksum(self) -> str:
        """Returns a digest of the table, which lets a run detect changed data."""
        if isinstance(self.source, (str, Path)) and Path(self.source).is_file():
            digest = hashlib.sha256()
            with open(self.source, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            return digest.hexdigest()[:16]
        text = f"{len(self)} {sorted(map(str, self.table.features.items()))} {self.target.tolist()[:10_000]}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def weights(self) -> Tensor | None:
        """Returns the sampling weight of each row, or None without weights."""
        if self.weight is None:
            return None
        values = column_numbers(self.table.select_columns([self.weight]).with_format("arrow")[:], self.weight)
        if not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise DataError(f"column '{self.weight}'", expected="finite weights >= 0, not all 0", got="others")
        return torch.tensor(values)

    def split_rows(self, *, folds: int = 5, fold: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
        """Returns {"train": rows, "val": rows, "test": rows}; see ``row_splits.split_rows``."""
        split = None if self.split is None else self.table[self.split][:]
        group: Sequence[object] | None = self.shared_files()[1] if self.group is None else self.group_names()
        classes = self.target.numpy() if self.task == "classification" else None
        if self.pair:
            split = None if split is None else [split[row] for row in self.usable]
            group = None if group is None else [group[row] for row in self.usable]
        parts = split_rows(
            len(self.usable), split=split, group=group, classes=classes, folds=folds, fold=fold, seed=seed
        )
        return {name: self.usable[part] for name, part in parts.items()}

    def groups_of(self, rows: np.ndarray) -> list[str] | None:
        """Returns the groups of rows, from the column of groups; None without such a column."""
        if self.group is None:
            return None
        names = self.group_names()
        return [names[row] for row in rows]

    def group_names(self) -> list[str]:
        """Returns the group of each row of the table; a row without one is a group of its own."""
        assert self.group is not None
        return [
            f"row {row + 1}, no {self.group}" if is_blank(value) else str(value)
            for row, value in enumerate(self.table[self.group][:])
        ]

    def shared_files(self) -> tuple[str, list[int] | None]:
        """Returns the first modality of pairs with the same file in several rows, and the number of each row's file.

        Without a column of groups or splits, rows of one file stay in one split.
        """
        for name, one in self.modalities.items() if self.pair and self.split is None else ():
            if one.kind != "text" and (codes := shared_cells(self.table, one)) is not None:
                used = codes[self.usable]
                if len(np.unique(used)) < len(used):
                    return name, codes.tolist()
        return "", None

    def split_title(self) -> str:
        """Returns how rows are assigned to splits."""
        if self.split is not None:
            return f"column '{self.split}'"
        by = self.group or self.shared_files()[0]
        return f"groups of '{by}'" if by else "random rows"

    def describe(self) -> list[str]:
        """Returns one line per modality and for the target: what was recognized."""
        lines = []
        for name, one in self.modalities.items():
            columns = one.columns[0] if len(one.columns) == 1 else f"{len(one.columns)} columns, {one.columns[0]} ..."
            lines.append(f"{name}: {one.kind} ({columns})")
        if self.unused:
            lines.append(f"not used: {', '.join(self.unused)}")
        if self.group is not None and (lacking := sum(map(is_blank, self.table[self.group][:]))):
            lines.append(f"group: {lacking} of {len(self)} rows have no {self.group}; each is a group of its own")
        if self.pair:
            lacking = len(self) - len(self.usable)
            lines.append(
                f"pairs: {len(self.usable)} of {len(self)} rows"
                + (f"; {lacking} lack {' or '.join(self.modalities)} and are left out" if lacking else "")
            )
            if self.num_outputs < len(self.usable):
                lines.append(
                    f"different pairs: {self.num_outputs}; rows with the same text (case and punctuation aside) or the "
                    "same file match each other"
                )
            return lines
        kind = {"classification": "classes", "multilabel": "labels", "regression": "outputs"}[self.task]
        lines.append(f"target: {', '.join(self.targets)} ({self.task}, {self.num_outputs} {kind})")
        return lines


def table_root(source: object, root: str | Path | None) -> Path:
    """Returns the folder that relative paths of a table refer to."""
    if root is not None:
        if not Path(root).is_dir():
            raise DataError("Manifest root", expected="a folder", got=f"'{root}'")
        return Path(root)
    if not isinstance(source, (str, Path)):
        return Path()
    path = Path(source)
    return path if path.is_dir() else path.parent


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """Leaves images, audio and video as files, which the readers of this package check and decode."""
    import datasets

    for name, feature in list(table.features.items()):
        if isinstance(feature, (datasets.Image, datasets.Audio)) or type(feature).__name__ == "Video":
            table = table.cast_column(name, type(feature)(decode=False))
    return table.with_format(None)
