"""Tables with one fault each, and the messages about them as a table and as a stream."""

from pathlib import Path

import numpy as np
import pandas as pd


def write_table(folder: Path, rows: int = 30, **columns) -> Path:
    content = {
        "x_0": np.arange(rows) / 7,
        "x_1": np.arange(rows) % 3,
        "label": ["a", "b", "c"] * (rows // 3),
        **columns,
    }
    path = folder / "table.csv"
    pd.DataFrame(content).to_csv(path, index=False)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


BAD = {
    "missing file": (lambda folder: folder / "none.csv", {}, "expected an existing file or folder, got none"),
    "empty file": (lambda folder: write(folder / "t.csv", ""), {}, "expected a table with a header, got an empty file"),
    "header only": (lambda folder: write(folder / "t.csv", "a,label\n"), {}, "expected at least one row"),
    "unknown format": (lambda folder: write(folder / "t.xlsx", "a"), {}, r"a file that ends with \.csv.*got '\.xlsx'"),
    "binary file": (lambda folder: write(folder / "t.csv", b"\0\1\2\n"), {}, "expected a text file, got a binary file"),
    "not UTF-8": (lambda folder: write(folder / "t.csv", b"a,label\n\xff\xfe,x\n"), {}, "table in UTF-8"),
    "long row": (
        lambda folder: write(folder / "t.csv", "a,label\n1,x\n1,2,x\n"),
        {},
        "a complete csv table.*got.*column",
    ),
    "repeated column": (lambda folder: write(folder / "t.csv", "a,a,label\n1,2,x\n"), {}, "unique column names"),
    "truncated jsonl": (
        lambda folder: write(folder / "t.jsonl", '{"a": 1, "label": "x"}\n{"a": '),
        {},
        "complete jsonl table",
    ),
    "truncated parquet": (lambda folder: write(folder / "t.parquet", b"PAR1abc"), {}, "complete parquet table"),
    "unknown target": (write_table, {"target": "lable"}, "expected a known column, got 'lable'. Did you mean 'label'"),
    "unknown group": (write_table, {"group": "who"}, "expected a known column, got 'who'"),
    "target as group": (write_table, {"group": "label"}, "different columns for target, group, split and weight"),
    "one class": (lambda folder: write_table(folder, label=["a"] * 30), {}, "expected 2 to 1,000 classes, got 1"),
    "empty target": (
        lambda folder: write_table(folder, label=["a", None] * 15),
        {},
        "expected a value in every row, got 15 empty",
    ),
    "infinite target": (
        lambda folder: write_table(folder, label=[0.5, np.inf] * 15),
        {},
        r"expected finite numbers, got infinity in "
        r"row 1|integer",
    ),
    "text as numbers": (write_table, {"task": "regression"}, "expected numbers, got 'a' in row 0"),
    "unknown task": (write_table, {"task": "ranking"}, "expected a known task, got 'ranking'"),
    "negative weight": (
        lambda folder: write_table(folder, w=[-1.0] * 30),
        {"weight": "w"},
        "expected finite weights >= 0",
    ),
    "infinite cell": (
        lambda folder: write_table(folder, x_0=[np.inf] * 30),
        {},
        "expected finite numbers, got infinity in row",
    ),
    "no input": (lambda folder: write(folder / "t.csv", "id,label\nq,a\nr,b\n"), {}, "at least one column of inputs"),
    "two rows": (lambda folder: write(folder / "t.csv", "x,label\n1.5,a\n2.5,b\n"), {}, "at least 3 rows"),
    "two groups": (lambda folder: write_table(folder, g=["a", "b"] * 15), {"group": "g"}, "at least 3 groups"),
    "two folds": (write_table, {"folds": 2}, "expected folds >= 3"),
    "fold too large": (write_table, {"fold": 7}, "0 <= fold < folds"),
    "fold no number": (write_table, {"fold": "A"}, "expected a fold from 0 to folds - 1, got fold = 'A'"),
    "no root": (write_table, {"root": "/nonexistent"}, "Manifest root: expected a folder"),
    "unknown split": (lambda folder: write_table(folder, split=["a"] * 30), {}, "train, val or test in every row"),
    "no training rows": (
        lambda folder: write_table(folder, split=["test"] * 30),
        {},
        "expected rows of the split train, got none",
    ),
    "too many categories": (
        lambda folder: write_table(folder, rows=2_100, c=[f"c{i % 1_900}" for i in range(2_100)]),
        {"kinds": {"c": "category"}},
        "expected at most 1000 categories",
    ),
    "unknown option": (
        write_table,
        {"kinds": {"x_0": {"kind": "text", "size": 3}}},
        "expected a known option of text, got 'size'",
    ),
    "only empty files": (
        lambda folder: write_table(folder, wav=[None] * 30),
        {"kinds": {"wav": "audio"}},
        "training rows with audio, got empty cells",
    ),
    "missing files": (
        lambda folder: write_table(folder, wav=["gone.wav"] * 30),
        {},
        "training rows with audio, got.*no such file",
    ),
}
"""Fault -> function that writes the table, options of the data set, message."""
STREAMED = {
    "not UTF-8": "expected a table in UTF-8, got other bytes",
    "long row": "shard 0: expected readable rows, got.*Expected 2 fields in line 3, saw 3",
    "repeated column": r"expected unique column names, got 'a' and 'a\.1'",
    "truncated jsonl": "shard 0: expected readable rows, got JSON parse error",
    "truncated parquet": "that datasets can stream, got.*smaller than the minimum file footer",
    "target as group": "different columns for target, group and split",
    "negative weight": "expected no weight, which needs all rows at once",
    "two rows": "expected rows in train, val and test, got none in train of 2 rows",
    "two groups": "expected rows in train, val and test, got none in val of 30 rows",
    "no training rows": "expected rows in train, val and test, got none in train of 30 rows",
}
"""Fault -> message about the table as a stream, where it differs."""
