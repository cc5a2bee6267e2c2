"""What every balancing method is: a few moments around somebody else's training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..tokens.token_batch import Output, Tokens
from .common.pending_state import Pending, Record

Task = Literal["classification", "multilabel", "regression"]
Batch = Mapping[str, Any]


class Multimodal(Protocol):
    """What a balancer may ask of the model that it balances; ``FusionModel`` has it all."""

    names: tuple[str, ...]
    num_outputs: int
    task: Any
    encoders: Any
    """name -> module: whose parameters belong to which modality."""
    fusion: Any
    head: nn.Module
    training: bool

    def __call__(self, batch: Batch) -> Output: ...
    def encode(self, batch: Batch) -> dict[str, Tokens]: ...
    def fuse(self, tokens: Mapping[str, Tokens]) -> Output: ...
    def votes(self, output: Output) -> dict[str, Tensor]: ...
    def contributions(self, output: Output) -> dict[str, Tensor] | None: ...
    def loss(self, logits: Tensor, target: Tensor) -> Tensor: ...
    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor: ...
    def unimodal_loss(self, output: Output, target: Tensor) -> Tensor: ...


class Balancer(nn.Module):
    """Base of the balancing methods. Override the moments you need; all of them are optional.

    A training step goes through them in this order (``BalancerList`` calls them, a balancer never sees the loop):

    1. ``prepare`` and ``transform`` in the forward pass, before the encoders and behind them, in training only;
    2. ``observe`` and ``penalty`` on the outputs of every batch;
    3. ``gradient_scale`` and ``before_step`` once for every optimizer step, when gradients are complete: accumulated,
       reduced over processes, unscaled;
    4. ``review`` on the data, where ``reviews`` is True, and ``end_epoch`` once an epoch.

    What a balancer remembers are buffers, so that a checkpoint holds it; they change in ``before_step`` and at the end
    of an epoch alone. What a forward pass or a loss finds out goes through ``note`` to ``noted`` of the step: a batch
    that the loop skips, a step with gradients that are not finite and a validation loss leave nothing, and the
    recomputation of activation checkpointing is not counted again. ``keep`` hands values from the forward pass to the
    loss of the same batch. Statistics that decide something are summed over processes, so that all decide alike. The
    model is taken in the constructor, and kept out of the module tree.

    Class attributes tell the loop what a method needs:

    Attributes:
        replaces: terms of the loss that ``penalty`` stands for: ``"task"``, ``"unimodal"``.
        needs_heads: True where the model's unimodal heads must teach (``unimodal="train"``).
        needs_teachers: True where it learns from encoders that were trained alone before; the constructor takes
            ``teachers``, modality -> encoder, and makes do without them until the first ``penalty``.
        steps_per_batch: how often the loop serves each batch, one optimizer step each.
        reviews: True where ``review`` wants to see data before ``end_epoch``.
        partial_graph: True where some parameters get no gradient in some steps; data-parallel training must be told.
        notes_in_forward: True where hooks of the balancer's own ``note`` or ``keep`` something in the forward pass.
        changes_gradients: False where ``before_step`` updates the balancer's state and leaves gradients as they are.
        works_alone: True where it needs no ``BalancerList``, only its hooks in the model and a call once an epoch.
        gradient_scaling_only: True where nothing but the size of gradients is changed: next to nothing under Adam, which divides
            it out again.
        excludes: names of methods that it cannot be combined with -> why.
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

    def __init__(self) -> None:
        super().__init__()
        self.join(Pending())

    def join(self, pending: Pending) -> None:
        """Shares the records of forward passes with the other balancers of one ``BalancerList``."""
        self._pending = pending

    @property
    def record(self) -> Record:
        """The record of the forward pass or of the loss that runs."""
        return self._pending.record()

    def note(self, key: str, value: Tensor) -> None:
        """Adds to a sum over this batch, which ``noted`` returns if the optimizer steps on the batch."""
        if self._pending.noting():
            self.record.add(self, key, value)

    def noted(self, key: str) -> list[Tensor]:
        """In ``before_step``, once: what was noted under this key, a tensor for each batch of the step."""
        notes = [record.take(self, key) for record in self._pending.committed]
        return [note for note in notes if note is not None]

    def noted_sum(self, key: str) -> Tensor | None:
        """The sum of ``noted`` on this process; None where nothing was noted."""
        notes = self.noted(key)
        return reduce(torch.add, notes) if notes else None

    def keep(self, key: str, value: Any) -> None:
        """Keeps a value for the loss of the batch whose forward pass runs."""
        self.record.kept[id(self), key] = value

    def kept(self, key: str, output: Output) -> Any:
        """What ``keep`` kept in the forward pass of this output; None where there is none."""
        record = output.record if isinstance(output.record, Record) else self.record
        return record.kept.get((id(self), key))

    def gradient_size(self) -> Tensor | float:
        """In ``before_step``: how many times the mean gradient of the step's losses ``p.grad`` is.

        1 where the loop divides losses by the number of accumulated batches; 0.1 where it multiplies them by 0.1; the
        scale of ``GradScaler`` where it was not unscaled. To make thresholds and sums independent of it.
        """
        return self._pending.size()

    def when_reached(self, moment: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        """In ``penalty``: calls ``moment`` with the gradient of this batch's loss when a backward pass begins there.

        It returns what is noted, key -> tensor. The graph is whole then, so ``term_gradients(term, parameters,
        gradient, who)`` is what this backward pass brings of one term, scaled as the loop scales the loss.
        """
        if self._pending.noting():
            self._pending.moments.append((self, moment))

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Is given each optimizer before training starts, also when it resumes; for methods that reset its state."""

    def prepare(self, batch: Batch) -> Batch:
        """The batch before the encoders read it; returns it changed, and leaves the one that it was given as it is."""
        return batch

    def transform(self, tokens: Mapping[str, Tokens], target: Tensor | None = None) -> Mapping[str, Tokens]:
        """name -> Tokens between encoders and fusion; returns them changed. ``target`` is None where there is none."""
        return tokens

    def observe(self, output: Output, target: Tensor) -> None:
        """Sees the output of a training batch."""

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """A scalar that is added to the loss (or stands for what ``replaces`` names), or None."""
        return None

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float] | None:
        """name -> factor on the gradient of that modality's encoder, or None.

        ``output`` and ``target`` hold all samples of the optimizer step on this process, detached.
        """
        return None

    def before_step(self) -> None:
        """Gradients are complete, ``p.grad`` may be read and changed."""

    def review(self, train: Iterable[Batch], val: Iterable[Batch]) -> None:
        """Sees data once an epoch, before ``end_epoch``: batches on the model's device; iterate as far as needed."""

    def end_epoch(self) -> dict[str, float]:
        """What happens once an epoch; returns what is worth logging."""
        return {}


def overrides(balancer: Balancer, moment: str) -> bool:
    """Whether the balancer does anything at this moment."""
    return getattr(type(balancer), moment) is not getattr(Balancer, moment)
