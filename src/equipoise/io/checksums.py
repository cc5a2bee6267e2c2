"""Checksums that detect files which were damaged or changed after they were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemaError
from .atomic_files import to_jsonable


def add_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content with a checksum, which ``verify_checksum`` uses to detect changes."""
    return {**content, "checksum": _text_checksum(content)}


def verify_checksum(content: Mapping[str, Any], who: str, fix: str) -> dict[str, Any]:
    """Verifies and removes the checksum; content without a checksum is returned unchanged.

    Raises:
        SchemaError: the content was changed after it was written.
    """
    rest = {name: value for name, value in content.items() if name != "checksum"}
    if "checksum" in content and content["checksum"] != _text_checksum(rest):
        raise SchemaError(who, expected="unmodified content", got="content that does not match its checksum", fix=fix)
    return rest


def digest_of(values: Tensor) -> str:
    """Computes the SHA-256 hash of the values of a tensor, in float64.

    Example:
        >>> digest_of(torch.tensor([1, 2])) == digest_of(torch.tensor([1.0, 2.0]))
        True
    """
    return hashlib.sha256(values.detach().cpu().double().numpy().tobytes()).hexdigest()


def digest(path: Path) -> str:
    """Computes the SHA-256 hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(state: Any) -> str:
    """Computes the SHA-256 hash of all names, values and tensors of a nested state."""
    digest = hashlib.sha256()
    _add(digest, state)
    return digest.hexdigest()


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        values = part.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        if values.numel():
            digest.update(values.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        digest.update(f"mapping {len(part)}".encode())
        for key, value in part.items():
            digest.update(repr(key).encode())
            _add(digest, value)
    elif isinstance(part, (list, tuple)):
        digest.update(f"list {len(part)}".encode())
        for value in part:
            _add(digest, value)
    else:
        digest.update(repr(part).encode("utf-8", "backslashreplace"))


def _text_checksum(content: Mapping[str, Any]) -> str:
    # NaN and infinity are written as null.
    return hashlib.sha256(json.dumps(to_jsonable(content), sort_keys=True).encode()).hexdigest()
