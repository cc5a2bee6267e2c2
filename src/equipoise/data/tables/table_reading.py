"""Reads tables: csv, tsv, jsonl and parquet files, and data sets of Hugging Face ``datasets``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataError, require_extra

if TYPE_CHECKING:
    import datasets
    import pandas
    import pyarrow

DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": ","}
FORMATS = (*DELIMITERS, ".jsonl", ".ndjson", ".json", ".parquet")
LARGE = 2**28
"""Bytes from which a text file is converted to a memory-mapped Arrow file in the cache of ``datasets``."""
SPLIT = "split"
"""Name of the column with the split names of a ``DatasetDict``."""


def read_table(source: str | Path | datasets.Dataset | datasets.DatasetDict | pandas.DataFrame) -> datasets.Dataset:
    """Reads a table with one row per sample.

    Args:
        source: a csv, tsv, jsonl or parquet file; a folder written by ``datasets.Dataset.save_to_disk``, or one with
            data files that ``datasets.load_dataset`` reads; the name of a data set on the Hugging Face Hub; a
            ``datasets.Dataset`` or ``pandas.DataFrame``. The splits of a ``DatasetDict`` become the column "split".

    Raises:
        DataError: the file does not exist, is empty, damaged or of another format.
    """
    with require_extra("Manifest"):
        import datasets
        import pandas as pd
    if isinstance(source, datasets.Dataset):
        table = source
    elif isinstance(source, datasets.DatasetDict):
        table = _concatenate(source)
    elif isinstance(source, pd.DataFrame):
        table = datasets.Dataset.from_pandas(source, preserve_index=False)
    elif isinstance(source, (str, Path)):
        table = _read_path(source)
    else:
        raise ConfigError(
            "Manifest", expected="a file, a folder, the name of a data set, a datasets.Dataset or a pandas.DataFrame",
            got=type(source).__name__,
        )  # fmt: skip
    if not len(table):
        raise DataError(table_name(source), expected="at least one row", got="none")
    # Columns are also read from the Arrow table, which has the order of the rows only without an index mapping.
    return table.flatten_indices() if table._indices is not None else table


def table_name(source: Any) -> str:
    """Returns the start of error messages about a table."""
    return f"table '{source}'" if isinstance(source, (str, Path)) else "table"


def _read_path(source: str | Path) -> datasets.Dataset:
    path, who = Path(source), table_name(source)
    check_folder_or_hub(source, who)
    if path.is_dir():
        return _read_folder(path, who)
    return _read_file(path, path.suffix.lower(), who) if path.is_file() else _read_hub(str(source), who)


def check_folder_or_hub(source: str | Path, who: str) -> None:
    """Checks that a table is a folder, a file of a known format that is not empty, or may be a name on the hub.

    Raises:
        DataError: none of them.
    """
    path = Path(source)
    if path.is_dir():
        return
    if path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise DataError(who, expected=f"a file that ends with {', '.join(FORMATS)}", got=f"'{path.suffix}'",
                            fix="Rename it, or convert it to csv.")  # fmt: skip
        if not path.stat().st_size:
            raise DataError(who, expected="a table with a header", got="an empty file")
        return
    if path.exists():
        raise DataError(who, expected="a file or folder", got="a device or pipe")
    hub = isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix.lower() not in FORMATS
    if not hub:
        raise DataError(
            who, expected="an existing file or folder", got="none",
            fix="If the file was moved, give its new location with --data.",
        )  # fmt: skip


def _read_file(path: Path, suffix: str, who: str) -> datasets.Dataset:
    import datasets
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            if path.stat().st_size <= LARGE:
                return datasets.Dataset(pq.read_table(path))
            return _converted("parquet", path)
        if suffix in DELIMITERS:
            delimiter = delimiter_of(path, DELIMITERS[suffix], who)
            if path.stat().st_size > LARGE:
                return _converted("csv", path, sep=delimiter)
            return datasets.Dataset(_checked(_read_csv(path, delimiter), who))
        if path.stat().st_size > LARGE:
            return _converted("json", path)
        import pyarrow.json as pj

        return datasets.Dataset(pj.read_json(path))
    except (pa.ArrowException, DatasetsError, ValueError, UnicodeError) as error:
        if isinstance(error, DataError):
            raise
        got = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            who, expected=f"a complete {suffix[1:]} table in UTF-8", got=got.rstrip("."),
            fix="Is the file truncated? jsonl has one JSON object per line." if "json" in suffix else
            "Is the file truncated, or a row longer than the header?",
        ) from error  # fmt: skip


def _read_csv(path: Path, delimiter: str) -> pyarrow.Table:
    from pyarrow import csv

    return csv.read_csv(
        path,
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            strings_can_be_null=True, quoted_strings_can_be_null=True, null_values=EMPTY
        ),
    )


def _checked(table: pyarrow.Table, who: str) -> pyarrow.Table:
    """Refuses repeated column names and text that is not UTF-8, which Arrow reads as bytes."""
    names = table.column_names
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(who, expected="unique column names", got=f"'{repeated[0]}' {names.count(repeated[0])} times")
    if binary := [field.name for field in table.schema if str(field.type) == "binary"]:
        raise DataError(
            who, expected="a table in UTF-8", got=f"other bytes in the column '{binary[0]}'",
            fix="Save it as UTF-8.",
        )  # fmt: skip
    return table


EMPTY = ["", "NA", "N/A", "n/a", "nan", "NaN", "NULL", "null", "#N/A"]
"""Cells that count as missing."""


def delimiter_of(path: Path, usual: str, who: str) -> str:
    """Returns the delimiter of a text table."""
    with open(path, "rb") as file:
        header = file.readline(1_000_000)
    if b"\0" in header:
        raise DataError(who, expected="a text file", got="a binary file")
    text = header.decode("utf-8", "replace")
    return next((one for one in (usual, ";", "\t") if one in text), usual)


def _converted(kind: str, path: Path, **options: Any) -> datasets.Dataset:
    import datasets

    return datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", **options)


def _read_folder(path: Path, who: str) -> datasets.Dataset:
    import datasets

    try:
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        dataset = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    # The readers of ``datasets`` raise many kinds of errors on damaged folders.
    except Exception as error:
        raise DataError(
            who, expected="a folder that datasets.load_from_disk or datasets.load_dataset reads",
            got=" ".join(str(error).split())[:200].rstrip(".") or type(error).__name__,
            fix="Give the file of the table, such as 'folder/metadata.csv'.",
        ) from error  # fmt: skip
    return _concatenate(dataset) if isinstance(dataset, dict) else dataset


def _read_hub(name: str, who: str) -> datasets.Dataset:
    import datasets

    try:
        return _concatenate(datasets.load_dataset(name))
    except Exception as error:
        raise DataError(
            who, expected="an existing file or folder, or a data set on the Hugging Face Hub",
            got=" ".join(str(error).split())[:200].rstrip(".") or type(error).__name__,
            fix="Check the name and the connection; a local copy can be given as a folder.",
        ) from error  # fmt: skip


def _concatenate(splits: datasets.DatasetDict) -> datasets.Dataset:
    import datasets

    if len(splits) == 1:
        return next(iter(splits.values()))
    parts = []
    for name, part in splits.items():
        labels = datasets.Dataset.from_dict({SPLIT: [str(name)] * len(part)})
        columns = part.remove_columns([SPLIT]) if SPLIT in part.column_names else part
        parts.append(datasets.concatenate_datasets([columns, labels], axis=1))
    return datasets.concatenate_datasets(parts)
