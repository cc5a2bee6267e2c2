"""Base class of balancing methods: optional hooks called around a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..tokens.token_batch import Output, Tokens
from .common.pass_record import Record
from .common.pending_state import Pending

Task = Literal["classification", "multilabel", "regression"]
Batch = Mapping[str, Any]


class Multimodal(Protocol):
    """Interface of the models that balancers accept; ``FusionModel`` implements it."""

    names: tuple[str, ...]
    num_outputs: int
    task: Any
    encoders: Any
    """name -> module with the parameters of that modality."""
    fusion: Any
    head: nn.Module
    training: bool

    def __call__(self, batch: Batch) -> Output: ...
    def encode(self, batch: Batch) -> dict[str, Tokens]: ...
    def fuse(self, tokens: Mapping[str, Tokens]) -> Output: ...
    def ensemble_logits(self, output: Output) -> dict[str, Tensor]: ...
    def contributions(self, output: Output) -> dict[str, Tensor] | None: ...
    def loss(self, logits: Tensor, target: Tensor) -> Tensor: ...
    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor: ...
    def unimodal_loss(self, output: Output, target: Tensor) -> Tensor: ...


class Balancer(nn.Module):
    """Base class of the balancing methods. All hooks are optional: override those that a method needs.

    ``BalancerList`` calls the hooks in this order; a balancer never sees the training loop:

    1. ``prepare`` and ``transform`` in the forward pass, before and after the encoders, and ``finish`` with its output,
       in training mode only;
    2. ``observe``, then ``penalty``, with the output of every batch;
    3. ``gradient_scale`` and ``before_step`` once per optimizer step, when gradients are complete: accumulated, reduced
       over processes, unscaled;
    4. ``review`` with data, if ``reviews`` is True, and ``end_epoch``, once per epoch.

    The state of a balancer is stored in buffers, so that checkpoints contain it, and changes only in ``before_step``
    and at the end of an epoch. Values computed in a forward pass or a loss are passed to ``note``, and ``noted``
    returns them in ``before_step``. Batches that the loop skips, steps with non-finite gradients and validation losses
    are therefore discarded, and the recomputation of activation checkpointing is not counted twice. ``keep`` passes
    values from the forward pass to the loss of the same batch. Statistics on which decisions depend are summed over
    processes, so that all processes decide alike. The model is passed to the constructor and is not registered as a
    submodule.

    Attributes:
        replaces: terms of the loss that ``penalty`` replaces: ``"task"``, ``"unimodal"``.
        needs_heads: True if the model's unimodal heads must train the encoders (``unimodal="train"``).
        needs_teachers: True if the method distills from encoders that were trained alone before; the constructor takes
            ``teachers``, modality -> encoder, which may be empty until the first ``penalty``.
        steps_per_batch: number of optimizer steps that the loop takes on each batch.
        reviews: True if ``review`` needs data before ``end_epoch``.
        partial_graph: True if some parameters get no gradient in some steps, so that data-parallel training needs
            ``find_unused_parameters=True``.
        notes_in_forward: True if the balancer's own forward hooks call ``note`` or ``keep``.
        changes_gradients: False if ``before_step`` only updates the balancer's state.
        works_alone: True if the balancer needs no ``BalancerList``, only its own forward hooks and ``end_epoch``.
        gradient_scaling_only: True if the method only multiplies gradients by a factor; this has almost no effect under
            Adam, which normalizes gradients.
        fusion_in_recipes: fusion that the balancer's name alone stands for in recipes: ``tmc`` is ``concat+tmc``.
        excludes: class names of methods that it cannot be combined with -> reason.
    """

    replaces: ClassVar[tuple[str, ...]] = ()
    needs_heads: ClassVar[bool] = False
    needs_teachers: ClassVar[bool] = False
    steps_per_batch: int = 1
    reviews: ClassVar[bool] = False
    partial_graph: ClassVar[bool] = False
    gradient_scaling_only: ClassVar[bool] = False
    excludes: ClassVar[Mapping[str, str]] = {}
    notes_in_forward: ClassVar[bool] = False
    changes_gradients: ClassVar[bool] = True
    works_alone: ClassVar[bool] = False
    fusion_in_recipes: ClassVar[str | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.join(Pending())

    def join(self, pending: Pending) -> None:
        """Uses the records of forward passes of a ``BalancerList``, shared by all of its balancers."""
        self._pending = pending

    @property
    def record(self) -> Record:
        """The record of the current forward pass or loss."""
        return self._pending.record()

    def note(self, key: str, value: Tensor) -> None:
        """Adds to this batch's sum for ``key``, which ``noted`` returns if the optimizer steps on the batch."""
        if self._pending.noting():
            self.record.add(self, key, value)

    def noted(self, key: str) -> list[Tensor]:
        """Returns the sums for ``key``, one for each batch of the step, and removes them; for ``before_step``."""
        notes = [record.take(self, key) for record in self._pending.committed]
        return [note for note in notes if note is not None]

    def noted_sum(self, key: str) -> Tensor | None:
        """Returns the sum of ``noted`` on this process, or None if nothing was noted."""
        notes = self.noted(key)
        return reduce(torch.add, notes) if notes else None

    def keep(self, key: str, value: Any) -> None:
        """Stores a value of the current forward pass for the loss of the same batch."""
        self.record.kept[id(self), key] = value

    def kept(self, key: str, output: Output) -> Any:
        """Returns the value that ``keep`` stored in the forward pass of this output, or None."""
        record = output.record if isinstance(output.record, Record) else self.record
        return record.kept.get((id(self), key))

    def gradient_size(self) -> Tensor | float:
        """Returns the ratio of ``p.grad`` to the gradient of the mean of the step's losses; for ``before_step``.

        It is 1 if the loop divides losses by the number of accumulated batches, 0.1 if it multiplies them by 0.1, and
        the scale of ``GradScaler`` if gradients were not unscaled. Divide by it to make thresholds and sums independent
        of the loop.
        """
        return self._pending.size()

    def when_reached(self, callback: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        """Registers a callback that is called with the gradient of this batch's loss when a backward pass starts.

        For ``penalty``. The callback returns the values to note, key -> tensor. The graph has not been freed at that
        time, so ``term_gradients(term, parameters, gradient, who)`` returns the contribution of one term to this
        backward pass, scaled as the loop scales the loss.
        """
        if self._pending.noting():
            self._pending.callbacks.append((self, callback))

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Called with each optimizer before training (and on resume); for methods that reset optimizer state."""

    def prepare(self, batch: Batch) -> Batch:
        """Returns a changed copy of the batch before the encoders process it; the argument is not modified."""
        return batch

    def transform(self, tokens: Mapping[str, Tokens], target: Tensor | None = None) -> Mapping[str, Tokens]:
        """Returns changed tokens, name -> Tokens, between encoders and fusion. ``target`` may be None."""
        return tokens

    def finish(self, output: Output) -> Output:
        """Returns a changed output at the end of the forward pass."""
        return output

    def observe(self, output: Output, target: Tensor) -> None:
        """Called with the output of each training batch."""

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Returns a scalar that is added to the loss (instead of the terms in ``replaces``), or None."""
        return None

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float] | None:
        """Returns name -> factor for the gradient of that modality's encoder, or None.

        ``output`` and ``target`` contain all samples of the optimizer step on this process, detached.
        """
        return None

    def before_step(self) -> None:
        """Called when gradients are complete; may read and change ``p.grad``."""

    def review(self, train: Iterable[Batch], val: Iterable[Batch]) -> None:
        """Called once per epoch before ``end_epoch``, with batches on the model's device; iterate as far as needed."""

    def end_epoch(self) -> dict[str, float]:
        """Called once per epoch; returns values to log."""
        return {}


def overrides(balancer: Balancer, hook: str) -> bool:
    """Returns whether the balancer overrides this hook."""
    return getattr(type(balancer), hook) is not getattr(Balancer, hook)
