"""Rotation of the queries that the attention function receives, after position embeddings and norms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import ConfigError
from ...recording.shared_patches import wrapped
from .query_key_statistics import key_mask
from .rotation_target import ForeignTarget, Observe, Rotate


class AttentionCallTarget(ForeignTarget):
    """A module that changes queries between their projection and the attention: rotary positions, norms of queries.

    The rotation is applied to the queries that the attention function receives: Hugging Face's attention interface, or
    ``F.scaled_dot_product_attention``. It depends on neither positions nor norms, and cannot be merged into weights.

    Args:
        module: the attention module.
        projection: its query projection.
        heads, head_dim: number and width of the query heads.
        names: the modalities.
        why: what changes the queries, for errors.
    """

    default_rows = "all"

    def __init__(
        self, module: nn.Module, projection: nn.Module, *, heads: int, head_dim: int, names: Sequence[str] | None,
        why: str,
    ) -> None:  # fmt: skip
        self.names, self.heads, self.head_dim = tuple(names or ()), heads, head_dim
        self.host_module, self.projection, self.why = module, projection, why
        self._open: list[tuple[ExitStack, _Calls]] = []

    def check_mergeable(self) -> None:
        raise ConfigError(
            "fold", expected="a rotation that the query projection can contain",
            got=f"one behind {self.why} of {type(self.host_module).__name__}",
            fix="Keep the RollingQ in place for inference; its cost is one product of width d per query.",
        )  # fmt: skip

    def register_hooks(self, rotate: Rotate, observe: Observe) -> list[Any]:
        self.rotate, self.observe = rotate, observe
        return [
            self.host_module.register_forward_pre_hook(self._on_forward),
            self.host_module.register_forward_hook(self._on_end, always_call=True),
        ]

    def _on_forward(self, module: nn.Module, args: tuple) -> None:
        calls, stack = _Calls(self._rotate_call), ExitStack()
        if "transformers" in sys.modules:
            from transformers import AttentionInterface

            stack.enter_context(wrapped(AttentionInterface, "__getitem__", calls.getitem))
            stack.enter_context(wrapped(AttentionInterface, "get_interface", calls.get_interface))
        stack.enter_context(_Products(calls))
        self._open.append((stack, calls))

    def _on_end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._open:
            return
        stack, calls = self._open.pop()
        stack.close()
        if output is not None and not calls.met:
            raise ConfigError(
                "RollingQ", expected="attention by Hugging Face's interface or F.scaled_dot_product_attention",
                got=f"{type(module).__name__}, which called neither",
                fix='To rotate queries before its positions, pass query="q_proj", key="k_proj", num_heads=....',
            )  # fmt: skip

    def _rotate_call(self, query: Tensor, key: Tensor, mask: Any) -> Tensor:
        query = self.rotate(query)
        if self.observing():
            mask_tensor = mask if isinstance(mask, Tensor) and mask.ndim in (2, 4) else None
            valid = key_mask(None if mask_tensor is None else mask_tensor[..., : key.shape[2]], len(key), key.shape[2])
            valid = valid if self.valid is None else (self.valid if valid is None else self.valid & valid)
            self.observe(query.detach(), key.detach(), self.labels, valid)
        return query


class _Calls:
    """Rotates the queries of the first attention of a forward pass."""

    def __init__(self, rotate: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        self.rotate, self.met = rotate, False

    def getitem(self, inner: Callable[..., Any], interface: Any, key: str) -> Any:
        return self._around(inner(interface, key))

    def get_interface(self, inner: Callable[..., Any], interface: Any, name: str, default: Any) -> Any:
        return self._around(inner(interface, name, default))

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if not self.met:
                self.met, query = True, self.rotate(query, key, mask)
            return function(module, query, key, value, mask, *args, **kwargs)

        return attend


class _Products(TorchFunctionMode):
    """Passes ``F.scaled_dot_product_attention`` to the rotation."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and not self.calls.met:
            call_args = (
                dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
            )
            self.calls.met = True
            query = self.calls.rotate(call_args["query"], call_args["key"], call_args.get("attn_mask"))
            return func(**{**call_args, "query": query})
        return func(*args, **kwargs)
