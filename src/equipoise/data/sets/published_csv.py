"""Reads tables of numbers from published CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import DataError

AGAIN = "The file is truncated or was changed: download it again."


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of texts of a CSV file.

    Attributes:
        path: the file.
        header: column names.
        rows: fields of every row, as many as columns.
        first_line: line number of the first row, for error messages.
    """

    path: Path
    header: tuple[str, ...]
    rows: list[list[str]]
    first_line: int

    def texts(self, name: str) -> list[str]:
        """Returns the fields of a column."""
        column = self.header.index(name)
        return [row[column] for row in self.rows]

    def numbers(self, names: Sequence[str], *, missing: bool = False) -> Float[Tensor, "row column"]:
        """Returns columns as float64; empty fields are NaN if ``missing``.

        Raises:
            DataError: a field is not a finite number; the message has its line and column.
        """
        columns = [self.header.index(name) for name in names]
        return torch.tensor([[self._number(line, at, missing) for at in columns] for line in range(len(self.rows))],
                            dtype=torch.float64)  # fmt: skip

    def labels(self, name: str, classes: int) -> Tensor:
        """Returns a column of class indices as (row,) long.

        Raises:
            DataError: a field is not an integer from 0 to classes - 1.
        """
        values = {str(value): value for value in range(classes)}
        for line, text in enumerate(self.texts(name)):
            if text not in values:
                raise DataError(
                    self._place(line, name), expected=f"a class from 0 to {classes - 1}", got=repr(text[:40]), fix=AGAIN
                )
        return torch.tensor([values[text] for text in self.texts(name)])

    def _number(self, line: int, column: int, missing: bool) -> float:
        text = self.rows[line][column]
        if missing and not text.strip():
            return math.nan
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                self._place(line, self.header[column]), expected="a finite number", got=repr(text[:40]), fix=AGAIN
            )
        return value

    def _place(self, line: int, column: str) -> str:
        return f"'{self.path}' line {line + self.first_line}, column '{column}'"


def read_table(path: Path, columns: Sequence[str], *, rows: int, header: bool = True, row_names: bool = False) -> Table:
    """Reads a published CSV file.

    Args:
        path: the file.
        columns: column names; those of the header, if there is one.
        rows: number of rows of the published file.
        header: whether the first line has the column names.
        row_names: whether each row begins with a name of the row, which the header does not have (as R writes them).

    Raises:
        DataError: the file is missing, is not a CSV file in UTF-8, has other columns, another number of fields in a row
            or another number of rows.
    """
    who = f"'{path}'"
    if not path.is_file():
        raise DataError(who, expected="a CSV file", got="no such file", fix="Put the published file there.")
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(who, expected="a CSV file in UTF-8", got=str(error), fix=AGAIN) from error
    names = tuple(lines[0]) if lines and header else tuple(columns)
    if not lines or names != tuple(columns):
        got = ", ".join(lines[0])[:200] if lines else "an empty file"
        raise DataError(who, expected=f"a header with the columns {', '.join(columns)}", got=got, fix=AGAIN)
    body = [line[int(row_names) :] for line in lines[int(header) :]]
    first_line = 2 if header else 1
    for number, row in enumerate(body):
        if len(row) != len(columns):
            raise DataError(
                f"{who} line {number + first_line}", expected=f"{len(columns)} fields", got=f"{len(row)}", fix=AGAIN
            )
    if len(body) != rows:
        raise DataError(who, expected=f"the {rows:,} rows of the published file", got=f"{len(body):,}", fix=AGAIN)
    return Table(path, names, body, first_line)
