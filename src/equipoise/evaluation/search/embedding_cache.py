"""Caches the embeddings of a data set next to the model's weights, so that later searches start quickly."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...io.atomic_files import atomic_write
from ...io.checksums import checksum

NAME = "search.safetensors"


def cached_embeddings(
    folder: Path, weights: Path, source: Any, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Returns cached embeddings if they match the weights and data; otherwise computes and caches them.

    A damaged or outdated file is replaced; if the folder is not writable, nothing is cached.

    Args:
        folder: folder of the run.
        weights: file of the model's weights.
        source: data set with ``items`` and ``pictures``, or a ``TableGallery``.
        compute: returns the embeddings by name.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    fingerprint = embedding_fingerprint(weights, source)
    path = folder / NAME
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("made_of") == fingerprint:
            vectors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if metadata.get("checksum") == checksum(vectors):
                return vectors
    vectors = {name: value.contiguous() for name, value in compute().items()}
    with contextlib.suppress(OSError, ConfigError):
        atomic_write(path, save(vectors, {"made_of": fingerprint, "checksum": checksum(vectors)}))
    return vectors


def embedding_fingerprint(weights: Path, source: Any) -> str:
    """SHA-256 of everything that the embeddings depend on: weights, images and items, or a table and its files."""
    digest = hashlib.sha256(weights.read_bytes())
    if hasattr(source, "fingerprint"):
        digest.update(source.fingerprint())
        return digest.hexdigest()
    digest.update(torch.as_tensor(source.pictures).numpy().tobytes())
    for item in source.items:
        digest.update("\0".join((item.name, *item.keywords, item.split)).encode())
    return digest.hexdigest()
