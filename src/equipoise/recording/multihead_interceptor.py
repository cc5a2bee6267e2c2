"""Intercepts ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, including the fused fast path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .multihead_projection import HeadProjection, project_heads
from .recording_session import RecordingSession
from .shared_patches import held, wrapped

NESTED = "its inputs are nested tensors"


@contextmanager
def intercept_multihead(session: RecordingSession) -> Iterator[None]:
    """Wraps the forward functions, because hooks would disable the fast path.

    Scores are recomputed from the layer's inputs, so that the outputs of the model do not change by a single bit. The
    fast path is disabled if the handler replaces outputs.
    """
    ran = _Ran()
    with ExitStack() as stack:
        if session.handler.replaces_output:
            stack.enter_context(held("fast path", _without_fast_path))
        for part in session.model.modules():
            if isinstance(part, nn.MultiheadAttention) and _untouched(part, nn.MultiheadAttention):
                wrapper = _attends(session, part, ran)
            elif _plain(part):
                wrapper = _encodes(session, part, ran)  # type: ignore[arg-type]
            elif type(part) is nn.TransformerEncoder and all(_plain(layer) for layer in part.layers):
                wrapper = _packs(part, ran)
            else:
                continue
            stack.enter_context(wrapped(part, "forward", _in_own_thread(session, wrapper)))
        yield


class _Ran:
    """Modules that have run in the recorded thread.

    Attributes:
        calls: of ``nn.MultiheadAttention`` layers.
        lengths: id of a layer -> number of tokens before padding was packed away.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.lengths: dict[int, int] = {}


def _without_fast_path() -> Callable[[], None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


def _in_own_thread(session: RecordingSession, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs) if session.in_recorded_thread() else inner(*args, **kwargs)

    return forward


def _untouched(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's forward is that of its class in torch."""
    return type(part).forward is kind.forward


def _plain(part: nn.Module) -> bool:
    """Whether a module is torch's encoder layer without modified submodules."""
    return type(part) is nn.TransformerEncoderLayer and type(part.self_attn) is nn.MultiheadAttention


def _stands_aside(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # A function mode is noticed too.
    with torch._C.DisableTorchFunction():
        return inner(*args, **kwargs)


def _packs(encoder: nn.TransformerEncoder, ran: _Ran) -> Callable[..., Any]:
    """Notes how many tokens came, before padding is packed away."""

    def packs(inner: Callable[..., Any], src: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not src.is_nested and src.ndim == 3:
            parts = (part for layer in encoder.layers for part in (layer, layer.self_attn))
            ran.lengths.update({id(part): src.shape[1] for part in parts})
        try:
            return _stands_aside(inner, src, *args, **kwargs)
        finally:
            ran.lengths.clear()

    return packs


def _attends(session: RecordingSession, layer: nn.MultiheadAttention, ran: _Ran) -> Callable[..., Any]:
    signature = inspect.signature(nn.MultiheadAttention.forward)

    def attends(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ran.calls += 1
        arguments = signature.bind(layer, *args, **kwargs).arguments
        if any(arguments[name].is_nested for name in ("query", "key", "value")):
            if not arguments["query"] is arguments["key"] is arguments["value"]:
                session.report_unobservable(layer, NESTED)
                return _stands_aside(inner, *args, **kwargs)
            # Hooks on the layer keep an encoder from its own fast path, but not from packing padded tokens.
            src, padding = _padded(arguments["query"], ran.lengths.get(id(layer)))
            call = project_heads(HeadProjection.of(layer), src, src, src, padding=padding)
            call = replace(call, sources=(src, src))
            return session.intercept(call, layer, "multihead", lambda: (_stands_aside(inner, *args, **kwargs), None))
        call = project_heads(
            HeadProjection.of(layer),
            arguments["query"],
            arguments["key"],
            arguments["value"],
            batch_first=layer.batch_first,
            padding=arguments.get("key_padding_mask"),
            mask=arguments.get("attn_mask"),
        )
        batch_dim = None if arguments["query"].ndim == 2 else 0 if layer.batch_first else 1
        call = replace(call, sources=(arguments["query"], arguments["key"]), batch_dim=batch_dim)
        output = session.intercept(call, layer, "multihead", lambda: (_stands_aside(inner, *args, **kwargs), None))
        if not isinstance(output, Tensor):
            return output
        merged = layer.out_proj(output.transpose(1, 2).flatten(2))
        if arguments["query"].ndim == 2:
            merged = merged[0]
        elif not layer.batch_first:
            merged = merged.transpose(0, 1)
        return merged, None

    return attends


def _encodes(session: RecordingSession, layer: nn.TransformerEncoderLayer, ran: _Ran) -> Callable[..., Any]:
    """Shows the attention of a layer whose fast path never calls it."""
    signature = inspect.signature(nn.TransformerEncoderLayer.forward)

    def encodes(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls, quiet = ran.calls, session.suspended
        output = _stands_aside(inner, *args, **kwargs)
        if ran.calls == calls and not quiet:
            arguments = signature.bind(layer, *args, **kwargs).arguments
            del arguments["self"]
            _show_fast(session, layer, output, ran.lengths.get(id(layer)), **arguments)
        return output

    return encodes


def _show_fast(
    session: RecordingSession, layer: nn.TransformerEncoderLayer, output: Tensor, length: int | None, src: Tensor,
    src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
) -> None:  # fmt: skip
    """Padded tokens may arrive packed, without a mask; ``length`` is what they were before."""
    if src.is_nested:
        src, src_key_padding_mask = _padded(src, length)
    attention = layer.self_attn
    tokens, query_input = layer.norm1(src) if layer.norm_first else src, src
    call = project_heads(
        HeadProjection.of(attention), tokens, tokens, tokens, batch_first=attention.batch_first,
        padding=src_key_padding_mask, mask=src_mask,
    )  # fmt: skip
    batch_dim = 0 if attention.batch_first else 1
    call = replace(call, sources=(query_input, query_input), batch_dim=batch_dim)
    session.intercept(call, attention, "multihead, fast path", lambda: (output, None))


def _padded(src: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    """A nested tensor as (batch, token, dim), padded to ``length`` tokens, and its padding mask."""
    lengths = torch.tensor([len(part) for part in src.unbind()], device=src.device)
    shape = None if length is None else (len(lengths), length, src.size(2))
    src = src.to_padded_tensor(0.0, output_size=shape)
    return src, torch.arange(src.shape[1], device=src.device) >= lengths[:, None]
