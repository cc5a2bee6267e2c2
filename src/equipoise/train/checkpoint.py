"""Weights and training states on disk: written whole or not at all, read without running anything in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from ..errors import DataError
from ..files import without_sharing


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, by way of a file beside the target, so that a killed process leaves the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)


def read_state(path: Path) -> dict[str, Any]:
    """A training state, with nothing but tensors and plain values in it.

    Raises:
        DataError: a file that is truncated, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            str(path),
            expected="a whole checkpoint",
            got=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
            fix="Remove it to start this run again.",
        ) from error


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's state as safetensors, written whole or not at all."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(without_sharing(state), partial)
    os.replace(partial, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads what ``save_weights`` wrote into a model built in the same way.

    Raises:
        DataError: a file that is missing, truncated, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise DataError(str(path), expected="a safetensors file of weights", got=str(error)) from error
    except RuntimeError as error:
        raise DataError(
            str(path),
            expected="weights of this model",
            got=" ".join(str(error).split())[:400],
            fix="Build the model with the recipe and the method that lie beside the weights.",
        ) from error
