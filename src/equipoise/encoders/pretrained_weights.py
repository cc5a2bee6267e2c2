"""Loads Hugging Face models: safetensors only, in single precision, without executing remote code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from ..errors import DataError, require_extra


def import_transformers(who: str) -> Any:
    """Returns the transformers package, imported when an encoder is first built with it.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    with require_extra(who):
        import transformers
    return transformers


def load_model(cls: Any, source: str, who: str, *, pooled: bool = False, **options: Any) -> Any:
    """Loads a model with a transformers class.

    Args:
        cls: a class with ``from_pretrained``.
        source: a folder with ``config.json`` and ``model.safetensors``, or a name on the Hub.
        who: first part of the error messages.
        pooled: whether the pooler is used; if not, its weights, which are often not stored, may be missing.
        options: overrides of the configuration.

    Raises:
        DataError: the files are missing, unreadable, of another architecture, or pickled.
    """
    expected = "a folder or a name on the hub with config.json and model.safetensors"
    try:
        # "auto" would load and train half-precision weights in half precision.
        model, info = cls.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            who, expected=expected, got=f"'{source}' ({summarize_error(error)})",
            fix="Save a model there with save_pretrained(folder); pickled weights and code from the hub are not run.",
        ) from error  # fmt: skip
    # Hugging Face would initialize them randomly with a log message only.
    check_missing_weights(model, (name for name in info["missing_keys"] if pooled or "pooler" not in name), source, who)
    return model


def check_missing_weights(model: Any, missing: Iterable[str], source: str, who: str) -> None:
    """Checks that no weights are missing from a file.

    Raises:
        DataError: some are, because the file was written by another architecture.
    """
    names = sorted(missing)
    if names:
        raise DataError(
            who, expected=f"all weights of a {type(model).__name__}", got=f"'{source}', which lacks {names[0]}",
            fix="Give the folder of a model of this architecture.",
        )  # fmt: skip


def summarize_error(error: Exception) -> str:
    """Returns the message of an error on one line, with at most 200 characters."""
    return " ".join(str(error).split())[:200]


def for_channels(kernel: Float[Tensor, "out color height width"], channels: int) -> Float[Tensor, "out c height width"]:
    """Adapts a kernel trained on RGB images to other channels: each channel gets the mean over colors.

    Example:
        >>> for_channels(torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1), 1).flatten()
        tensor([3.])
    """
    if kernel.shape[1] == channels:
        return kernel
    return kernel.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1).contiguous()
