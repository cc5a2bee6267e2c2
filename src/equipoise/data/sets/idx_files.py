"""Reads the IDX format that MNIST is published in."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ...errors import DataError

_BYTES = 0x08


def read_idx(path: Path, ndim: int) -> Tensor:
    """The array of unsigned bytes that a gzipped IDX file holds.

    Layout: two zero bytes, the type (8 = unsigned byte), the number of dimensions, each size as a big-endian 32-bit
    integer, then the values.

    Args:
        path: of the .gz file.
        ndim: how many dimensions the array must have.

    Returns:
        The array as torch.uint8.

    Raises:
        DataError: a missing, damaged or truncated file, or one that holds something else.
    """
    who = str(path)
    if not path.is_file():
        raise DataError(who, expected="a gzipped IDX file", got="no such file")
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(who, expected="a whole gzip file", got=f"{error}", fix="Fetch the file again.") from error
    magic = bytes([0, 0, _BYTES, ndim])
    if content[:4] != magic:
        raise DataError(
            who, expected=f"the IDX magic number {magic.hex()}: unsigned bytes in {ndim} dimensions",
            got=content[:4].hex() or "an empty file",
        )  # fmt: skip
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(who, expected=f"a header of {start} bytes", got=f"{len(content)} bytes")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise DataError(
            who, expected=f"{math.prod(shape)} values for the shape {tuple(shape)}", got=f"{len(content) - start}",
            fix="The file is truncated or was changed: fetch it again.",
        )  # fmt: skip
    # A bytearray, because torch wants memory that may be written to.
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)
