"""Finds attention written with elementary functions, which no interceptor records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

FIXED, PAIRS, SCORES, RECORDED, WEIGHTED = range(5)
"""States of tensors; tensors without a state depend on the inputs of the model.

``FIXED``: independent of inputs, or computed from positions and other integers. ``SCORES``: products of two tensors
that depend on the inputs. ``PAIRS``: the same without a batch dimension, or of broadcast tensors; they count as scores
after an exponential or a sigmoid. ``RECORDED``: the result of a softmax that an interceptor has handled. ``WEIGHTED``:
values multiplied with scores, before the sum over keys."""
PRODUCTS = {
    "matmul": (0, 1), "__matmul__": (0, 1), "__rmatmul__": (1, 0), "bmm": (0, 1), "mm": (0, 1), "mv": (0, 1),
    "baddbmm": (1, 2), "addmm": (1, 2), "addbmm": (1, 2), "einsum": (1, 2), "tensordot": (0, 1),
}  # fmt: skip
ELEMENTWISE = frozenset((
    "mul", "multiply", "__mul__", "__rmul__", "add", "__add__", "__radd__", "sub", "subtract", "__sub__", "__rsub__",
))  # fmt: skip
PRODUCT_OF_ELEMENTS = frozenset(("mul", "multiply", "__mul__", "__rmul__"))
EXPONENTIALS = frozenset(("exp", "exp2", "softmax", "log_softmax", "gumbel_softmax", "sigmoid"))
SUMS = frozenset(("sum", "nansum", "mean", "nanmean"))
LAYERS = frozenset(("linear", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "bilinear"))
"""Layers whose results are features again, except on tensors with one dimension for queries and one for keys."""
REASON = (
    "it multiplies queries with keys and the result with values without a softmax over the last dimension or another "
    "attention function that can be intercepted"
)


class WrittenAttention:
    """States of the tensors that a model computes.

    Args:
        model: its parameters and buffers do not depend on inputs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._states: Any = WeakTensorKeyDictionary()
        for tensor in model.buffers():
            self._states[tensor] = FIXED

    def set_recorded(self, attention: Tensor) -> None:
        """Marks the result of a softmax that an interceptor has handled."""
        self._states[attention] = RECORDED

    def follow(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> bool:
        """Sets the states of results; returns True for the product of attention weights with values."""
        name = getattr(func, "__name__", "")
        if name != "__setitem__":
            name = name if name.endswith("__") else name.rstrip("_")
            outputs = [t for t in _tensors((result,)) if t.is_floating_point()]
        else:
            outputs = [args[0]]
        if not outputs:
            return False
        # Integers are positions, ids or masks; those of eight bits are images.
        tensors = [t for t in _tensors((*args, *kwargs.values())) if t.is_floating_point() or t.dtype == torch.uint8]
        state, labels = self._state(name, args, kwargs, tensors, outputs[0])
        for output in outputs:
            if state is not None:
                self._states[output] = state
            else:
                self._states.pop(output, None)
        return labels

    def _state(
        self, name: str, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], output: Tensor
    ) -> tuple[int | None, bool]:
        states = [self._get(t) for t in tensors]
        if name == "embedding" or (name == "linear" and all(state == FIXED for state in states)):
            return None, False
        if all(state == FIXED for state in states):
            return FIXED, False
        if name in PRODUCTS:
            return self._product(name, args, kwargs)
        strongest = max((state for state in states if state is not None), default=FIXED)
        if RECORDED in states:
            strongest = RECORDED
        if name in ELEMENTWISE and RECORDED not in states and len(tensors) == 2:
            left, right = tensors
            widened = [t.shape != output.shape for t in tensors]
            if name in PRODUCT_OF_ELEMENTS and any(
                state == SCORES and wide and other is None
                for state, wide, other in zip(states, widened, reversed(states), strict=True)
            ):
                return WEIGHTED, False
            if all(widened) and FIXED not in states and left.ndim == right.ndim >= 3:
                return max(PAIRS, strongest), False
        if strongest == FIXED or (name in LAYERS and output.ndim < 4) or name.startswith("conv"):
            return None, False
        if strongest == PAIRS and name in EXPONENTIALS:
            return SCORES, False
        if strongest == WEIGHTED:
            return (None if name in SUMS else WEIGHTED), name in SUMS
        return strongest, False

    def _product(self, name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[int | None, bool]:
        operands = list(_tensors((*args, *kwargs.values())))
        pair = operands if name == "einsum" else [operands[n] for n in PRODUCTS[name] if n < len(operands)]
        states = [self._get(t) for t in pair]
        if RECORDED in states or len(pair) != 2:
            return None, False
        if FIXED in states:
            # A learned sum over features, as in additive attention.
            return (states[0] if states[0] in (PAIRS, SCORES) and pair[0].ndim >= 4 else None), False
        if SCORES in states:
            # Products of scores with scores, such as iterations for an inverse, mix no values.
            return None, None in states
        return (SCORES if min(t.ndim for t in pair) >= 3 else PAIRS), False

    def _get(self, tensor: Tensor) -> int | None:
        return FIXED if isinstance(tensor, nn.Parameter) else self._states.get(tensor)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
