"""Trials: what a model, or a copy trained for one loss alone, loses on data."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import ConfigError
from ...nn.eval_mode import eval_mode_no_grad
from ...tokens.token_batch import Output
from ..balancer import Batch, Multimodal
from .unimodal_scores import summed
from .unimodal_terms import unimodal_losses


def blended_losses(model: Multimodal, output: Output, target: Tensor) -> tuple[Tensor, Tensor]:
    """(loss,) means and (loss,) numbers of samples: each modality's own, and the multimodal one last."""
    if output.logits is None:
        raise ConfigError("GradientBlending", expected="an output with logits", got="logits = None")
    alone = unimodal_losses(model, output, target, "GradientBlending")
    joint = model.loss(output.logits, target)
    means = torch.stack([*(alone[name].mean for name in model.names), joint])
    counts = [alone[name].count for name in model.names]
    counts = torch.stack([*counts, torch.full_like(counts[0], len(target))])
    return means, counts


def evaluate_losses(model: Multimodal, batches: Iterable[Batch]) -> Float[Tensor, " loss"]:
    """Mean losses over batches, in evaluation mode: each modality's own, and the multimodal one last.

    Raises:
        ConfigError: no batch.
    """
    total = None
    with eval_mode_no_grad(model):  # type: ignore[arg-type]
        for batch in batches:
            means, counts = blended_losses(model, model(batch), batch["target"])
            part = torch.stack([means * counts, counts]).double()
            total = part if total is None else total + part
    if total is None:
        raise ConfigError(
            "GradientBlending", expected="training and validation batches to review", got="none",
            fix="Weights are estimated on a validation split: give one, to Lightning's fit as val_dataloaders.",
        )  # fmt: skip
    total = summed(total)
    return total[0] / total[1].clamp(min=1)


def trained_copy(
    model: Multimodal, place: int, train: Iterable[Batch], *, epochs: int, learning_rate: float, seed: int
) -> Any:
    """A copy of the model, trained for the loss at that place alone; the model and the random state are left alone."""
    twin: Any = copy.deepcopy(model)
    # Other balancers change inputs and tokens, and are no part of what is measured.
    twin.preparations, twin.transforms, twin.results = [], [], []
    optimizer = torch.optim.AdamW(twin.parameters(), lr=learning_rate)
    devices = sorted({p.device.index for p in twin.parameters() if p.is_cuda})
    with torch.enable_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        twin.train()
        for _ in range(epochs):
            for batch in train:
                output = twin(_alone(batch, twin.names, place))
                optimizer.zero_grad()
                blended_losses(twin, output, batch["target"])[0][place].backward()
                _average_gradients(twin)
                optimizer.step()
    return twin


def _alone(batch: Batch, names: tuple[str, ...], place: int) -> Batch:
    """The batch without the modalities that a loss does not read."""
    if place == len(names) or batch[names[place]] is None:
        return batch
    return {**batch, **{name: None for other, name in enumerate(names) if other != place}}


def _average_gradients(model: nn.Module) -> None:
    """Several processes train one copy together, as data-parallel training does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = summed(gradient) / torch.distributed.get_world_size()
