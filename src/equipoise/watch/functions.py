"""The way into any code that calls torch's attention, or writes attention out with a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..transformer import AttentionCore
from .call import Call
from .session import Session

SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)


@contextmanager
def torch_functions(session: Session) -> Iterator[None]:
    """Sees ``F.scaled_dot_product_attention`` under whatever name it was imported, and softmax over keys."""
    with _Mode(session):
        yield


class _Mode(TorchFunctionMode):
    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        busy = self._session.quiet or isinstance(self._session.here(), AttentionCore)
        if func is F.scaled_dot_product_attention and not busy:
            return self._sdpa(func, args, kwargs)
        if func in SOFTMAXES and not busy and self._session.here() is not None:
            return self._softmax(func, args, kwargs)
        return func(*args, **kwargs)

    def _sdpa(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        shape = given["query"].shape
        query, key, value = (_four(given[name]) for name in names[:3])
        mask = given.get("attn_mask")
        call = Call(
            query, key, value, mask=_mask(mask, query, len(shape)), is_causal=bool(given.get("is_causal", False)),
            scale=given.get("scale"), reads_itself=query.shape[2] == key.shape[2],
        )  # fmt: skip
        output = self._session.visit(call, None, "sdpa", lambda: (func(*args, **kwargs), None))
        # The model's own output is handed on as it is; another one comes in our form.
        return output if output.ndim == len(shape) else output.reshape(*shape[:-1], output.shape[-1])

    def _softmax(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        scores = args[0] if args else kwargs["input"]
        attention = func(*args, **kwargs)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(dim, int) or scores.ndim not in (3, 4) or dim not in (-1, scores.ndim - 1):
            return attention
        # (batch * head, query, key) is taken for as many samples, each with one head.
        four = attention if scores.ndim == 4 else attention[:, None]
        if not four.is_floating_point() or four.shape[2] < 1:
            return attention
        blank = four[..., :0]
        call = Call(blank, blank, blank, attention=four, reads_itself=four.shape[2] == four.shape[3])
        return self._session.visit(call, None, "softmax", lambda: (attention, None))


def _four(tensor: Tensor) -> Tensor:
    """(batch, head, token, dim), out of fewer or more dimensions."""
    if tensor.ndim == 4:
        return tensor
    if tensor.ndim < 4:
        return tensor[(None,) * (3 - tensor.ndim)][:, None] if tensor.ndim == 3 else tensor[None, None]
    return tensor.flatten(0, tensor.ndim - 4)


def _mask(mask: Tensor | None, query: Tensor, ndim: int) -> Tensor | None:
    if mask is None:
        return None
    if ndim == 3 and mask.ndim == 3:
        return mask[:, None]
    while mask.ndim < 4:
        mask = mask[None]
    return mask if mask.ndim == 4 else mask.expand(*mask.shape).flatten(0, mask.ndim - 4)
