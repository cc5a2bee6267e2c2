"""Queries, keys and values of torch's multi-head attention, computed once more from its inputs and weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_call import AttentionCall


class HeadProjection(NamedTuple):
    """The weights of a multi-head attention, as ``F.multi_head_attention_forward`` has them."""

    heads: int
    joined: Tensor | None
    apart: tuple[Tensor | None, Tensor | None, Tensor | None]
    bias: Tensor | None
    extra_key: Tensor | None
    extra_value: Tensor | None
    zeros: bool

    @classmethod
    def of(cls, layer: nn.MultiheadAttention) -> HeadProjection:
        apart = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        return cls(
            layer.num_heads, layer.in_proj_weight, apart, layer.in_proj_bias, layer.bias_k, layer.bias_v,
            layer.add_zero_attn,
        )  # fmt: skip

    @property
    def added(self) -> int:
        """Keys that the layer adds at the end."""
        return (self.extra_key is not None) + self.zeros

    def apply(self, number: int, part: Tensor) -> Tensor:
        """Queries (0), keys (1) or values (2)."""
        weight = self.joined.chunk(3)[number] if self.joined is not None else self.apart[number]
        bias = None if self.bias is None else self.bias.chunk(3)[number]
        return F.linear(part, weight, bias)  # type: ignore[arg-type]


def project_heads(
    layer: HeadProjection, query: Tensor, key: Tensor, value: Tensor, *, batch_first: bool = True,
    padding: Tensor | None = None, mask: Tensor | None = None,
) -> AttentionCall:  # fmt: skip
    """Computes the queries, keys and values of a layer, batched or unbatched; masks are True for masked keys."""
    with torch._C.DisableTorchFunction(), torch.set_grad_enabled(False):
        itself = key is query or (key.shape == query.shape and torch.equal(key, query))
        if query.ndim == 2:
            query, key, value = query[None], key[None], value[None]
            padding = None if padding is None else padding[None]
        elif not batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        projected = [layer.apply(number, part) for number, part in enumerate((query, key, value))]
        for number, extra in ((1, layer.extra_key), (2, layer.extra_value)):
            if extra is not None:
                projected[number] = torch.cat(
                    [projected[number], extra.to(projected[number]).expand(len(query), -1, -1)], dim=1
                )
            if layer.zeros:
                projected[number] = F.pad(projected[number], (0, 0, 0, 1))
        heads = [part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in projected]
        shown = _masks(layer.heads, padding, mask, heads[0].shape[0], heads[1].shape[2])
    return AttentionCall(*heads, mask=shown, added=layer.added, reads_itself=itself)


def _masks(heads: int, padding: Tensor | None, mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """torch's masks as one of ours; keys that the layer adds are seen by all."""
    combined = None
    if mask is not None:
        mask = mask.view(batch, heads, *mask.shape[-2:]) if mask.ndim == 3 else mask[None, None]
        combined = _shown(mask)
    if padding is not None:
        padding = _shown(padding[:, None, None])
        if combined is None:
            combined = padding
        elif combined.dtype == padding.dtype == torch.bool:
            combined = combined & padding
        else:
            combined = _added(combined) + _added(padding)
    if combined is not None and combined.shape[-1] < keys:
        combined = F.pad(combined, (0, keys - combined.shape[-1]), value=True if combined.dtype == torch.bool else 0.0)
    return combined


def _shown(mask: Tensor) -> Tensor:
    return mask if mask.is_floating_point() else ~mask.bool()


def _added(mask: Tensor) -> Tensor:
    """Converts a mask to numbers that are added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
