"""Hugging Face models as they are read from disk: safetensors only, in single precision, without foreign code."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from ..errors import DataError
from ..optional_packages import require_extra


def import_transformers(who: str) -> Any:
    """Returns the transformers package, imported when an encoder is first built with it.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    with require_extra(who):
        import transformers
    return transformers


def load_model(cls: Any, source: str, who: str, *, pooled: bool = False, **options: Any) -> Any:
    """A model of a class of transformers.

    Args:
        cls: has ``from_pretrained``.
        source: a folder with ``config.json`` and ``model.safetensors``, or a name on the hub.
        who: begins the error's message.
        pooled: what the model pools is read; otherwise a pooler, which is often not stored, may be missing.
        options: changes of the configuration.

    Raises:
        DataError: nothing there, nothing readable, weights of another network, or in a file that could run code.
    """
    expected = "a folder or a name on the hub with config.json and model.safetensors"
    try:
        # "auto" would keep half precision where the file has it, and train in it.
        model, found = cls.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            who, expected=expected, got=f"'{source}' ({' '.join(str(error).split())[:200]})",
            fix="Save a model there with save_pretrained(folder); pickled weights and code from the hub are not run.",
        ) from error  # fmt: skip
    # Hugging Face would leave them random, and say so in a log.
    missing = sorted(name for name in found["missing_keys"] if pooled or "pooler" not in name)
    if missing:
        raise DataError(
            who, expected=f"{expected} of a {type(model).__name__}", got=f"'{source}', which lacks {missing[0]}",
            fix="Give the folder of a model of this kind.",
        )  # fmt: skip
    return model


def for_channels(kernel: Float[Tensor, "out color height width"], channels: int) -> Float[Tensor, "out c height width"]:
    """A kernel that was trained on colors, for pictures of other channels: each gets the mean over colors.

    Example:
        >>> for_channels(torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1), 1).flatten()
        tensor([3.])
    """
    if kernel.shape[1] == channels:
        return kernel
    return kernel.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1).contiguous()
