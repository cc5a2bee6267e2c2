"""Intercepts equipoise's own attention layers, which label their keys themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..nn.attention import Attended
from ..nn.transformer import Attention, AttentionCore
from .attention_call import AttentionCall
from .recording_session import RecordingSession


@contextmanager
def intercept_own_layers(session: RecordingSession) -> Iterator[None]:
    """Hooks on every ``Attention``'s core, behind whatever turns its query."""
    with ExitStack() as stack:
        for part in session.model.modules():
            if isinstance(part, Attention):
                stack.callback(_hook(session, part))
        yield


def has_own_layers(model: nn.Module) -> bool:
    return any(isinstance(part, Attention) for part in model.modules())


def _hook(session: RecordingSession, layer: Attention):
    # In another thread, a hook that is being removed may come without the keyword arguments.
    def seen(core: AttentionCore, args: tuple, *rest: Any) -> Attended | None:
        if not session.in_recorded_thread():
            return None
        kwargs: dict[str, Any]
        attended: Attended
        kwargs, attended = rest
        query, key, value = args
        call = AttentionCall(
            query, key, value, mask=_four(kwargs.get("mask")), is_causal=kwargs.get("is_causal", False),
            modality=kwargs.get("modality"), names=layer.names, reads_itself=layer.reads_itself,
        )  # fmt: skip
        output = session.intercept(call, layer, "equipoise", lambda: (attended.output, None))
        return None if output is attended.output else Attended(output, attended.share)

    return layer.core.register_forward_hook(seen, with_kwargs=True).remove


def _four(mask):
    if mask is None or mask.ndim == 4:
        return mask
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]
