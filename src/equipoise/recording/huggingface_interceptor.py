"""Intercepts the attention interface of Hugging Face models, with any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention_call import AttentionCall
from .recording_session import RecordingSession
from .shared_patches import wrapped


@contextmanager
def intercept_huggingface(session: RecordingSession) -> Iterator[None]:
    """Stands where every model looks up its attention function, and hands it on with itself around it.

    No backend is registered or chosen, so masks are made for the one that the model has, and it computes what it always
    does. A name of our own would need a mask function of its own (``AttentionMaskInterface``) under the same name, and
    models that ask for their backend by name would take another branch.
    """
    from transformers import AttentionInterface

    def getitem(inner: Callable[..., Any], faces: Any, key: str) -> Any:
        return _around(session, inner(faces, key), key)

    def get_interface(inner: Callable[..., Any], faces: Any, name: str, default: Any) -> Any:
        return _around(session, inner(faces, name, default), name)

    with ExitStack() as stack:
        stack.enter_context(wrapped(AttentionInterface, "__getitem__", getitem))
        if hasattr(AttentionInterface, "get_interface"):
            stack.enter_context(wrapped(AttentionInterface, "get_interface", get_interface))
        yield


def _around(session: RecordingSession, function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    if getattr(function, "watched_by", None) is session or not session.in_recorded_thread() or not _is_known(backend):
        return function

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if torch.compiler.is_compiling() or id(module) not in session.names:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        call = _call(module, query, key, value, attention_mask, backend or "eager", kwargs)
        found: list[Any] = []

        def run() -> tuple[Any, Tensor | None]:
            found.append(function(module, query, key, value, attention_mask, *args, **kwargs))
            weights = found[0][1] if isinstance(found[0], tuple) and len(found[0]) > 1 else None
            # Weights of a training pass are thinned out by dropout; flex attention has something else in their place.
            usable = isinstance(weights, Tensor) and weights.ndim == 4 and not (module.training and _drops(kwargs))
            return found[0], weights if usable else None

        output = session.intercept(call, module, f"transformers, {backend or 'eager'}", run)
        return (output.transpose(1, 2).contiguous(), None) if isinstance(output, Tensor) else output

    attend.watched_by = session  # type: ignore[attr-defined]
    return attend


def _is_known(backend: str | None) -> bool:
    """Whether it is one of transformers' own; what others do with a mask shows in the functions that they call."""
    name = (backend or "eager").removeprefix("paged|")
    return name in ("eager", "sdpa", "flex_attention") or "flash" in name or "/" in name


def _drops(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("dropout"))


def _call(module, query, key, value, mask, backend: str, kwargs: dict[str, Any]) -> AttentionCall:
    """What the backend will do with what it is given."""
    rows, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    call = AttentionCall(
        query, key, value, scale=kwargs.get("scaling"), softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"), reads_itself=False,
    )  # fmt: skip
    if "flash" in backend or "/" in backend:
        return _flash(call, mask, bool(causal), kwargs)
    if type(mask).__name__ == "BlockMask":
        from torch.nn.attention.flex_attention import create_mask

        batch, heads = mask.shape[:2]
        return replace(call, mask=create_mask(mask.mask_mod, batch, heads, rows, keys, device=query.device))
    # An eager mask is added whatever its width; the module's causality is in it.
    is_causal = bool(rows > 1 and mask is None and causal and backend == "sdpa")
    mask = mask[..., :keys] if isinstance(mask, Tensor) and mask.ndim == 4 else None
    bias = kwargs.get("position_bias")
    if bias is not None:
        bias = bias[..., :keys]
        if mask is not None and mask.dtype == torch.bool:
            mask = bias.masked_fill(~mask, float("-inf"))
        else:
            mask = bias if mask is None else bias + mask
    return replace(call, mask=mask, is_causal=is_causal)


def _flash(call: AttentionCall, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]) -> AttentionCall:
    """Flash attention: padding by (batch, key), causality from the last key on, windows, packed sequences."""
    rows, keys = call.sizes[2:]
    device = call.query.device
    window, packed = kwargs.get("sliding_window"), kwargs.get("cu_seq_lens_q")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        call = call.with_mask(mask[:, -keys:].bool()[:, None, None])
    if packed is not None:
        ends = packed[1:].to(device)
        queries = torch.searchsorted(ends, torch.arange(rows, device=device), right=True)
        others = torch.searchsorted(
            kwargs.get("cu_seq_lens_k", packed)[1:].to(device), torch.arange(keys, device=device), right=True
        )
        call = call.with_mask((queries[:, None] == others)[None, None])
    if causal and rows == keys and window is None and packed is None:
        return replace(call, is_causal=True)
    if causal and (rows > 1 or window is not None):
        places = torch.arange(keys - rows, keys, device=device)[:, None]
        others = torch.arange(keys, device=device)
        seen = others <= places
        if window is not None:
            seen = seen & (others > places - window)
        call = call.with_mask(seen[None, None])
    return call
