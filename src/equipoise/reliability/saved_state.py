"""Writes and reads the state of a fitted wrapper as a safetensors file."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..errors import DataError
from ..io.atomic_files import open_atomic, unshare_tensors


def write_state(module: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes all tensors of a module, atomically."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with open_atomic(path) as file:
        file.write(save(unshare_tensors(state)))
    return Path(path)


def read_state(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a file of ``write_state``.

    Raises:
        DataError: the file is missing or damaged, or belongs to another module.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(
            str(path), expected="a file of Reliability.save for this model", got=" ".join(str(error).split())[:400],
            fix="Build the model with the architecture of the saved one.",
        ) from error  # fmt: skip
