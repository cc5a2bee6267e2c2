"""Masks: validation, and removal of masked values from results and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ShapeError

FIX = "True = valid: a 0/1 mask is mask.bool(), an additive mask (0 and -inf) is mask == 0."


def bool_mask(
    mask: object, who: str, expected: str, *, shape: tuple[int, ...] | None = None, numbers: bool = False,
    fix: str = FIX,
) -> Bool[Tensor, ...]:  # fmt: skip
    """Validates a mask and returns it as a boolean tensor.

    Args:
        mask: boolean; with ``numbers`` also integers or floating numbers that are all 0 or 1. An additive mask (0 and
            -inf, or any negative number) is never accepted. A floating mask of zeros alone could be either, "nothing
            valid" as a 0/1 mask and "everything" as an additive one, and is rejected too.
        who: the function and argument that the error names.
        expected: description of a valid mask for the error message.
        shape: the required shape; None checks the type only.
        numbers: see ``mask``. Requires a GPU sync.
        fix: last sentence of the error message.

    Raises:
        ShapeError: the type, shape or a value is invalid.

    Example:
        >>> bool_mask(torch.tensor([1, 0]), "mask", "a 0/1 mask", numbers=True)
        tensor([ True, False])
    """
    if not isinstance(mask, Tensor):
        raise ShapeError(who, expected=expected, got=type(mask).__name__, fix=fix)
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ShapeError(who, expected=expected, got=f"shape {tuple(mask.shape)}, {mask.dtype}", fix=fix)
    if mask.dtype == torch.bool:
        return mask
    if not numbers or mask.is_complex():
        raise ShapeError(who, expected=expected, got=f"{mask.dtype}", fix=fix)
    ones = mask == 1
    if not bool((ones | (mask == 0)).all()):
        low, high = mask.amin(), mask.amax()
        raise ShapeError(who, expected=expected, got=f"numbers from {low:g} to {high:g}", fix=fix)
    if mask.is_floating_point() and mask.numel() and not bool(ones.any()):
        raise ShapeError(
            who, expected=expected, got="floating zeros alone, which may be a 0/1 mask or an additive one", fix=fix
        )
    return ones


def zero_masked(
    values: Float[Tensor, "*place feature"], mask: Bool[Tensor, "*place"] | None
) -> Float[Tensor, "*place feature"]:
    """Sets masked values to zero, so that they affect no output or gradient, even if they are NaN.

    It must be applied before any arithmetic: 0 * NaN is NaN, in backward passes too.

    Example:
        >>> zero_masked(torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False])).flatten()
        tensor([1., 0.])
    """
    return values if mask is None else values.masked_fill(~mask.to(values.device)[..., None], 0.0)


def without_masked(value: object, mask: Tensor | None, *, tokens_too: bool) -> object:
    """Sets masked parts of an encoder's input to zero; in a mapping, integer tensors are unchanged."""
    if mask is None:
        return value
    if isinstance(value, Mapping):
        floating = {key: x for key, x in value.items() if isinstance(x, Tensor) and x.is_floating_point()}
        return {**value, **{key: without_masked(x, mask, tokens_too=tokens_too) for key, x in floating.items()}}
    # Masks of a wrong size raise an error later, when the number of tokens is known.
    if not isinstance(value, Tensor) or value.ndim == 0 or mask.ndim not in (1, 2) or len(mask) != len(value):
        return value
    has_valid = mask if mask.ndim == 1 else mask.any(dim=1)
    # Dimension 1 of a 4-D tensor is the channels, unless the encoder accepts masks of its inputs. Integers under
    # such a mask are the padding of the encoder.
    by_token = mask.shape == value.shape[:2] and (value.is_floating_point() if tokens_too else value.ndim != 4)
    hidden = ~(mask if by_token else has_valid).to(value.device)
    return value.masked_fill(hidden.reshape(*hidden.shape, *[1] * (value.ndim - hidden.ndim)), 0)


def finite_masked(
    values: Float[Tensor, "*place feature"], mask: Bool[Tensor, "*place"] | None
) -> Float[Tensor, "*place feature"]:
    """Sets masked NaN and infinite values to zero, for layers whose outputs at masked positions are also returned."""
    if mask is None:
        return values
    return values.masked_fill(~mask.to(values.device)[..., None] & ~values.isfinite(), 0.0)


def zero_loss(tensors: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Returns an exact 0 that depends on all tensors with gradient 0; in float32 or higher precision.

    Used as the value of a loss without terms. Unlike ``sum * 0`` it is 0 for NaN and infinite values, and unlike a
    constant it supports ``backward`` and reaches every parameter, as distributed training requires.
    """
    return torch.stack([at_least_float32(tensor).reshape(-1)[:0].sum() for tensor in tensors]).sum()


def at_least_float32(x: Tensor) -> Tensor:
    """Converts to float32 or higher precision, since half precision would round statistics."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> torch.autocast:
    """Returns a context that disables autocast on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)
