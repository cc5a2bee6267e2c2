"""Reads the IDX format of MNIST."""

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
    """Reads the array of unsigned bytes in a gzipped IDX file.

    Layout: two zero bytes, the type (8 = unsigned byte), the number of dimensions, each size as a big-endian 32-bit
    integer, then the values.

    Args:
        path: a .gz file.
        ndim: number of dimensions.

    Returns:
        The array as torch.uint8.

    Raises:
        DataError: the file is missing, damaged, truncated, or has another type or number of dimensions.
    """
    who = str(path)
    if not path.is_file():
        raise DataError(who, expected="a gzipped IDX file", got="no such file")
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(who, expected="a complete gzip file", got=f"{error}", fix="Fetch the file again.") from error
    magic = bytes([0, 0, _BYTES, ndim])
    if content[:4] != magic:
        raise DataError(
            who, expected=f"the IDX magic number {magic.hex()}: unsigned bytes in {ndim} dimensions",
            got=content[:4].hex() or "an empty file",
        )  # fmt: skip
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(who, expected=f"a header of {header} bytes", got=f"{len(content)} bytes")
    shape = [int.from_bytes(content[offset : offset + 4], "big") for offset in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise DataError(
            who, expected=f"{math.prod(shape)} values for the shape {tuple(shape)}", got=f"{len(content) - header}",
            fix="The file is truncated or modified: fetch it again.",
        )  # fmt: skip
    # frombuffer needs writable memory.
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)
