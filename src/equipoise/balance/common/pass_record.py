"""Values noted by one forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...tokens.token_batch import Output, Tokens


def recomputing() -> bool:
    """Returns whether it is called inside a backward pass, as in the recomputation of activation checkpointing."""
    return backward_task() != -1


class Record:
    """One forward pass in training mode, and the loss of its output.

    Attributes:
        before: number of samples in the earlier batches of this step, on this process.
        size: number of samples.
        drew: whether a balancer drew random numbers for the samples.
        scale: gradient of the final loss with respect to this batch's loss, summed over backward passes; None before
            the first backward pass.
        kept: (balancer, key) -> value passed from the forward pass to the loss; a recomputation overwrites it.
    """

    def __init__(self, before: int = 0, signature: Any = None) -> None:
        self.before, self.signature = before, signature
        self.size, self.drew = 0, False
        self.scale: Tensor | None = None
        self.kept: dict[tuple[int, str], Any] = {}
        self.with_gradient, self.has_loss = torch.is_grad_enabled(), False
        self.outputs: tuple[Output, Tensor] | None = None
        self._notes: dict[tuple[int, str], Tensor] = {}
        self._backward_notes: dict[tuple[int, str], Tensor] = {}
        self._features: Callable[[], Tensor | None] = lambda: None
        self.reached: set[int] = set()
        self.repeated: set[int] = set()

    def add(self, balancer: object, key: str, value: Tensor, *, backward: bool = False) -> None:
        """Adds to the batch's sum for this key. A value that is not finite counts as zeros; no GPU sync.

        ``backward`` marks values of a backward pass, which ``discard_backward`` removes.
        """
        value = value.detach()
        if value.is_floating_point():
            value = torch.where(value.isfinite().all(), value, torch.zeros_like(value))
        index, notes = (id(balancer), key), self._backward_notes if backward else self._notes
        notes[index] = notes[index] + value if index in notes else value

    def take(self, balancer: object, key: str) -> Tensor | None:
        """Returns the sum for this key and removes it."""
        index = (id(balancer), key)
        pending = [notes.pop(index) for notes in (self._notes, self._backward_notes) if index in notes]
        return sum(pending[1:], pending[0]) if pending else None

    def discard_backward(self) -> None:
        """Forgets the backward passes so far, whose gradients the loop has cleared; the loss may be reused."""
        self.scale = None
        self._backward_notes.clear()

    def sample_offset(self, size: int) -> int:
        """Returns the number of samples of the step before this batch; for balancers that draw numbers per sample."""
        self.size, self.drew = size, True
        return self.before

    def finish(self, output: Output) -> None:
        """Stores the output of the forward pass."""
        self.size = self.size or len(output.features)
        self._features = weakref.ref(output.features)
        pair = (output.features, output.logits)
        self._memory = tuple(tensor_address(tensor) for tensor in pair if tensor is not None)

    _memory: tuple[int, ...] = ()

    def computed(self, output: Output) -> bool:
        """Returns whether this pass computed the output, also if the ``Output`` object was rebuilt since."""
        pair = (output.features, output.logits)
        return any(tensor is not None and tensor_address(tensor) in self._memory for tensor in pair)

    def waits_for_loss(self) -> bool:
        """Returns whether a loss may still be computed: with gradient, output alive and finite."""
        features = self._features()
        if not self.with_gradient or self.has_loss or features is None:
            return False
        # Detach: checkpointing counts the tensors saved for backward.
        return bool(features.detach().isfinite().all())


def backward_task() -> int:
    """Returns the id of the current backward pass; -1 outside of backward passes."""
    return torch._C._current_graph_task_id()


def input_signature(inputs: Any) -> Iterable[tuple]:
    """Yields address, shape and dtype of each tensor: equal in a pass and in its recomputation."""
    if isinstance(inputs, Tensor):
        yield tensor_address(inputs), tuple(inputs.shape), inputs.dtype
    elif isinstance(inputs, Tokens):
        yield from input_signature(inputs.values)
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from input_signature(value)


def tensor_address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        # Tensors of torch.func transforms have no storage.
        return 0
