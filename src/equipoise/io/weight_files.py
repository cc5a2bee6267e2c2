"""Weights of a model as safetensors: written atomically, checked when they are loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError
from .atomic_files import open_atomic, unshare_tensors
from .typed_values import shorten_repr


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the state dict of the model as safetensors, atomically."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with open_atomic(path) as file:
        file.write(save(unshare_tensors(state)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads weights written by ``save_weights`` into a model of the same architecture.

    Raises:
        DataError: the file is missing, truncated, or of another model. NonFiniteError: a weight is NaN or infinite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        for name, _ in model.named_parameters():
            if name in state:
                check_finite(str(path), name, state[name])
        model.load_state_dict(state)
    except (OSError, SafetensorError) as error:
        raise DataError(str(path), expected="a safetensors file of weights", got=shorten_repr(str(error))) from error
    except RuntimeError as error:
        raise DataError(
            str(path),
            expected="weights of this model",
            got=" ".join(str(error).split())[:400],
            fix="Build the model with the recipe and the method next to the weights.",
        ) from error


def check_finite(who: str, name: str, weight: Tensor) -> None:
    """Raises NonFiniteError for a weight that is NaN or infinite."""
    # Only parameters: buffers may contain NaN for unknown values.
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            who, expected="finite weights", got=f"NaN or infinity in '{name}'",
            fix="Train again in a new folder, with a lower train.learning_rate if the training itself diverged.",
        )  # fmt: skip
