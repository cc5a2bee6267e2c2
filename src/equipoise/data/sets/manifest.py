"""`manifest`: the samples of a table, read from its files batch by batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from ...io.typed_values import shorten_repr
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split
from ..tables.reader_choice import make_reader
from ..tables.table_manifest import Manifest
from ..tables.table_reading import read_table
from ..tables.value_readers import TextReader

if TYPE_CHECKING:
    import datasets

LISTED = 5
"""Unreadable files that an error lists."""
QUERY_LENGTH = 32
"""Least length of the texts of pairs, so that a query may be longer than the captions."""


@dataclass(frozen=True, eq=False)
class RowSplit(Split):
    """A split whose inputs are read on demand.

    Attributes:
        rows: (sample,) rows of the table.
    """

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))


class ManifestDataset(Dataset):
    """The samples of a table: a file or folder that ``Manifest`` reads.

    Inputs are read when a batch is needed: audio as log-mel spectrograms, images as squares, sequences with masks and
    times, numbers and categories as one vector, texts as word ids. All are standardized with statistics of the training
    split (files: of up to 256 training samples).

    Args:
        path: the table, see ``Manifest``.
        target, pair, group, split, weight, kinds, modalities, task, root: see ``Manifest``.
        folds, fold: the test split is part ``fold`` of ``folds``, unless the table names the splits.
        seed: seed of the assignment to splits.
        skip: rows to leave out, such as those with damaged files; see ``check``.
        checksum: digest of the table that a trained model had; another table is refused.
        ood: table with the same columns of inputs, whose rows are samples of unknown classes; see ``ood_split``.

    Raises:
        DataError: as ``Manifest``; a table that has changed since training.
        ConfigError: as ``Manifest``; a fold that is no number.
    """

    def __init__(
        self, path: str | None = None, *, target: str | list[str] | None = None, pair: list[str] | None = None,
        group: str | None = None, split: str | None = None, weight: str | None = None,
        kinds: dict[str, Any] | None = None, modalities: dict[str, Any] | None = None,
        task: Literal["classification", "multilabel", "regression", "retrieval"] | None = None, root: str | None = None,
        folds: int = 5, fold: str | int = 0, seed: int = 0, skip: list[int] | None = None, checksum: str | None = None,
        ood: str | None = None,
    ) -> None:  # fmt: skip
        if path is None:
            raise ConfigError(
                "data", expected="the path of a table", got="none",
                fix="Pass your table: --data TABLE, with --target COLUMN or --pair COLUMN,COLUMN.",
            )  # fmt: skip
        if not re.fullmatch("[0-9]{1,9}", str(fold)):
            raise ConfigError("data", expected="a fold from 0 to folds - 1", got=f"fold = '{shorten_repr(str(fold))}'")
        self.manifest = Manifest(
            path, target=target, pair=pair, group=group, split=split, weight=weight, kinds=kinds,
            modalities=modalities, task=task, root=root,
        )  # fmt: skip
        if checksum is not None and self.manifest.checksum() != checksum:
            raise DataError(
                f"table '{path}'", expected="the table that the model was trained with", got="another content",
                fix="Restore the file, or train again in a new folder.",
            )  # fmt: skip
        self.task, self.num_outputs = self.manifest.task, self.manifest.num_outputs
        self.names = tuple(self.manifest.modalities)
        rows = self.manifest.split_rows(folds=folds, fold=int(fold), seed=seed)
        left_out = np.array(skip or [], dtype=int)
        if len(unknown := left_out[(left_out < 0) | (left_out >= len(self.manifest))]):
            raise ConfigError(
                "data, skip", expected=f"rows from 0 to {len(self.manifest) - 1}", got=f"row {unknown[0]}"
            )
        self.rows = {name: part[~np.isin(part, left_out)] for name, part in rows.items()}
        for name, part in self.rows.items():
            if not len(part):
                raise DataError(f"table '{path}'", expected=f"rows in {name}", got="none besides those left out")
        if pair and len(self.manifest.target[torch.from_numpy(self.rows["train"])].unique()) < 2:
            raise DataError(
                f"table '{path}'", expected="two or more different pairs in the training rows",
                got="the same text or file in all", fix="Without others, there is nothing to tell a pair from.",
            )  # fmt: skip
        splits = {
            name: RowSplit(
                {}, self.manifest.target[torch.from_numpy(part)], groups=self.manifest.groups_of(part), rows=part
            )
            for name, part in self.rows.items()
        }
        self.train, self.val, self.test = splits["train"], splits["val"], splits["test"]
        weights = self.manifest.weights()
        self.sampling_weights = None if weights is None else weights[torch.from_numpy(self.rows["train"])]
        table = self.manifest.table if ood is None else self._with_unknown(ood)
        self.readers = {
            name: make_reader(name, modality, table, self.manifest.root)
            for name, modality in self.manifest.modalities.items()
        }
        self.options: dict[str, dict[str, Any]] = {}
        for name, reader in self.readers.items():
            modality = self.manifest.modalities[name]
            if isinstance(reader, TextReader) and pair:
                reader.least_length = QUERY_LENGTH
            self.options[name] = {**modality.to_dict(), **reader.fit(self.rows["train"])}
        self.noise = dict.fromkeys(self.names, (0.0, 1.0))
        self.vocabulary = {name: one.vocabulary for name, one in self.readers.items() if one.vocabulary is not None}

    def _with_unknown(self, path: str) -> datasets.Dataset:
        """Returns the table with the rows of another one appended, which become ``near_ood``."""
        import datasets

        table, other = self.manifest.table, read_table(path)
        columns = [name for one in self.manifest.modalities.values() for name in one.columns]
        columns += [str(one.options["times"]) for one in self.manifest.modalities.values() if "times" in one.options]
        for name in columns:
            if name not in other.column_names:
                raise DataError(f"table '{path}'", expected=f"a column '{name}', as in the training data", got="none")
        rows = np.arange(len(table), len(table) + len(other))
        self.near_ood = RowSplit({}, torch.full((len(rows),), -1), rows=rows)
        try:
            return datasets.concatenate_datasets([table.select_columns(columns), other.select_columns(columns)])
        except (ValueError, TypeError) as error:
            raise DataError(
                f"table '{path}'", expected="columns of the same types as in the training data",
                got=" ".join(str(error).split())[:160].rstrip("."),
            ) from error  # fmt: skip

    def checksum(self) -> str:
        """Returns a digest of the table; see ``Manifest.checksum``."""
        return self.manifest.checksum()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: reader.shape for name, reader in self.readers.items()}

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs

    def batch(self, split: str, index: Tensor, *, seed: int, epoch: int, train: bool) -> dict[str, Any]:
        samples = self.split(split)
        assert isinstance(samples, RowSplit)
        rows = samples.rows[index.numpy()]
        parts = {name: reader.read(rows) for name, reader in self.readers.items()}
        batch: dict[str, Any] = {name: part.values for name, part in parts.items()}
        batch |= {"target": samples.target[index], "index": index}
        mask = {name: part.mask for name, part in parts.items() if part.mask is not None}
        times = {name: part.times for name, part in parts.items() if part.times is not None}
        return {**batch, **({"mask": mask} if mask else {}), **({"times": times} if times else {})}

    def check(self, progress: Callable[[int, int], None] | None = None, *, workers: int = 4) -> dict[int, list[str]]:
        """Reads the files of every row once.

        Args:
            progress: called with (rows done, rows).
            workers: threads.

        Returns:
            row -> reasons, for the rows with a file that cannot be read.
        """
        rows = np.sort(np.concatenate(list(self.rows.values())))

        def examine(row: int) -> list[str]:
            return [reason for reader in self.readers.values() if (reason := reader.check(row)) is not None]

        bad = {}
        with ThreadPoolExecutor(workers) as pool:
            for done, (row, reasons) in enumerate(zip(rows.tolist(), pool.map(examine, rows.tolist()), strict=True), 1):
                if reasons:
                    bad[row] = reasons
                if progress is not None:
                    progress(done, len(rows))
        return bad


def unreadable(bad: Mapping[int, Sequence[str]], rows: int) -> DataError:
    """Returns the error that lists rows with unreadable files."""
    listed = " ".join(f"[{row}] {reasons[0]}" for row, reasons in list(bad.items())[:LISTED])
    more = f" (and {len(bad) - LISTED} more)" if len(bad) > LISTED else ""
    return DataError(
        "data",
        expected=f"readable files in all {rows} rows",
        got=f"{len(bad)} rows that cannot be read: {listed}{more}",
        fix="Fix these files, or skip their rows with --skip-bad.",
    )
