"""Validation and conversion of the arguments of `attend`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import ShapeError
from .sdpa_kernels import Bias, HeadTensor


def apply_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts tensors as `F.scaled_dot_product_attention` does under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) if t.dtype != torch.float64 else t for t in tensors)


def mask_to_bias(mask: Tensor, query: HeadTensor, key: HeadTensor) -> Bias:
    """Converts a mask to a 4-D additive bias with an explicit key dimension."""
    full = (*query.shape[:3], key.shape[2])
    shaped = {2: lambda: mask[:, None, None], 3: lambda: mask[:, None], 4: lambda: mask}.get(mask.ndim, lambda: None)()
    if shaped is None or any(got not in (1, size) for got, size in zip(shaped.shape, full, strict=True)):
        batch, _, rows, keys = full
        raise ShapeError(
            "attend mask", got=f"shape {tuple(mask.shape)}",
            expected=f"(batch, key) = {(batch, keys)}, (batch, query, key) = {(batch, rows, keys)} or a shape that "
            f"broadcasts to (batch, head, query, key) = {full}",
            fix="Pass a (query, key) mask as mask[None, None].",
        )  # fmt: skip
    shaped = shaped.to(query.device).expand(*shaped.shape[:3], key.shape[2])
    if shaped.dtype == torch.bool:
        return torch.zeros_like(shaped, dtype=query.dtype).masked_fill(~shaped, -math.inf)
    if not shaped.is_floating_point():
        raise ShapeError(
            "attend mask", expected="dtype torch.bool or floating", got=f"dtype {mask.dtype}",
            fix="Use mask.bool() for 0/1 masks with 1 = attend.",
        )  # fmt: skip
    return shaped.masked_fill(shaped <= torch.finfo(shaped.dtype).min, -math.inf).to(query.dtype)


def without_hidden(
    query: HeadTensor, key: HeadTensor, value: HeadTensor, bias: Bias | None, is_causal: bool = False, offset: int = 0
) -> tuple[HeadTensor, HeadTensor]:
    """Sets keys and values to zero that no query attends to, so that they affect neither scores nor gradients."""
    if key.shape[2] == 0:
        return key, value
    hidden = None if bias is None else (bias == -math.inf).all(dim=2).all(dim=1)[:, None, :, None]
    if is_causal and key.shape[2] > offset + query.shape[2]:
        later = (torch.arange(key.shape[2], device=key.device) >= offset + query.shape[2])[:, None]
        hidden = later if hidden is None else hidden | later
    if hidden is None or is_none_true(hidden):
        return key, value
    return key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def is_none_true(hidden: Tensor) -> bool:
    """Whether no element is True, where finding out needs no GPU sync."""
    return hidden.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(hidden.any())


def check_heads(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    """Raises ShapeError if ranks, sizes or types of query, key and value are incompatible."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ShapeError(
                f"attend {name}", expected=f"a floating tensor of shape (batch, head, {name}, dim)",
                got=f"shape {tuple(tensor.shape)}, {tensor.dtype}",
                fix="Split heads first: x.unflatten(-1, (heads, -1)).transpose(1, 2).",
            )  # fmt: skip
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ShapeError(
                f"attend {name}", expected=f"{query.dtype} on {query.device}, as the query",
                got=f"{tensor.dtype} on {tensor.device}",
            )  # fmt: skip
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ShapeError(
            "attend key", expected=f"(batch, width) = {(query.shape[0], query.shape[3])}, as the query",
            got=f"{(key.shape[0], key.shape[3])}",
        )  # fmt: skip
    if value.shape[:3] != key.shape[:3]:
        raise ShapeError(
            "attend value", expected=f"(batch, key head, key) = {tuple(key.shape[:3])}, as the key",
            got=f"{tuple(value.shape[:3])}",
        )  # fmt: skip
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ShapeError(
            "attend key", expected=f"a number of heads that divides the query's, heads = {query.shape[1]}",
            got=f"{key.shape[1]} heads",
        )  # fmt: skip
    if not 0.0 <= dropout < 1.0:
        raise ShapeError("attend dropout", expected="a probability in [0, 1)", got=str(dropout))


def check_modality(modality: Tensor, num_modalities: int | None, query: Tensor, key: Tensor) -> int:
    """Returns the number of modalities; checks the values of labels that are on the CPU."""
    batch, keys = query.shape[0], key.shape[2]
    if not isinstance(modality, Tensor):
        raise ShapeError(
            "attend modality", expected="a tensor of integer labels", got=type(modality).__name__,
            fix="Use torch.tensor([0, 0, 1, ...]), one label for every key.",
        )  # fmt: skip
    if modality.is_floating_point() or modality.dtype == torch.bool or modality.is_complex():
        raise ShapeError("attend modality", expected="integer labels", got=f"dtype {modality.dtype}")
    if tuple(modality.shape) not in ((keys,), (batch, keys)):
        raise ShapeError(
            "attend modality", expected=f"shape (key,) = {(keys,)} or (batch, key) = {(batch, keys)}",
            got=f"shape {tuple(modality.shape)}", fix="Give one label for every key, special tokens included.",
        )  # fmt: skip
    if num_modalities is None:
        num_modalities = int(modality.max()) + 1 if modality.numel() else 0
    if modality.device.type == "cpu" and modality.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in modality.aminmax())
        if low < -1 or high >= num_modalities:
            raise ShapeError(
                "attend modality", expected=f"labels from -1 to num_modalities - 1 = {num_modalities - 1}",
                got=f"labels from {low} to {high}", fix="Special tokens and padding have label -1.",
            )  # fmt: skip
    return num_modalities
