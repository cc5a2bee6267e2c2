"""Checkpoints and weights: written atomically, loaded without executing code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from ..errors import DataError
from ..io.atomic_files import open_atomic
from ..io.checksums import checksum
from ..io.typed_values import shorten_repr
from ..io.weight_files import check_finite
from ..io.weight_files import load_weights as load_weights
from ..io.weight_files import save_weights as save_weights

CHECKSUM = "equipoise_checksum"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning checkpoint IO with a checksum and atomic replacement of the previous file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with open_atomic(path) as file:
            wrapper = _ErrorStoringFile(file)
            try:
                torch.save({**checkpoint, CHECKSUM: checksum(checkpoint)}, wrapper)  # type: ignore[arg-type]
            except RuntimeError as error:
                # The error of torch mentions neither the file nor a full disk.
                raise wrapper.error or error from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_state_dict(Path(path))


class _ErrorStoringFile(io.RawIOBase):
    """File wrapper that stores the error of a failed write."""

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
    """Loads a checkpoint that contains only tensors and plain values.

    Raises:
        DataError: the file is truncated or damaged, or contains other objects.
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
    """Checks the weights in a checkpoint before training resumes.

    Raises:
        DataError: the file is damaged or lacks weights of the model. NonFiniteError: a weight is NaN or infinite.
    """
    weights = read_state_dict(path).get("state_dict", {})
    for name, parameter in model.named_parameters():
        if not isinstance(weights.get(name), Tensor) or weights[name].shape != parameter.shape:
            raise DataError(
                str(path), expected=f"the weight '{name}' of shape {tuple(parameter.shape)}", got="none or another",
                fix="Remove it to start this run again.",
            )  # fmt: skip
        check_finite(str(path), name, weights[name])


def next_batch(path: Path) -> tuple[int, int]:
    """Returns the epoch in which a checkpoint continues, and the number of its batches that are already used."""
    loop = read_state_dict(path)["loops"]["fit_loop"]
    epoch, batch = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]["current"]
    unfinished = epoch["ready"] > epoch["processed"]
    return int(epoch["processed"]), int(batch["ready"]) if unfinished else 0
