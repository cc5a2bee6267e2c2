"""FLOPs of everything that runs inside a context: forward passes, backward passes, and steps of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

UNCOUNTED = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps")
"""Fused kernels without a formula in torch, and (``_backward``) their gradients."""


class FlopCount(TorchDispatchMode):
    """Context manager that counts the FLOPs of all matrix products, convolutions and attention kernels inside.

    A multiplication and an addition count as two; norms, activations and softmax are not counted, as in
    ``torch.utils.flop_counter``, whose formulas are used. Unlike ``FlopCounterMode`` it registers no module hooks, so
    that backward passes and optimizer steps can be counted with any model. Code of ``torch.compile`` is not counted.

    Attributes:
        flops: FLOPs so far.

    Example:
        >>> x, weight = torch.ones(3, 5), torch.ones(7, 5, requires_grad=True)
        >>> with FlopCount() as count:
        ...     torch.nn.functional.linear(x, weight).sum().backward()
        >>> count.flops == 2 * (2 * 3 * 5 * 7)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._fast: list[bool] = []
        self._formulas: dict[Any, Any] = dict(flop_registry)
        for name in UNCOUNTED:
            for kernel, factor in ((name, 1.0), (f"{name}_backward", 2.5)):
                packet = getattr(torch.ops.aten, kernel, None)
                if packet is not None and packet not in self._formulas:
                    self._formulas[packet] = _AttentionFlops(factor)

    def __enter__(self) -> FlopCount:
        # The fast path of nn.MultiheadAttention and the encoder layers is a single kernel without a formula.
        self._fast.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.backends.mha.set_fastpath_enabled(self._fast.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula, kwargs = self._formulas.get(func._overloadpacket), kwargs or {}
        if formula is None and func is not torch.ops.prim.device.default:
            # Operators that reach this place whole, as in inference mode, are counted by their parts.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


class _AttentionFlops:
    """FLOPs of Q K^T and A V, ignoring masks, as torch counts its other attention kernels.

    The backward pass computes the scores again, and the gradients of the four factors: 2.5 times as many.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def __call__(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        query, key, value = (part.shape for part in (args[1:4] if self._factor > 1 else args[:3]))
        return int(self._factor * _attention_flops(query, key, value))


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
