"""Collects every attention matrix of a model with independent hooks, module by module."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EAGER = "eager"


class EagerAttention(TorchFunctionMode):
    """Records the matrices of softmax, ``F.scaled_dot_product_attention`` and ``nn.MultiheadAttention``.

    Attributes:
        found: name of the module -> its attention matrices (batch, head, query, key), in the order of its calls.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, list[Tensor]] = {}
        self._names = {id(part): name for name, part in model.named_modules()}
        self._stack: list[str] = []
        self._hooks: list[Any] = []
        self._model = model

    def __enter__(self) -> "EagerAttention":
        def enter(part: nn.Module, args: Any) -> None:
            if not isinstance(part, (nn.Softmax, nn.Dropout)):
                self._stack.append(self._names[id(part)])

        def leave(part: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(part, (nn.Softmax, nn.Dropout)):
                self._stack.pop()

        for part in self._model.modules():
            self._hooks += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if not self._stack:
            return result
        if name == "softmax":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            if result.ndim >= 3 and dim in (-1, result.ndim - 1):
                self._add(result)
        elif name == "scaled_dot_product_attention":
            self._add(written_out(*args, **kwargs))
        elif name == "multi_head_attention_forward":
            again = {**kwargs, "need_weights": True, "average_attn_weights": False}
            if len(args) > 15:
                args = args[:15]
            self._add(func(*args, **again)[1])
        return result

    def _add(self, attention: Tensor) -> None:
        self.found.setdefault(self._stack[-1], []).append(attention.detach())


def written_out(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Returns the attention matrix of ``F.scaled_dot_product_attention``."""
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.softmax(scores, dim=-1).nan_to_num(0.0)
