"""Rows of figures as data frames, HTML tables and CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..errors import ConfigError


def to_pandas(rows: Sequence[Mapping[str, Any]], who: str) -> Any:
    """Converts rows to a ``pandas.DataFrame``; pandas is imported here, as nothing else needs it.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{who}.to_pandas",
            expected="the package pandas",
            got="none installed",
            fix="Install it: pip install pandas.",
        ) from error
    return pandas.DataFrame(list(rows))


def html_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Returns an HTML table of rows; everything is escaped, and None and NaN are empty cells.

    Args:
        rows: values by column; numbers are shown with four significant digits.
        columns: the columns to show; all keys in the order of their first occurrence by default.

    Example:
        >>> html_table([{"method": "a<b", "accuracy": 0.51239}])
        '<table><thead><tr><th>method</th><th>accuracy</th></tr></thead><tbody><tr><td>a&lt;b</td><td>0.5124</td></tr></tbody></table>'
    """
    shown = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else columns
    head = "".join(f"<th>{escape(str(name))}</th>" for name in shown)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in shown)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Returns rows as CSV with a header; None is an empty cell, numbers have all their digits.

    Example:
        >>> csv_text([{"metric": "accuracy", "value": 0.1}, {"metric": "air", "value": None}], ["metric", "value"])
        'metric,value\\naccuracy,0.1\\nair,\\n'
    """
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))
