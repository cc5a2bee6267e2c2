"""Reads the target of a table block by block: its task, the names of classes, labels or outputs, and its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, unknown_name

if TYPE_CHECKING:
    import pyarrow

Task = Literal["classification", "multilabel", "regression", "retrieval"]
TASKS = ("classification", "multilabel", "regression")
MOST_CLASSES = 1_000
FEW_NUMBERS = 20
"""Whole numbers with at most this many different values are classes."""
SEPARATOR = ";"
"""Between the labels of a multi-label cell."""


class TargetReader:
    """Reads the target of rows.

    Call ``observe`` with all rows, then ``finish``; ``read`` then returns the targets of any rows. The memory does not
    depend on the number of rows.

    Args:
        features: column -> feature of ``datasets``; those with names of classes define them.
        columns: columns of the target.
        task: "classification", "multilabel" or "regression"; by default recognized from the values.

    Attributes:
        task: the task.
        classes: names of classes, labels or outputs.

    Raises:
        ConfigError: an unknown task. DataError: a target that is missing or invalid.
    """

    task: Task
    classes: tuple[str, ...]

    def __init__(self, features: Mapping[str, Any], columns: Sequence[str], task: Task | None) -> None:
        if task not in (None, *TASKS):
            raise unknown_name("Manifest", "task", str(task), TASKS)
        self.columns, self._given = list(columns), task
        self._names = getattr(features[columns[0]], "names", None) if len(columns) == 1 else None
        self._empty: dict[str, tuple[int, int]] = {}
        self._infinite: int | None = None
        self._first: tuple[Any, int] | None = None
        self._values: set[Any] = set()
        self._labels: set[str] = set()
        self._lengths: set[int] = set()
        self._several_labels, self._whole, self._binary, self._numbers = False, True, True, True

    def observe(self, block: pyarrow.Table, rows: np.ndarray) -> None:
        """Adds rows; ``rows`` are their numbers, for error messages."""
        complete = True
        for column in self.columns:
            empty = block.column(column).combine_chunks().is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
            if empty.any():
                count, first = self._empty.get(column, (0, int(rows[empty.argmax()])))
                self._empty[column] = count + int(empty.sum()), first
                complete = False
        if not complete or not len(rows):
            return
        if len(self.columns) > 1:
            values = self._matrix(block)
            self._binary &= bool(np.isin(values, (0.0, 1.0)).all())
            self._note_infinite(values, rows)
        else:
            self._observe_cells(block.column(self.columns[0]), rows)

    def _observe_cells(self, cells: pyarrow.ChunkedArray, rows: np.ndarray) -> None:
        import pyarrow as pa
        from pyarrow import compute

        column = self.columns[0]
        if pa.types.is_dictionary(cells.type):
            cells = cells.cast(cells.type.value_type)
        if self._first is None:
            self._first = cells[0].as_py(), int(rows[0])
        kind = cells.type
        if _is_list(kind):
            flat = compute.call_function("list_flatten", [cells])
            self._numbers = _is_number(flat.type)
            if self._numbers and self._given != "multilabel":
                self._lengths |= set(compute.call_function("list_value_length", [cells]).unique().to_pylist())
                self._note_infinite(np.asarray(flat.cast("float64"))[:, None], rows[:1])
            else:
                _add(self._labels, (str(one) for one in flat.unique().to_pylist() if one is not None))
            return
        if not (_is_number(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"target '{column}'", expected="numbers, labels or lists of them", got=f"{kind}")
        self._numbers = _is_number(kind)
        values = cells.unique().to_pylist()
        _add(self._values, values)
        if not self._numbers or self._given == "multilabel":
            self._several_labels |= any(SEPARATOR in str(value) for value in values)
            _add(self._labels, (label for value in values for label in _labels_of(value)))
        elif self._names is None or self._given == "regression":
            numbers = np.asarray(cells.cast("float64").to_numpy())
            self._note_infinite(numbers[:, None], rows)
            self._whole &= bool((numbers[np.isfinite(numbers)] % 1 == 0).all())

    def finish(self) -> None:
        """Determines the task and the classes."""
        for column, (count, first) in self._empty.items():
            raise DataError(
                f"target '{column}'", expected="a value in every row", got=f"{count} empty, the first in row {first}",
                fix="Remove these rows, or fill the cells.",
            )  # fmt: skip
        several = len(self.columns) > 1
        self.task, self.classes = self._several() if several else self._single(*(self._first or (None, 0)))
        if self.task == "regression" and self._infinite is not None:
            who = ", ".join(self.columns)
            raise DataError(f"target '{who}'", expected="finite numbers", got=f"infinity in row {self._infinite}")
        self._number = {value: place for place, value in enumerate(sorted(self._values))}
        self._place = {name: place for place, name in enumerate(self.classes)}

    def _several(self) -> tuple[Task, tuple[str, ...]]:
        if self._given == "classification" or (self._given == "multilabel" and not self._binary):
            raise DataError(
                f"targets {', '.join(self.columns)}", expected="0 or 1 in every cell of a multi-label target",
                got=f"task {self._given} with other values" if not self._binary else "task classification",
            )  # fmt: skip
        binary = self._binary and self._given != "regression"
        return ("multilabel" if binary else "regression"), tuple(self.columns)

    def _single(self, first: Any, row: int) -> tuple[Task, tuple[str, ...]]:
        column, given = self.columns[0], self._given
        if self._names is not None and given in (None, "classification"):
            if unknown := [value for value in self._values if not 0 <= value < len(self._names)]:
                raise DataError(
                    f"target '{column}'", expected=f"classes from 0 to {len(self._names) - 1}", got=f"{min(unknown)}",
                    fix="Remove the rows without a label.",
                )  # fmt: skip
            self._values = set(range(len(self._names)))
            return "classification", tuple(self._names)
        if isinstance(first, list):
            if not self._numbers or given == "multilabel":
                return "multilabel", _names(self._labels)
            if len(self._lengths) > 1:
                raise DataError(
                    f"target '{column}'", expected="equally many numbers in every row",
                    got=f"{min(self._lengths)} to {max(self._lengths)}",
                )  # fmt: skip
            return "regression", tuple(f"{column}_{i}" for i in range(len(first)))
        if given == "multilabel" or (given is None and self._several_labels):
            return "multilabel", _names(self._labels)
        if not self._numbers and given == "regression":
            raise DataError(f"target '{column}'", expected="numbers", got=f"{first!r} in row {row}")
        many = not self._whole or len(self._values) > FEW_NUMBERS
        if self._numbers and (given == "regression" or (given is None and many)):
            return "regression", (column,)
        if not 2 <= len(self._values) <= MOST_CLASSES:
            got = f"{len(self._values)}" if len(self._values) <= MOST_CLASSES else "more"
            raise DataError(
                f"target '{column}'", expected=f"2 to {MOST_CLASSES:,} classes", got=got,
                fix="For numbers, set task: regression.",
            )  # fmt: skip
        return "classification", tuple(map(str, sorted(self._values)))

    def read(self, block: pyarrow.Table) -> Tensor:
        """Returns the targets of rows: (row,) class indices, or (row, output).

        Raises:
            DataError: a class or label that no observed row has.
        """
        if len(self.columns) > 1:
            return torch.from_numpy(self._matrix(block)).float()
        cells = block.column(self.columns[0]).to_pylist()
        try:
            if self.task == "classification":
                return torch.tensor([self._number[cell] for cell in cells], dtype=torch.long)
            if self.task == "regression":
                rows = cells if isinstance(cells[0], list) else [[cell] for cell in cells]
                return torch.from_numpy(np.array(rows, dtype=np.float64)).float()
            target = torch.zeros(len(cells), len(self.classes))
            for row, cell in enumerate(cells):
                target[row, [self._place[label] for label in _labels_of(cell)]] = 1.0
        except KeyError as error:
            raise DataError(
                f"target '{self.columns[0]}'", expected="the classes of the data when they were first read",
                got=f"{error.args[0]!r}", fix="The data have changed: start again.",
            ) from error  # fmt: skip
        return target

    def _matrix(self, block: pyarrow.Table) -> np.ndarray:
        return np.stack([column_numbers(block, column) for column in self.columns], axis=1)

    def _note_infinite(self, values: np.ndarray, rows: np.ndarray) -> None:
        if self._infinite is None and not (finite := np.isfinite(values).all(axis=1)).all():
            self._infinite = int(rows[min(int((~finite).argmax()), len(rows) - 1)])


def column_numbers(block: pyarrow.Table, column: str) -> np.ndarray:
    """Returns a column of numbers in float64.

    Raises:
        DataError: the column has other values.
    """
    import pyarrow as pa

    cells = block.column(column)
    try:
        return np.asarray(cells.cast("float64").to_numpy(), dtype=np.float64)
    except (pa.ArrowException, ValueError, NotImplementedError) as error:
        raise DataError(f"column '{column}'", expected="numbers", got=f"{cells.type}") from error


def _is_list(kind: pyarrow.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(kind: pyarrow.DataType) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def _add(found: set[Any], values: Iterable[Any]) -> None:
    """Adds values to a set that never has more than ``MOST_CLASSES`` + 1."""
    for value in values:
        if len(found) > MOST_CLASSES:
            return
        found.add(value)


def _labels_of(cell: Any) -> list[str]:
    if isinstance(cell, list):
        return [str(label) for label in cell if label is not None]
    return [part.strip() for part in str(cell).split(SEPARATOR) if part.strip()]


def _names(labels: set[str]) -> tuple[str, ...]:
    if not 1 <= len(labels) <= MOST_CLASSES:
        raise DataError("target", expected=f"1 to {MOST_CLASSES:,} labels",
                        got=f"{len(labels)}" if len(labels) <= MOST_CLASSES else "more")  # fmt: skip
    return tuple(sorted(labels))
