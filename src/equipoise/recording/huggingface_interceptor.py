"""Intercepts the attention interface of Hugging Face models, with any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention_call import AttentionCall
from .recording_session import INTERFACE, RecordingSession
from .shared_patches import wrapped


@contextmanager
def intercept_huggingface(session: RecordingSession) -> Iterator[None]:
    """Wraps the attention functions that models look up in ``AttentionInterface``.

    The backend of the model is not changed, so that its masks and outputs remain the same. A backend registered under a
    new name would need its own mask function (``AttentionMaskInterface``), and models that branch on the name of their
    backend would take another branch.
    """
    from transformers import AttentionInterface

    def getitem(inner: Callable[..., Any], interface: Any, key: str) -> Any:
        return _intercepted(session, inner(interface, key), key)

    def get_interface(inner: Callable[..., Any], interface: Any, name: str, default: Any) -> Any:
        return _intercepted(session, inner(interface, name, default), name)

    with ExitStack() as stack:
        stack.enter_context(wrapped(AttentionInterface, "__getitem__", getitem))
        if hasattr(AttentionInterface, "get_interface"):
            stack.enter_context(wrapped(AttentionInterface, "get_interface", get_interface))
        yield


def _intercepted(session: RecordingSession, function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    if getattr(function, "watched_by", None) is session or not session.in_recorded_thread() or not _is_known(backend):
        return function

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if torch.compiler.is_compiling() or id(module) not in session.names:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        call = interface_call(module, query, key, value, attention_mask, backend or "eager", kwargs)
        outputs: list[Any] = []

        def run() -> tuple[Any, Tensor | None]:
            outputs.append(function(module, query, key, value, attention_mask, *args, **kwargs))
            weights = outputs[0][1] if isinstance(outputs[0], tuple) and len(outputs[0]) > 1 else None
            # Weights after dropout are not used; flex attention returns another tensor in their place.
            usable = (
                isinstance(weights, Tensor) and weights.ndim == 4 and not (module.training and kwargs.get("dropout"))
            )
            return outputs[0], weights if usable else None

        output = session.intercept(call, module, f"{INTERFACE}{backend or 'eager'}", run)
        return (output.transpose(1, 2).contiguous(), None) if isinstance(output, Tensor) else output

    attend.watched_by = session  # type: ignore[attr-defined]
    return attend


def _is_known(backend: str | None) -> bool:
    """Whether the backend belongs to transformers; others are intercepted in the torch functions that they call."""
    name = (backend or "eager").removeprefix("paged|")
    return name in ("eager", "sdpa", "flex_attention") or "flash" in name or "/" in name


def interface_call(module, query, key, value, mask, backend: str, kwargs: dict[str, Any]) -> AttentionCall:
    """Returns the attention call that a backend computes from its arguments."""
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
    # An eager mask is always added, and it includes causality.
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
    """Adds the masks of flash attention: padding, causality aligned to the last key, windows, packed sequences."""
    rows, keys = call.sizes[2:]
    device = call.query.device
    window, packed = kwargs.get("sliding_window"), kwargs.get("cu_seq_lens_q")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        call = call.with_mask(mask[:, -keys:].bool()[:, None, None])
    if packed is not None:
        ends = packed[1:].to(device)
        query_sequence = torch.searchsorted(ends, torch.arange(rows, device=device), right=True)
        key_sequence = torch.searchsorted(
            kwargs.get("cu_seq_lens_k", packed)[1:].to(device), torch.arange(keys, device=device), right=True
        )
        call = call.with_mask((query_sequence[:, None] == key_sequence)[None, None])
    if causal and rows == keys and window is None and packed is None:
        return replace(call, is_causal=True)
    if causal and (rows > 1 or window is not None):
        query_positions = torch.arange(keys - rows, keys, device=device)[:, None]
        key_positions = torch.arange(keys, device=device)
        visible = key_positions <= query_positions
        if window is not None:
            visible = visible & (key_positions > query_positions - window)
        call = call.with_mask(visible[None, None])
    return call
