"""Checks the inputs of the functional diagnostics: hidden states and attention of layers, labels and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ShapeError
from ..tokens.token_batch import SPECIAL

Layers = Tensor | Sequence[Tensor]
"""The tensor of one layer, or one tensor for each layer."""


def hidden_of(hidden: Layers, who: str) -> list[Float[Tensor, "batch token dim"]]:
    """The hidden states of each layer, detached, in at least float32."""
    return _layers(hidden, "(batch, token, dim)", f"{who} hidden", shared=2)


def attention_of(attention: Layers, who: str) -> list[Float[Tensor, "batch head query key"]]:
    """The attention of each layer, detached, in at least float32."""
    return _layers(attention, "(batch, head, query, key)", f"{who} attention", shared=4)


def labels_of(
    modality: Int[Tensor, "... token"], num_modalities: int | None, batch: int, tokens: int, who: str
) -> tuple[Int[Tensor, "batch token"], int]:
    """Labels of each sample, and the number of modalities, by default the highest label + 1."""
    tensor = isinstance(modality, Tensor)
    whole_numbers = tensor and not (modality.is_floating_point() or modality.dtype == torch.bool)
    if not whole_numbers or modality.shape not in ((tokens,), (batch, tokens)):
        raise ShapeError(
            f"{who} modality",
            expected=f"integer labels of shape (token,) = {(tokens,)} or (batch, token) = {(batch, tokens)}",
            got=f"shape {tuple(modality.shape)}, {modality.dtype}" if tensor else type(modality).__name__,
            fix="Give one label for each token, including special tokens.",
        )
    low, high = int(modality.min()), int(modality.max())
    count = high + 1 if num_modalities is None else num_modalities
    if low < SPECIAL or high >= count:
        raise ShapeError(
            f"{who} modality",
            expected=f"labels from -1 to num_modalities - 1 = {count - 1}",
            got=f"labels from {low} to {high}",
            fix="Special tokens and padding have label -1.",
        )
    return modality.expand(batch, -1), count


def token_mask(mask: Tensor | None, like: Tensor, who: str) -> Bool[Tensor, "batch token"]:
    """Mask of the valid tokens of (batch, token, ...); all True without a mask."""
    if mask is None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    if mask.shape != like.shape[:2] or mask.dtype != torch.bool:
        raise _mask_error(mask, f"shape (batch, token) = {tuple(like.shape[:2])}", who)
    return mask.to(like.device)


def key_mask(mask: Tensor | None, like: Tensor, who: str) -> Bool[Tensor, "batch query key"]:
    """Mask of the visible keys of each query of (batch, head, query, key); all True without a mask."""
    batch, _, queries, keys = like.shape
    if mask is None:
        return torch.ones(batch, queries, keys, dtype=torch.bool, device=like.device)
    if mask.dtype != torch.bool or mask.shape not in ((batch, keys), (batch, queries, keys)):
        shapes = f"(batch, key) = {(batch, keys)} or (batch, query, key) = {(batch, queries, keys)}"
        raise _mask_error(mask, f"shape {shapes}", who)
    return (mask if mask.ndim == 3 else mask[:, None]).to(like.device).expand(batch, queries, keys)


def _layers(value: Layers, form: str, who: str, *, shared: int) -> list[Tensor]:
    """One tensor of shape ``form`` for each layer, with the same first ``shared`` sizes."""
    layers = [value] if isinstance(value, Tensor) else list(value)
    for layer in layers:
        if not isinstance(layer, Tensor) or layer.ndim != form.count(",") + 1 or not layer.is_floating_point():
            got = f"shape {tuple(layer.shape)}, {layer.dtype}" if isinstance(layer, Tensor) else type(layer).__name__
            raise ShapeError(who, expected=f"a float tensor of shape {form}, or one for each layer", got=got)
        if layer.shape[:shared] != layers[0].shape[:shared] or 0 in layer.shape:
            raise ShapeError(
                who,
                expected=f"{form} without a size of 0, and the same first {shared} sizes in all layers",
                got=" and ".join(str(tuple(layer.shape)) for layer in (layers[0], layer)),
            )
    if not layers:
        raise ShapeError(who, expected="at least one layer", got="none")
    return [layer.detach() if layer.dtype == torch.float64 else layer.detach().float() for layer in layers]


def _mask_error(mask: Tensor, shape: str, who: str) -> ShapeError:
    return ShapeError(
        f"{who} mask",
        expected=f"dtype torch.bool and {shape}, True = valid",
        got=f"shape {tuple(mask.shape)}, {mask.dtype}",
        fix="Use mask.bool() for 0/1 masks; an additive mask is mask == 0.",
    )
