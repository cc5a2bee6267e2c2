"""Intercepts equipoise's own attention layers, which label their keys themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.attention import Attended
from ..nn.transformer import Attention, AttentionCore
from .attention_call import AttentionCall
from .recording_session import RecordingSession
from .share_measurement import measure_share


@contextmanager
def intercept_own_layers(session: RecordingSession) -> Iterator[None]:
    """Registers hooks on the core of every ``Attention``, after a possible rotation of its query."""
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
        call = attended.call if isinstance(attended, _Changed) else AttentionCall(
            query, key, value, mask=_four(kwargs.get("mask")), is_causal=kwargs.get("is_causal", False),
            modality=kwargs.get("modality"), names=layer.names, reads_itself=layer.reads_itself,
        )  # fmt: skip
        output = session.intercept(call, layer, "equipoise", lambda: (attended.output, None))
        if output is attended.output:
            return None
        changed = getattr(session.handler, "changed_call", None)
        return Attended(output, attended.share) if changed is None else _Changed.of(output, attended.share, changed)

    # Hooks run in the order of registration: a changed output comes before those that record it.
    first = hasattr(session.handler, "changed_call")
    return layer.core.register_forward_hook(seen, with_kwargs=True, prepend=first).remove


class _Changed(Attended):
    """The result of a changed attention.

    Attributes:
        call: the changed call, which sessions record.
    """

    call: AttentionCall

    @classmethod
    def of(cls, output: Tensor, share: Tensor | None, call: AttentionCall) -> _Changed:
        if share is not None and call.modality is not None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                share = measure_share(call, call.modality, share.shape[-1]).share.to(share.dtype)
        changed = cls(output, share)
        changed.call = call
        return changed


def _four(mask):
    if mask is None or mask.ndim == 4:
        return mask
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]
