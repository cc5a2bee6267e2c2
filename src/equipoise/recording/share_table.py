"""The table of an ``AttentionRecord``: one row for each layer, printed as text, Rich or HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..io.table_display import to_pandas


class ShareTable(list):
    """List of rows ``{"layer", <modality>..., "special", "sink"}``, one for each layer; prints as a table.

    Args:
        names: of the modalities.
        rows: shares in [0, 1].
        missing: layer -> why it has no row; shown below the table.
    """

    def __init__(
        self, names: Sequence[str], rows: Sequence[dict[str, Any]], missing: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(rows)
        self.names = tuple(names)
        self.missing = dict(missing or {})

    def to_pandas(self) -> Any:
        """Returns the rows as a ``pandas.DataFrame``.

        Raises:
            ConfigError: pandas is not installed.
        """
        return to_pandas(self, "table")

    def __str__(self) -> str:
        columns = self._columns()
        width = max([len("layer"), *(len(row["layer"]) for row in self)])
        widths = [max(7, len(name)) for name in columns]
        lines = [" ".join(["layer".ljust(width), *(name.rjust(w) for name, w in zip(columns, widths, strict=True))])]
        for row in self:
            cells = (_percent(row.get(name)).rjust(w) for name, w in zip(columns, widths, strict=True))
            lines.append(" ".join([row["layer"].ljust(width), *cells]))
        if self.missing:
            lines += ["", "not in the table:", *(f"  {layer}: {reason}" for layer, reason in self.missing.items())]
        return "\n".join(lines)

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        # Text, because module names may contain brackets, which Rich would parse as markup.
        note = "\n".join(["not in the table:", *(f"{layer}: {reason}" for layer, reason in self.missing.items())])
        table = RichTable(caption=Text(note) if self.missing else None, caption_justify="left")
        columns = self._columns()
        for name in ("layer", *columns):
            table.add_column(Text(name), justify="left" if name == "layer" else "right")
        for row in self:
            table.add_row(Text(row["layer"]), *(_percent(row.get(name)) for name in columns))
        return table

    def _repr_html_(self) -> str:
        columns = self._columns()
        head = "".join(f"<th>{escape(name)}</th>" for name in ("layer", *columns))
        rows = "".join(
            f"<tr><td>{escape(row['layer'])}</td>"
            + "".join(f"<td>{_percent(row.get(name))}</td>" for name in columns)
            + "</tr>"
            for row in self
        )
        missing = "".join(f"<li>{escape(layer)}: {escape(reason)}</li>" for layer, reason in self.missing.items())
        note = f"<p>not in the table:</p><ul>{missing}</ul>" if missing else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}"

    def _columns(self) -> list[str]:
        return [*self.names, "special", *(["sink"] if any(row["sink"] for row in self) else [])]


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"
