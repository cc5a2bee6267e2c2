"""Masks: which are accepted, and how what they hide is kept out of values and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ShapeError

FIX = "True = takes part: a 0/1 mask is mask.bool(), an additive mask (0 and -inf) is mask == 0."


def bool_mask(
    mask: object, who: str, expected: str, *, shape: tuple[int, ...] | None = None, numbers: bool = False,
    fix: str = FIX,
) -> Bool[Tensor, ...]:  # fmt: skip
    """Returns a mask as booleans, or raises.

    Args:
        mask: boolean; with ``numbers`` also integers or floating numbers that are all 0 or 1. An additive mask (0 and
            -inf, or any negative number) is never accepted. A floating mask of zeros alone could be either, "nothing
            takes part" as a 0/1 mask and "everything" as an additive one, and is refused too.
        who: the function and argument that the error names.
        expected: what the error says was expected.
        shape: the shape the mask must have; None checks the type alone.
        numbers: see ``mask``. Values are read for it, for which an accelerator has to be waited for.
        fix: the last sentence of the error.

    Raises:
        ShapeError: another type, shape or value.

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
    """Zeros where the mask is False, so that nothing there, NaN included, reaches an output or a gradient.

    It has to come before any arithmetic: 0 times NaN is NaN, in backward passes too.

    Example:
        >>> zero_masked(torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False])).flatten()
        tensor([1., 0.])
    """
    return values if mask is None else values.masked_fill(~mask.to(values.device)[..., None], 0.0)


def without_masked(value: object, mask: Tensor | None, *, tokens_too: bool) -> object:
    """An encoder's input with zeros where the mask hides it; inputs by name keep their whole numbers."""
    if mask is None:
        return value
    if isinstance(value, Mapping):
        floating = {key: x for key, x in value.items() if isinstance(x, Tensor) and x.is_floating_point()}
        return {**value, **{key: without_masked(x, mask, tokens_too=tokens_too) for key, x in floating.items()}}
    # What does not fit is an error that is raised once the encoder has said how many tokens there are.
    if not isinstance(value, Tensor) or value.ndim == 0 or mask.ndim not in (1, 2) or len(mask) != len(value):
        return value
    whole = mask if mask.ndim == 1 else mask.any(dim=1)
    # Of four sizes the second is that of channels, unless the encoder takes masks of what it reads. Whole numbers under
    # such a mask are the encoder's own padding.
    by_token = mask.shape == value.shape[:2] and (value.is_floating_point() if tokens_too else value.ndim != 4)
    hidden = ~(mask if by_token else whole).to(value.device)
    return value.masked_fill(hidden.reshape(*hidden.shape, *[1] * (value.ndim - hidden.ndim)), 0)


def finite_masked(
    values: Float[Tensor, "*place feature"], mask: Bool[Tensor, "*place"] | None
) -> Float[Tensor, "*place feature"]:
    """``zero_masked`` of NaN and infinity alone, for layers that also return what they make of masked places."""
    if mask is None:
        return values
    return values.masked_fill(~mask.to(values.device)[..., None] & ~values.isfinite(), 0.0)


def zero_loss(tensors: Iterable[Tensor]) -> Float[Tensor, ""]:
    """An exact 0 that depends on all the tensors with gradient 0, whatever they hold; in float32 or better.

    A loss of which no term is left returns it. Unlike ``sum * 0`` it is 0 where values are NaN or infinite, and unlike
    a constant it lets ``backward`` run and reaches every parameter, as processes that share gradients need.
    """
    return torch.stack([at_least_float32(tensor).reshape(-1)[:0].sum() for tensor in tensors]).sum()


def at_least_float32(x: Tensor) -> Tensor:
    """In float32 or better, where half precision would round statistics."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves what is computed on the device of ``x`` as precise as it is."""
    return torch.autocast(x.device.type, enabled=False)
