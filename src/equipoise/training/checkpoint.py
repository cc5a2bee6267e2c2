"""Weights and training states on disk: written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError
from ..io.atomic_files import open_atomic, unshare_tensors
from ..io.checksums import checksum
from ..io.typed_values import shorten_repr

CHECKSUM = "equipoise_checksum"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints with a checksum, each written beside the old one before it takes its place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with open_atomic(path) as file:
            held = _Held(file)
            try:
                torch.save({**checkpoint, CHECKSUM: checksum(checkpoint)}, held)  # type: ignore[arg-type]
            except RuntimeError as error:
                # torch tells neither which file it was nor that the disk is full.
                raise held.error or error from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_state_dict(Path(path))


class _Held(io.RawIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, file: Any) -> None:
        self._file, self.error = file, None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise


def read_state_dict(path: Path) -> dict[str, Any]:
    """A training state, with nothing but tensors and plain values in it.

    Raises:
        DataError: a file that is truncated or damaged, or that holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.pop(CHECKSUM) != checksum(state):
            raise ValueError("its checksum does not match its content")
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise DataError(
            str(path), expected="a whole checkpoint", got=f"{type(error).__name__}: {shorten_repr(first)}".rstrip(". "),
            fix="Remove it to start this run again.",
        ) from error  # fmt: skip
    return state


def check_state(model: nn.Module, path: Path) -> None:
    """Checks the weights in a training state before it is resumed.

    Raises:
        DataError: a damaged file, or one without these weights. NonFiniteError: a weight that is NaN or infinite.
    """
    weights = read_state_dict(path).get("state_dict", {})
    for name, parameter in model.named_parameters():
        if not isinstance(weights.get(name), Tensor) or weights[name].shape != parameter.shape:
            raise DataError(
                str(path), expected=f"the weight '{name}' of shape {tuple(parameter.shape)}", got="none or another",
                fix="Remove it to start this run again.",
            )  # fmt: skip
        _check_finite(str(path), name, weights[name])


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's state as safetensors, written whole or not at all."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with open_atomic(path) as file:
        file.write(save(unshare_tensors(state)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads what ``save_weights`` wrote into a model built in the same way.

    Raises:
        DataError: a file that is missing, truncated, or of another model. NonFiniteError: a weight that is NaN or
            infinite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        for name, _ in model.named_parameters():
            if name in state:
                _check_finite(str(path), name, state[name])
        model.load_state_dict(state)
    except (OSError, SafetensorError) as error:
        raise DataError(str(path), expected="a safetensors file of weights", got=shorten_repr(str(error))) from error
    except RuntimeError as error:
        raise DataError(
            str(path),
            expected="weights of this model",
            got=" ".join(str(error).split())[:400],
            fix="Build the model with the recipe and the method that lie beside the weights.",
        ) from error


def _check_finite(who: str, name: str, weight: Tensor) -> None:
    # Buffers may hold NaN for what is not known yet.
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            who, expected="finite weights", got=f"NaN or infinity in '{name}'",
            fix="Train again in a new folder, with a lower train.learning_rate if the training itself diverged.",
        )  # fmt: skip
