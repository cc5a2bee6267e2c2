"""Intercepts torch's attention functions, and attention written with a softmax over keys."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import FlexAttentionHOP
from torch.overrides import TorchFunctionMode

from .attention_call import MASKED, AttentionCall
from .changed_calls import calls_hidden, hide_calls
from .multihead_projection import HeadProjection, project_heads
from .recording_session import RecordingSession
from .shared_patches import wrapped
from .unrecorded_layers import is_recurrent
from .written_attention import REASON, WrittenAttention

SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
_ATEN = torch.ops.aten.scaled_dot_product_attention
FUSED = (F.scaled_dot_product_attention, _ATEN, _ATEN.default)
KERNEL = re.compile(r"attention|attn")
"""How kernels are named that compute attention in one call, such as those of flash-attn and xformers."""
MULTIHEAD = inspect.signature(F.multi_head_attention_forward)
OWN = "equipoise."
"""Modules of this package attend by ``nn.transformer.Attention``, which has its own interceptor."""
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_head")
"""How modules name the number of their heads."""


@contextmanager
def intercept_torch_functions(session: RecordingSession) -> Iterator[None]:
    """Intercepts ``F.scaled_dot_product_attention``, regardless of how it was imported, and softmax over keys."""
    written = WrittenAttention(session.model)
    session.threads.local.append(lambda: _InterceptionMode(session, written))

    def flex(inner: Any, *args: Any, **kwargs: Any) -> Any:
        session.report_unobservable(None, "its function 'flex_attention' cannot be intercepted")
        return inner(*args, **kwargs)

    with _InterceptionMode(session, written), wrapped(FlexAttentionHOP, "__call__", flex):
        yield


class _InterceptionMode(TorchFunctionMode):
    def __init__(self, session: RecordingSession, written: WrittenAttention) -> None:
        super().__init__()
        self._session, self._written = session, written

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        current = self._session.current_module()
        if (
            current is None
            or self._session.suspended
            or type(current).__module__.startswith(OWN)
            or calls_hidden()
            or torch.compiler.is_compiling()
        ):
            return func(*args, **kwargs)
        if func in FUSED:
            return self._fused(func, args, kwargs)
        if func in SOFTMAXES:
            return self._softmax(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._multihead(func, args, kwargs)
        if KERNEL.search(getattr(func, "__name__", "")):
            self._session.report_unobservable(None, f"its function '{func.__name__}' cannot be intercepted")
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        # Recurrent layers are reported as such.
        if self._written.follow(func, args, kwargs, result) and not is_recurrent(current):
            self._session.report_unobservable(None, REASON)
        return result

    def _fused(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if any(arguments[name].is_nested for name in names[:3]):
            self._session.report_unobservable(None, "its inputs are nested tensors")
            return func(*args, **kwargs)
        shape, heads = arguments["query"].shape, self._heads(arguments["query"])
        query, key, value = (_four(arguments[name], heads) for name in names[:3])
        mask = arguments.get("attn_mask")
        call = AttentionCall(
            query, *(part.expand(len(query), -1, -1, -1) for part in (key, value)),
            mask=None if mask is None else _mask(mask, shape, heads), is_causal=bool(arguments.get("is_causal", False)),
            scale=arguments.get("scale"), reads_itself=query.shape[2] == key.shape[2],
        )  # fmt: skip
        output = self._session.intercept(call, None, "sdpa", lambda: (func(*args, **kwargs), None))
        # Return the model's own output unchanged; a replaced output is in (batch, head, query, dim) layout.
        return output.reshape(*shape[:-1], output.shape[-1])

    def _softmax(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        scores = args[0] if args else kwargs["input"]
        nested = self._session.handler.replaces_output and self._session.recorded_inside()
        with hide_calls() if nested else nullcontext():
            attention = func(*args, **kwargs)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(dim, int) or scores.ndim < 3 or dim not in (-1, scores.ndim - 1) or scores.is_nested:
            self._written.follow(func, args, kwargs, attention)
            return attention
        heads = self._heads(attention)
        four, masked = _four(attention, heads), _four(scores, heads) <= MASKED
        if not four.is_floating_point() or 0 in four.shape:
            return attention
        blank = four[..., :0]
        call = AttentionCall(
            blank, blank, blank, attention=four, mask=~masked if masked.any() else None,
            reads_itself=four.shape[2] == four.shape[3],
        )  # fmt: skip
        # An inner session has not recorded the attention yet.
        run = (lambda: (func(*args, **kwargs), None)) if nested else (lambda: (attention, None))
        output = self._session.intercept(call, None, "softmax", run).reshape(attention.shape)
        self._written.set_recorded(output)
        return output

    def _multihead(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        bound = MULTIHEAD.bind(*args, **kwargs)
        bound.apply_defaults()
        of = bound.arguments
        apart = (of["q_proj_weight"], of["k_proj_weight"], of["v_proj_weight"])
        layer = HeadProjection(
            of["num_heads"], None if of["use_separate_proj_weight"] else of["in_proj_weight"], apart,
            of["in_proj_bias"], of["bias_k"], of["bias_v"], of["add_zero_attn"],
        )  # fmt: skip
        call = project_heads(
            layer, of["query"], of["key"], of["value"], batch_first=False, padding=of["key_padding_mask"],
            mask=of["attn_mask"],
        )  # fmt: skip
        batch_dim = None if of["query"].ndim == 2 else 1
        call = replace(call, sources=(of["query"], of["key"]), batch_dim=batch_dim)
        output = self._session.intercept(call, None, "multihead function", lambda: (func(*args, **kwargs), None))
        if not isinstance(output, Tensor):
            return output
        merged = F.linear(output.transpose(1, 2).flatten(2), of["out_proj_weight"], of["out_proj_bias"])
        return (merged[0] if of["query"].ndim == 2 else merged.transpose(0, 1)), None

    def _heads(self, tensor: Tensor) -> int:
        """Heads that were merged with the samples, where the attention module defines their number."""
        if tensor.ndim != 3:
            return 1
        module: nn.Module | None = self._session.attention_module()
        num_heads = next((n for name in HEADS if isinstance(n := getattr(module, name, None), int)), 1)
        return num_heads if num_heads > 0 and tensor.shape[0] % num_heads == 0 else 1


def _four(tensor: Tensor, heads: int) -> Tensor:
    """(batch, head, token, dim), out of fewer or more dimensions, or out of heads merged with samples."""
    if tensor.ndim == 3:
        return tensor.unflatten(0, (-1, heads)) if len(tensor) % heads == 0 else tensor[:, None]
    if tensor.ndim < 4:
        return tensor[(None,) * (4 - tensor.ndim)]
    return tensor.flatten(1, tensor.ndim - 3)


def _mask(mask: Tensor, query: torch.Size, heads: int) -> Tensor:
    """A mask that broadcasts to the attention, in four dimensions."""
    if len(query) == 3 and mask.ndim == 3 and mask.shape[0] == query[0]:
        return _four(mask, heads)
    if len(query) > 4 and mask.ndim > 2:
        mask = mask[(None,) * (len(query) - mask.ndim)]
        return mask.expand(-1, *query[1:-2], -1, -1).flatten(1, len(query) - 3)
    return mask[(None,) * (4 - mask.ndim)]
