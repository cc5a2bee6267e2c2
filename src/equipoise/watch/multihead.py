"""The way into ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, their fused fast path included."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .projection import Projection, projected
from .session import Session

NESTED = "its inputs are nested tensors"


@contextmanager
def multihead(session: Session) -> Iterator[None]:
    """Stands around the forward functions: hooks would be noticed, and turn the fast path off.

    Scores are computed once more from the layer's inputs, so the model takes the path that it always takes, bit for
    bit. Where outputs are changed, the fast path is off.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    lengths: dict[int, int] = {}
    with ExitStack() as stack:
        if session.handler.changes:
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for part in session.model.modules():
            if isinstance(part, nn.MultiheadAttention) and _untouched(part, nn.MultiheadAttention):
                stack.callback(_wrapped(part, _attends(session, part)))
            elif _plain(part):
                stack.callback(_wrapped(part, _encodes(session, part, lengths)))  # type: ignore[arg-type]
            elif type(part) is nn.TransformerEncoder and all(_plain(layer) for layer in part.layers):
                stack.callback(_wrapped(part, _packs(part, lengths)))
        yield


def _untouched(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's forward is that of its class in torch."""
    return type(part).forward is kind.forward


def _plain(part: nn.Module) -> bool:
    """Whether it is torch's own encoder layer, with nothing of its own inside."""
    return type(part) is nn.TransformerEncoderLayer and type(part.self_attn) is nn.MultiheadAttention


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


def _packs(encoder: nn.TransformerEncoder, lengths: dict[int, int]) -> Callable[..., Any]:
    """Notes how many tokens came, before padding is packed away."""

    def packs(inner: Callable[..., Any], src: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not src.is_nested and src.ndim == 3:
            lengths.update({id(layer): src.shape[1] for layer in encoder.layers})
        try:
            return _stands_aside(inner, src, *args, **kwargs)
        finally:
            lengths.clear()

    return packs


def _attends(session: Session, layer: nn.MultiheadAttention) -> Callable[..., Any]:
    signature = inspect.signature(nn.MultiheadAttention.forward)

    def attends(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(layer, *args, **kwargs).arguments
        if any(given[name].is_nested for name in ("query", "key", "value")):
            session.hidden(layer, NESTED)
            return _stands_aside(inner, *args, **kwargs)
        call = projected(
            Projection.of(layer), given["query"], given["key"], given["value"], batch_first=layer.batch_first,
            padding=given.get("key_padding_mask"), mask=given.get("attn_mask"),
        )  # fmt: skip
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


def _encodes(session: Session, layer: nn.TransformerEncoderLayer, lengths: dict[int, int]) -> Callable[..., Any]:
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
            del given["self"]
            _show_fast(session, layer, output, lengths.get(id(layer)), **given)
        return output

    return encodes


def _show_fast(
    session: Session, layer: nn.TransformerEncoderLayer, output: Tensor, length: int | None, src: Tensor,
    src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
) -> None:  # fmt: skip
    """Padded tokens may arrive packed, without a mask; ``length`` is what they were before."""
    if src.is_nested:
        lengths = torch.tensor([len(part) for part in src.unbind()], device=src.device)
        whole = None if length is None else (len(lengths), length, src.size(2))
        src = src.to_padded_tensor(0.0, output_size=whole)
        src_key_padding_mask = torch.arange(src.shape[1], device=src.device) >= lengths[:, None]
    attention = layer.self_attn
    tokens = layer.norm1(src) if layer.norm_first else src
    call = projected(
        Projection.of(attention), tokens, tokens, tokens, batch_first=attention.batch_first,
        padding=src_key_padding_mask, mask=src_mask,
    )  # fmt: skip
    session.visit(call, attention, "multihead, fast path", lambda: (output, None))
