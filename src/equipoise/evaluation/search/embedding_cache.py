"""Vectors of a data set beside the weights that made them, so that the second search starts at once."""

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
    folder: Path, weights: Path, source: Any, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The vectors in the folder if they are of these weights and data, else new ones, which are put there.

    A file that is damaged, or of other weights, is made anew; a folder where nothing can be written stays as it is.

    Args:
        folder: of the run.
        weights: file of the model.
        source: data set, with ``items`` and ``pictures``.
        make: what makes the vectors.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    wanted = embedding_fingerprint(weights, source)
    path = folder / NAME
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("made_of") == wanted:
            vectors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if metadata.get("checksum") == checksum(vectors):
                return vectors
    vectors = {name: value.contiguous() for name, value in make().items()}
    with contextlib.suppress(OSError, ConfigError):
        atomic_write(path, save(vectors, {"made_of": wanted, "checksum": checksum(vectors)}))
    return vectors


def embedding_fingerprint(weights: Path, source: Any) -> str:
    """Of everything that the vectors depend on."""
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(torch.as_tensor(source.pictures).numpy().tobytes())
    for item in source.items:
        digest.update("\0".join((item.name, *item.keywords, item.split)).encode())
    return digest.hexdigest()
