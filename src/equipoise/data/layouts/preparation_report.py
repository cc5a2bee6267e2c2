"""Writes the manifest, checksums and report of a preparation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...io.atomic_files import open_atomic
from . import prepared_files
from .prepared_files import JournalEntry
from .published_layout import Layout, RawSample, Scan
from .raw_folder import RawFolder


def write_outputs(
    layout: Layout, scan: Scan, samples: Sequence[RawSample], entries: Mapping[str, JournalEntry], raw: RawFolder,
    out: Path, choice: Mapping[str, Any], who: str,
) -> dict[str, Any]:  # fmt: skip
    """Writes the manifest, checksums and report, and returns the report.

    Raises:
        DataError: all samples were dropped.
    """
    all_dropped = {**scan.dropped, **{name: entry.dropped for name, entry in entries.items() if entry.dropped}}
    rows = []
    for sample in samples:
        entry = entries[sample.id]
        if not entry.dropped:
            fixed = {
                "id": sample.id, "split": sample.split, "group": sample.group, "target": _plain(sample.target)
            }  # fmt: skip
            # The manifest has no second form of the target, which could be taken for an input.
            fixed |= {"label": sample.label} if sample.split == "ood" else {}
            rows.append({**fixed, **entry.cells, **sample.extra})
    in_distribution = [row for row in rows if row["split"] != "ood"]
    if not in_distribution:
        raise no_samples(raw, all_dropped, who)
    tables = {prepared_files.MANIFEST: in_distribution}
    if len(in_distribution) < len(rows):
        tables[prepared_files.OOD] = [row for row in rows if row["split"] == "ood"]
    files = {name: value for entry in entries.values() for name, (value, _) in entry.files.items()}
    for name, part in tables.items():
        prepared_files.write_table(out / name, _columns(part), part)
        files[name] = prepared_files.hash_file(out / name)[0]
    prepared_files.write_checksums(out / prepared_files.CHECKSUMS, files)
    columns = _columns(in_distribution)
    counts = dict(Counter(row["split"] for row in rows))
    report = {
        "schema": prepared_files.SCHEMA, "layout": layout.name, "complete": True, "choice": choice,
        "title": layout.title, "license": layout.license, "root": str(raw.root),
        "columns": {name: layout.kind(name, choice["options"]) for name in layout.columns if name in columns},
        "classes": list(scan.classes),
        "samples": counts, "published": layout.published if choice["options"]["split"] == "published" else {},
        "groups": _groups(layout, rows), "missing": _missing(layout, rows), "notes": list(scan.notes),
        "dropped": len(all_dropped), "dropped_reasons": drop_reasons(all_dropped), "dropped_samples": all_dropped,
        "files": len(files), "checksums": prepared_files.hash_file(out / prepared_files.CHECKSUMS)[0],
    }  # fmt: skip
    prepared_files.write_report(out / prepared_files.REPORT, report)
    # Shortened to one line for each sample of today.
    with open_atomic(out / prepared_files.JOURNAL) as file:
        file.write("".join(entries[sample.id].line() for sample in samples).encode("utf-8", "backslashreplace"))
    return report


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the columns with a value in any row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(row.get(name) not in (None, "") for row in rows)]


def _groups(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the number of groups in each split, and how many of the test groups also occur in training."""
    if not layout.groups:
        return {}
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(row["split"], set()).add(row["group"])
    shared = groups.get("test", set()) & groups.get("train", set())
    return {
        "kind": layout.groups, "shared_by_train_and_test": len(shared),
        **{name: len(groups) for name, groups in groups.items()},
    }  # fmt: skip


def _missing(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts = {name: sum(row.get(name) in (None, "") for row in rows) for name in layout.columns}
    return {name: count for name, count in counts.items() if 0 < count < len(rows)}


def drop_reasons(dropped: Mapping[str, str]) -> dict[str, int]:
    """Returns {reason: number of samples}, most frequent first; names and numbers in the reasons are left out.

    Example:
        >>> drop_reasons({"a": "audio 'a.wav': got no such file.", "b": "audio 'b.wav': got no such file."})
        {'audio ...: got no such file': 2}
    """
    short = (re.sub(r"\d+", "N", re.sub(r"'[^']*'", "...", text)).rstrip(".") for text in dropped.values())
    return dict(Counter(short).most_common())


def no_samples(raw: RawFolder, dropped: Mapping[str, str], who: str) -> DataError:
    """Returns the error for a raw folder without a usable sample."""
    reasons = "; ".join(f"{count} x {reason}" for reason, count in list(drop_reasons(dropped).items())[:3])
    return DataError(
        f"{who} '{raw.root}'", expected="at least one usable sample",
        got=f"none of {len(dropped)} ({reasons})" if dropped else "none", fix=raw.describe(),
    )  # fmt: skip


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() and not isinstance(value, float) else value
