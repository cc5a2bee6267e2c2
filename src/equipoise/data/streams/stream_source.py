"""Opens streams of rows: data sets of Hugging Face ``datasets`` in shards, and their blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataError, require_extra
from ..tables.table_reading import DELIMITERS, EMPTY, FORMATS, check_folder_or_hub, delimiter_of, table_name

if TYPE_CHECKING:
    import datasets
    import pyarrow

SHARDS = 64
"""Largest number of parts in which a saved data set is read; each part has at least ``SHARD_ROWS`` rows."""
SHARD_ROWS = 1_000
BLOCK_ROWS = 1_000
"""Rows of a stream that are read at once."""
HEADS, HEAD_ROWS = 16, 64
"""Shards, and rows of each, that decide the types and kinds of columns."""


class StreamSource:
    """Splits of a stream, as shards that are read separately.

    Args:
        source: csv, tsv, jsonl or parquet file; folder of ``datasets.Dataset.save_to_disk``, or with csv, jsonl or
            parquet shards; name of a data set on the Hugging Face Hub; ``datasets.IterableDataset``,
            ``IterableDatasetDict``, ``Dataset`` or ``DatasetDict``.

    Attributes:
        parts: name of the split -> IterableDataset.
        head: a table with the first rows of up to ``HEADS`` shards of each split, in memory; its features are those of
            the stream.

    Raises:
        DataError: the source does not exist, is damaged, or has no rows.
    """

    def __init__(self, source: Any) -> None:
        with require_extra("stream"):
            import datasets
        self._who = table_name(source)
        self.parts = {str(name): _undecoded(part) for name, part in _parts(source, self._who).items()}
        tables = [table for name in self.parts for table in self._heads(name)]
        if not tables:
            raise DataError(self._who, expected="at least one row", got="none")
        known = next((part.features for part in self.parts.values() if part.features is not None), None)
        self._lenient = any(getattr(part.info, "builder_name", "") == "json" for part in self.parts.values())
        table = self._joined(tables)
        if any(getattr(part.info, "builder_name", "") == "csv" for part in self.parts.values()):
            _require_unique(table.column_names, self._who)
        info = None
        if known is not None:
            features = datasets.Features({name: known[name] for name in known if name in table.column_names})
            table = table.select(list(features)).cast(features.arrow_schema)
            info = datasets.DatasetInfo(features=features)
        self.head = datasets.Dataset(table, info=info)
        self._types = {field.name: field.type for field in self.head.data.schema}

    def _heads(self, name: str) -> Iterator[pyarrow.Table]:
        part = self.parts[name]
        step = max(1, part.num_shards // HEADS)
        for shard in range(0, part.num_shards, step):
            block = next(self._raw(name, shard, HEAD_ROWS), None)
            if block is not None and len(block):
                yield _empty_as_null(block.slice(0, HEAD_ROWS))

    def _joined(self, tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
        import pyarrow as pa

        try:
            # Numbers without a fraction in one shard and with fractions in another are numbers with fractions.
            return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        except pa.ArrowException as error:
            raise DataError(
                self._who, expected="columns of the same types in all shards", got=" ".join(str(error).split())[:200]
            ) from error

    def as_floats(self, columns: Sequence[str]) -> None:
        """Reads columns of whole numbers as floating ones, since a later row may have a fraction or an empty cell."""
        import pyarrow as pa

        for name in columns:
            if pa.types.is_integer(self._types[name]):
                self._types[name] = pa.float64()

    def shards(self, name: str) -> int:
        return self.parts[name].num_shards

    def blocks(self, name: str, shard: int, columns: Sequence[str]) -> Iterator[pyarrow.Table]:
        """Yields the rows of a shard in order, with these columns.

        Raises:
            DataError: damaged data, or a block with other columns or types than the first rows.
        """
        import pyarrow as pa

        where = self._where(name, shard)
        for raw in self._raw(name, shard, BLOCK_ROWS):
            block, parts = _empty_as_null(raw), {}
            for column in columns:
                if column not in block.column_names:
                    if not self._lenient:
                        raise DataError(
                            where,
                            expected=f"a column '{column}', as in the first shard",
                            got=", ".join(block.column_names),
                        )
                    parts[column] = pa.nulls(len(block), self._types[column])
                    continue
                try:
                    parts[column] = block.column(column).cast(self._types[column])
                except pa.ArrowException as error:
                    raise DataError(
                        f"{where}, column '{column}'", expected=f"{self._types[column]}, as in the first rows",
                        got=" ".join(str(error).split())[:160].rstrip("."),
                        fix="Convert the data to parquet with one type for each column.",
                    ) from error  # fmt: skip
            yield pa.table(parts)

    def _where(self, name: str, shard: int) -> str:
        return f"{self._who}, {name + ', ' if name else ''}shard {shard}"

    def _raw(self, name: str, shard: int, rows: int) -> Iterator[pyarrow.Table]:
        part = self.parts[name]
        one = part.shard(part.num_shards, shard) if part.num_shards > 1 else part
        try:
            yield from one.with_format("arrow").iter(batch_size=rows)
        except UnicodeDecodeError as error:
            raise DataError(
                self._where(name, shard), expected="a table in UTF-8", got="other bytes", fix="Save it as UTF-8."
            ) from error
        # The readers of ``datasets`` raise many kinds of errors on damaged files.
        except Exception as error:
            raise DataError(
                self._where(name, shard), expected="readable rows",
                got=" ".join(str(error).split())[:200].rstrip(".") or type(error).__name__,
                fix="Is a file truncated, or a row longer than the header?",
            ) from error  # fmt: skip


def _require_unique(names: Sequence[str], who: str) -> None:
    """Refuses columns that the csv reader of ``datasets`` has renamed, since their names were repeated."""
    for name in names:
        base, point, number = name.rpartition(".")
        if point and number.isdigit() and base in names:
            raise DataError(who, expected="unique column names", got=f"'{base}' and '{name}'",
                            fix="Rename the columns: repeated names of a csv file get a number.")  # fmt: skip


def _undecoded(part: datasets.IterableDataset) -> datasets.IterableDataset:
    """Leaves images, audio and video as files, which the readers of this package check and decode."""
    for name, feature in (part.features or {}).items():
        if type(feature).__name__ in ("Image", "Audio", "Video"):
            part = part.cast_column(name, type(feature)(decode=False))
    return part


def _parts(source: Any, who: str) -> Mapping[str, datasets.IterableDataset]:
    import datasets

    if isinstance(source, (str, Path)):
        source = _open(Path(source), source, who)
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        source = {"": source}
    if not isinstance(source, dict) or not source:
        raise ConfigError(
            "stream", expected="a file, a folder, the name of a data set, or a data set of Hugging Face datasets",
            got=type(source).__name__,
        )  # fmt: skip
    return {name: _iterable(part) for name, part in source.items()}


def _iterable(part: datasets.Dataset | datasets.IterableDataset) -> datasets.IterableDataset:
    import datasets

    if isinstance(part, datasets.IterableDataset):
        return part
    return part.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(part) // SHARD_ROWS)))


def _open(path: Path, source: str | Path, who: str) -> Any:
    import datasets

    check_folder_or_hub(source, who)
    try:
        if path.is_file():
            return _open_file(path, who)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        builder = datasets.load_dataset_builder(str(source))
        if hasattr(builder.config, "fragment_scan_options"):
            builder.config.fragment_scan_options = _parquet_options()  # type: ignore[attr-defined]
        return builder.as_streaming_dataset()
    except DataError:
        raise
    # The readers of ``datasets`` raise many kinds of errors on damaged folders.
    except Exception as error:
        raise DataError(
            who, expected=f"a file ({', '.join(FORMATS)}), a folder or a hub data set that datasets can stream",
            got=" ".join(str(error).split())[:200].rstrip(".") or type(error).__name__,
            fix="Check the name and the connection, or give one file.",
        ) from error  # fmt: skip


def _open_file(path: Path, who: str) -> datasets.IterableDataset:
    import datasets

    suffix = path.suffix.lower()
    kind = "parquet" if suffix == ".parquet" else "csv" if suffix in DELIMITERS else "json"
    options: dict[str, Any] = {}
    if kind == "parquet":
        options = {"fragment_scan_options": _parquet_options()}
    if kind == "csv":
        options = {"sep": delimiter_of(path, DELIMITERS[suffix], who), "na_values": EMPTY, "keep_default_na": False}
    return datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", streaming=True, **options)


def _parquet_options() -> Any:
    """Returns options that do not load a whole parquet file in advance."""
    from pyarrow import dataset

    return dataset.ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)


def _empty_as_null(block: pyarrow.Table) -> pyarrow.Table:
    """Gives columns without any value the type null: the csv reader takes them for numbers."""
    import pyarrow as pa

    for place, name in enumerate(block.column_names):
        if block.column(name).null_count == len(block):
            block = block.set_column(place, name, pa.nulls(len(block)))
    return block
