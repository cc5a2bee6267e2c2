"""Chooses the reader of a modality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .column_kinds import Modality
from .file_readers import ArrayReader, AudioReader, FramesReader, ImageReader, SequenceReader, VectorReader
from .modality_readers import ModalityReader
from .value_readers import TableReader, TextReader

if TYPE_CHECKING:
    import datasets

READERS: Mapping[str, type[ModalityReader]] = {
    "audio": AudioReader,
    "image": ImageReader,
    "video": FramesReader,
    "frames": FramesReader,
    "text": TextReader,
    "vector": VectorReader,
    "sequence": SequenceReader,
    "array": ArrayReader,
    "number": TableReader,
    "category": TableReader,
    "table": TableReader,
}


def make_reader(name: str, modality: Modality, table: datasets.Dataset, root: Path) -> ModalityReader:
    """Returns the reader of a modality."""
    several = modality.kind == "vector" and len(modality.columns) > 1
    return (TableReader if several else READERS[modality.kind])(name, modality, table, root)
