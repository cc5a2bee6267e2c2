"""The way into ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, their fused fast path included."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call
from .session import Session


@contextmanager
def multihead(session: Session) -> Iterator[None]:
    """Stands around the forward functions: hooks would be noticed, and turn the fast path off.

    Scores are computed once more from the layer's inputs, so the model takes the path that it always takes, bit for
    bit. Where outputs are changed, the fast path is off.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if session.handler.changes:
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for part in session.model.modules():
            if isinstance(part, nn.MultiheadAttention) and _untouched(part, nn.MultiheadAttention):
                stack.callback(_wrapped(part, _attends(session, part)))
            elif type(part) is nn.TransformerEncoderLayer:
                stack.callback(_wrapped(part, _encodes(session, part)))
            elif type(part) is nn.TransformerEncoder and all(
                type(layer) is nn.TransformerEncoderLayer for layer in part.layers
            ):
                stack.callback(_wrapped(part, _stands_aside))
        yield


def _untouched(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's forward is that of its class in torch."""
    return type(part).forward is kind.forward


def _wrapped(part: nn.Module, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Puts a function around a module's forward; what it returns takes it away again."""
    before = part.__dict__.get("forward")
    inner = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    part.__dict__["forward"] = forward

    def restore() -> None:
        if before is None:
            part.__dict__.pop("forward", None)
        else:
            part.__dict__["forward"] = before

    return restore


def _stands_aside(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # A function mode is noticed too.
    with torch._C.DisableTorchFunction():
        return inner(*args, **kwargs)


def _attends(session: Session, layer: nn.MultiheadAttention) -> Callable[..., Any]:
    signature = inspect.signature(nn.MultiheadAttention.forward)

    def attends(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(layer, *args, **kwargs).arguments
        call = _call(layer, **{name: value for name, value in given.items() if name not in UNREAD})
        if call is None:
            return _stands_aside(inner, *args, **kwargs)
        output = session.visit(call, layer, "multihead", lambda: (_stands_aside(inner, *args, **kwargs), None))
        if not isinstance(output, Tensor):
            return output
        merged = layer.out_proj(output.transpose(1, 2).flatten(2))
        if given["query"].ndim == 2:
            merged = merged[0]
        elif not layer.batch_first:
            merged = merged.transpose(0, 1)
        return merged, None

    return attends


UNREAD = ("self", "need_weights", "average_attn_weights")


def _encodes(session: Session, layer: nn.TransformerEncoderLayer) -> Callable[..., Any]:
    """Shows the attention of a layer whose fast path never calls it."""
    signature = inspect.signature(nn.TransformerEncoderLayer.forward)

    def encodes(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen, quiet = [], session.quiet
        attention = layer.self_attn
        restore = _wrapped(attention, lambda inside, *a, **k: (seen.append(True), inside(*a, **k))[1])
        try:
            output = _stands_aside(inner, *args, **kwargs)
        finally:
            restore()
        if not seen and not quiet:
            given = signature.bind(layer, *args, **kwargs).arguments
            source = given["src"]
            padding, mask = given.get("src_key_padding_mask"), given.get("src_mask")
            if source.is_nested:
                lengths = torch.tensor([len(part) for part in source.unbind()], device=source.device)
                source = source.to_padded_tensor(0.0)
                padding = torch.arange(source.shape[1], device=source.device) >= lengths[:, None]
            tokens = layer.norm1(source) if layer.norm_first else source
            call = _call(attention, tokens, tokens, tokens, key_padding_mask=padding, attn_mask=mask)
            if call is not None:
                session.visit(call, attention, "multihead, fast path", lambda: (output, None))
        return output

    return encodes


def _call(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None, is_causal: bool = False,
) -> Call | None:  # fmt: skip
    """What the layer will do with its inputs; None for inputs that are no plain tensors."""
    if query.is_nested or key.is_nested:
        return None
    with torch._C.DisableTorchFunction(), torch.set_grad_enabled(False):
        itself = key is query
        if query.ndim == 2:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not layer.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        projected = [_project(layer, number, part) for number, part in enumerate((query, key, value))]
        for number, extra in ((1, layer.bias_k), (2, layer.bias_v)):
            if extra is not None:
                projected[number] = torch.cat([projected[number], extra.expand(len(query), -1, -1)], dim=1)
            if layer.add_zero_attn:
                projected[number] = F.pad(projected[number], (0, 0, 0, 1))
        heads = [part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in projected]
        mask = _masks(layer, key_padding_mask, attn_mask, heads[0].shape[0], heads[1].shape[2])
    return Call(*heads, mask=mask, added=(layer.bias_k is not None) + layer.add_zero_attn, reads_itself=itself)


def _project(layer: nn.MultiheadAttention, number: int, part: Tensor) -> Tensor:
    if layer.in_proj_weight is not None:
        weight = layer.in_proj_weight.chunk(3)[number]
    else:
        weight = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)[number]
    bias = None if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)[number]
    return F.linear(part, weight, bias)


def _masks(
    layer: nn.MultiheadAttention, padding: Tensor | None, mask: Tensor | None, batch: int, keys: int
) -> Tensor | None:  # fmt: skip
    """torch's masks, in which True hides a key, as one of ours; keys that the layer adds are seen by all."""
    found = None
    if mask is not None:
        mask = mask.view(batch, layer.num_heads, *mask.shape[-2:]) if mask.ndim == 3 else mask[None, None]
        found = _shown(mask)
    if padding is not None:
        padding = _shown(padding[:, None, None])
        if found is None:
            found = padding
        elif found.dtype == padding.dtype == torch.bool:
            found = found & padding
        else:
            found = _added(found) + _added(padding)
    if found is not None and found.shape[-1] < keys:
        found = F.pad(found, (0, keys - found.shape[-1]), value=True if found.dtype == torch.bool else 0.0)
    return found


def _shown(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask


def _added(mask: Tensor) -> Tensor:
    """As numbers to add to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
