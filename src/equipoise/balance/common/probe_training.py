"""Losses of a model, or of a copy trained for one loss alone, on training and validation data."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import ConfigError
from ...nn.distributed import all_reduce_sum, is_distributed, rank_and_world
from ...nn.eval_mode import eval_mode_no_grad
from ...tokens.token_batch import Output, as_output
from ..balancer import Batch, Multimodal
from .unimodal_terms import unimodal_losses


def blended_losses(model: Multimodal, output: Output, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (loss,) means and (loss,) sample counts: one loss per modality, and the multimodal loss last."""
    if output.logits is None:
        raise ConfigError("GradientBlending", expected="an output with logits", got="logits = None")
    alone = unimodal_losses(model, output, target, "GradientBlending")
    joint = model.loss(output.logits, target)
    means = torch.stack([*(alone[name].mean for name in model.names), joint])
    counts = [alone[name].count for name in model.names]
    counts = torch.stack([*counts, torch.full_like(counts[0], len(target))])
    return means, counts


def evaluate_losses(model: Multimodal, batches: Iterable[Batch]) -> Float[Tensor, " loss"]:
    """Returns mean losses over batches in evaluation mode: one per modality, and the multimodal loss last.

    Raises:
        ConfigError: no batches.
    """
    total = None
    with eval_mode_no_grad(model):  # type: ignore[arg-type]
        for batch in batches:
            means, counts = blended_losses(model, as_output(model, model(batch), "GradientBlending"), batch["target"])
            part = torch.stack([means * counts, counts]).double()
            total = part if total is None else total + part
    if total is None:
        raise ConfigError(
            "GradientBlending", expected="training and validation batches to review", got="none",
            fix="Weights are estimated on a validation split: pass one, in Lightning as fit(val_dataloaders=...).",
        )  # fmt: skip
    total = all_reduce_sum(total)
    return total[0] / total[1].clamp(min=1)


def trained_copy(
    model: Multimodal, index: int, train: Iterable[Batch], *, epochs: int, learning_rate: float, seed: int
) -> Any:
    """Returns a copy of the model trained for one of its losses alone; model and RNG state are not changed."""
    result: Any = copy.deepcopy(model)
    # Remove other balancers, which change inputs and tokens, from the copy.
    result.preparations, result.transforms, result.results = [], [], []
    optimizer = torch.optim.AdamW(result.parameters(), lr=learning_rate)
    devices = sorted({p.device.index for p in result.parameters() if p.is_cuda})
    with torch.enable_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        result.train()
        for _ in range(epochs):
            for batch in train:
                output = result(_single_loss_batch(batch, result.names, index))
                optimizer.zero_grad()
                blended_losses(result, output, batch["target"])[0][index].backward()
                _average_gradients(result)
                optimizer.step()
    return result


def _single_loss_batch(batch: Batch, names: tuple[str, ...], index: int) -> Batch:
    """Returns the batch without the modalities that the loss does not depend on."""
    if index == len(names) or batch[names[index]] is None:
        return batch
    return {**batch, **{name: None for other, name in enumerate(names) if other != index}}


def _average_gradients(model: nn.Module) -> None:
    """Averages gradients over processes, as data-parallel training does."""
    if not is_distributed():
        return
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = all_reduce_sum(gradient) / rank_and_world()[1]
