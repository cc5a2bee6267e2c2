"""Tokens in the outputs of foreign encoders, and their replacement in outputs of the same form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ShapeError
from ...tokens.token_batch import Tokens


def tokens_of(output: Any, name: str, batch_size: int | None) -> Tokens:
    """Returns the output of an encoder as Tokens.

    Accepted are Tokens; (batch, token, dim); (batch, dim); feature maps (batch, dim, height, width); objects and dicts
    with ``last_hidden_state``; otherwise the first such tensor of a tuple, a list or a dict.

    Raises:
        ShapeError: no such tensor, or another number of samples than the batch.
    """
    if isinstance(output, Tokens):
        return output
    hidden = _hidden(output)
    if hidden is None:
        raise ShapeError(
            f"encoder '{name}'", expected="Tokens, or a float tensor (batch, token, dim) or (batch, dim)",
            got=_description(output), fix="Choose the module that returns the tokens of the modality.",
        )  # fmt: skip
    if batch_size is not None and len(hidden) != batch_size:
        raise ShapeError(
            f"encoder '{name}'", expected=f"tokens with the batch of {batch_size} samples first",
            got=f"shape {tuple(hidden.shape)}", fix="Choose a module that returns (batch, token, dim).",
        )  # fmt: skip
    if hidden.ndim == 2:
        return Tokens(hidden[:, None], cls=True)
    return Tokens(hidden if hidden.ndim == 3 else hidden.flatten(2).mT)


def replace_tokens(output: Any, tokens: Tokens) -> Any:
    """Returns an output of the same form with other tokens; other tensors are zeroed for samples without tokens.

    Masked tokens, and tokens that were removed, are zero.
    """
    if isinstance(output, Tokens):
        return tokens
    hidden = _hidden(output)
    assert hidden is not None
    shape = (
        len(hidden),
        hidden.flatten(2).shape[-1] if hidden.ndim > 3 else (hidden.shape[1] if hidden.ndim == 3 else 1),
    )
    values = tokens.zero_masked().values
    if values.shape[:2] != shape:
        values = values.new_zeros(*shape, values.shape[-1])
    new = values[:, 0] if hidden.ndim == 2 else values if hidden.ndim == 3 else values.mT.reshape(hidden.shape)
    present = tokens.present() if len(tokens) else torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    return _rebuilt(output, hidden, new.to(hidden.dtype), None if len(tokens) and tokens.mask is None else present)


def _hidden(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.ndim in (2, 3, 4) else None
    last = (
        output.get("last_hidden_state") if isinstance(output, Mapping) else getattr(output, "last_hidden_state", None)
    )
    if isinstance(last, Tensor):
        return last
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((hidden for part in parts if (hidden := _hidden(part)) is not None), None)


def _rebuilt(output: Any, old: Tensor, new: Tensor, present: Tensor | None) -> Any:
    if output is old:
        return new
    if isinstance(output, Tensor):
        if present is None or not output.is_floating_point() or output.ndim == 0 or len(output) != len(present):
            return output
        return torch.where(present.view(-1, *[1] * (output.ndim - 1)), output, 0.0)
    if isinstance(output, Mapping):
        parts = {key: _rebuilt(value, old, new, present) for key, value in output.items()}
        return parts if type(output) is dict else type(output)(**parts)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_rebuilt(part, old, new, present) for part in output))
    if isinstance(output, list | tuple):
        return type(output)(_rebuilt(part, old, new, present) for part in output)
    return output


def _description(output: Any) -> str:
    return f"shape {tuple(output.shape)}, {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
