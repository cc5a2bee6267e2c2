"""Losses of the three tasks, from logits and targets."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..errors import ShapeError
from ..tokens.masks import at_least_float32
from ..tokens.token_batch import Output

Task = Literal["classification", "multilabel", "regression"]


class TaskLosses:
    """Losses of a model with a ``task``, computed in float32 or higher precision."""

    task: Task

    def loss(self, logits: Float[Tensor, "batch output"], target: Tensor) -> Float[Tensor, ""]:
        """Loss of the task, mean over the batch, computed in float32 or higher precision.

        Args:
            logits: (batch, output).
            target: (batch,) class indices; (batch, output) 0/1 for multilabel; (batch, output) for regression, or
                (batch,) for a single output.

        Raises:
            ShapeError: a target of another shape or type, or (on the CPU) class indices out of range.
        """
        return self.sample_losses(logits, target).mean()

    def sample_losses(self, logits: Float[Tensor, "batch output"], target: Tensor) -> Float[Tensor, " batch"]:
        """Loss of every sample; arguments as in ``loss``."""
        logits = at_least_float32(logits)
        who = f"{type(self).__name__}.loss"
        if self.task == "classification":
            _check_classes(logits, target, who)
            return F.cross_entropy(logits, target.long(), reduction="none")
        if target.shape not in (logits.shape, logits.squeeze(-1).shape):
            raise ShapeError(
                who,
                expected=f"a target of shape (batch, output) = {tuple(logits.shape)}",
                got=f"shape {tuple(target.shape)}",
            )
        target = target.to(logits.dtype).reshape(logits.shape)
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
        return F.mse_loss(logits, target, reduction="none").mean(dim=1)

    def unimodal_loss(self, output: Output, target: Tensor) -> Float[Tensor, ""]:
        """Sum of the losses of the unimodal heads; 0 without heads. Samples without a modality are excluded from it."""
        total = at_least_float32(output.features).new_zeros(())
        for name, logits in output.unimodal_logits.items():
            tokens = output.tokens[name]
            if len(tokens) == 0:
                continue
            if tokens.mask is None:
                total = total + self.loss(logits, target)
            else:
                # Mask with zeros instead of indexing: boolean indexing would force a GPU synchronization.
                present = tokens.present()
                losses = self.sample_losses(logits, target).masked_fill(~present, 0.0)
                total = total + losses.sum() / present.sum().clamp(min=1)
        return total


def _check_classes(logits: Tensor, target: Tensor, who: str) -> None:
    classes = logits.shape[-1]
    is_integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if logits.ndim != 2 or target.shape != logits.shape[:1] or not is_integer:
        raise ShapeError(
            who,
            expected="logits (batch, output) and a target of class indices (batch,)",
            got=f"logits {tuple(logits.shape)} and a target {tuple(target.shape)} of {target.dtype}",
            fix="Convert one-hot rows with target.argmax(dim=1).",
        )
    if target.device.type == "cpu" and len(target) and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in target.aminmax())
        if low < 0 or high >= classes:
            raise ShapeError(
                who,
                expected=f"class indices from 0 to num_outputs - 1 = {classes - 1}",
                got=f"indices from {low} to {high}",
                fix="Number classes from 0, and set num_outputs to the number of classes.",
            )
