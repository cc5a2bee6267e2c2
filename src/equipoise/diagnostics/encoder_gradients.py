"""Norms of the gradients of the fused loss for each encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, NonFiniteError, ShapeError
from ..tokens.masks import at_least_float32
from ..tokens.token_batch import Output
from .modality_ablation import FusedLogits, record_fusion
from .prediction_collection import collect_predictions


@dataclass(frozen=True)
class GradientNorms:
    """Norms of the gradients of the task loss, averaged over batches.

    Attributes:
        parameters: name -> norm over all parameters of the encoder; NaN for one that is frozen.
        outputs: name -> norm at the output of the encoder, over all tokens of a batch.
        ratio: name -> value of ``parameters`` divided by the mean of the others; NaN without others.
        output_ratio: the same for ``outputs``.
        batches: number of batches.
    """

    parameters: dict[str, float]
    outputs: dict[str, float]
    ratio: dict[str, float]
    output_ratio: dict[str, float]
    batches: int


def gradient_norms(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], *, max_batches: int | None = None
) -> GradientNorms:
    """Computes the norms of the gradients of the fused loss with respect to each encoder::

        g_m = mean over batches of sqrt(sum over parameters of encoder m of |dL/dtheta|^2)

    The model is not changed: no ``.grad`` is written, and training modes and the RNG state are restored. Losses of
    unimodal heads, penalties, clipping and modulation by balancers are not included, and dropout is off.

    Args:
        model: a FusionModel.
        loader: batches, dicts with every modality and targets.
        max_batches: maximum number of batches.

    Returns:
        GradientNorms. Batches without any sample of a modality are excluded for it; NaN without any batch. Parameter
        norms depend on the size of the encoder and the scale of its inputs, so ``outputs`` is better suited to compare
        different encoders. A small norm may also mean that the loss has converged. Norms decrease with the batch size:
        compare at the same batch size.

    Raises:
        ConfigError: the model is not a FusionModel, or max_batches < 1. ShapeError: no batch, or no targets.
        NonFiniteError: the loss is NaN or infinite.

    Reference: RollingQ (ICML 2025), Figure 7.
    Differs from the paper in: evaluation mode on any data instead of during training; norms at the outputs as well.
    """
    if max_batches is not None and max_batches < 1:
        raise ConfigError("gradient_norms", expected="max_batches >= 1 or None", got=str(max_batches))
    names = record_fusion(model, "gradient_norms").names
    norms = collect_predictions(_Differentiated(model), islice(loader, max_batches)).logits
    parameters, outputs = norms.nanmean(dim=0).T
    result = (parameters, outputs, ratios(parameters), ratios(outputs))
    return GradientNorms(*(dict(zip(names, values.tolist(), strict=True)) for values in result), batches=len(norms))


def ratios(norms: Float[Tensor, " modality"]) -> Float[Tensor, " modality"]:
    """Divides each norm by the mean of the others, ignoring NaN.

    Example:
        >>> ratios(torch.tensor([6.0, 2.0, 4.0]))
        tensor([2.0000, 0.4000, 1.0000])
    """
    beside = norms.expand(len(norms), -1).masked_fill(torch.eye(len(norms), dtype=torch.bool), torch.nan)
    return norms / beside.nanmean(dim=1)


class _Differentiated(nn.Module):
    """Wraps a model; the logits are (1, modality, 2), the gradient norms at parameters and output for one batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.names = model, model.names

    def forward(self, batch: Mapping[str, Any]) -> Output:
        model: FusedLogits = self.model  # type: ignore[assignment]
        if batch.get("target") is None:
            raise ShapeError(
                "gradient_norms", expected="a target in every batch", got="none", fix="Give every batch a 'target'."
            )
        trained = [parameter for parameter in model.encoders.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            tokens = model.encode(batch)
            for name, part in tokens.items():
                if not part.values.requires_grad:
                    tokens[name] = replace(part, values=part.values.detach().requires_grad_())
            loss = model.loss(model.fuse(tokens).logits, batch["target"])  # type: ignore[arg-type]
        if not bool(loss.isfinite()):
            raise NonFiniteError("gradient_norms", expected="a finite loss", got=f"{float(loss.detach())}")
        inputs = [*(part.values for part in tokens.values()), *trained]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        outputs, by_parameter = gradients[: len(tokens)], dict(zip(trained, gradients[len(tokens) :], strict=True))
        rows = []
        for (name, part), output in zip(tokens.items(), outputs, strict=True):
            own = [by_parameter[p] for p in model.encoders[name].parameters() if p in by_parameter]
            has = len(part) > 0 and bool(part.present().any())
            rows.append([_norm(own, name) if has and own else math.nan, _norm([output], name) if has else math.nan])
        norms = torch.tensor([rows], dtype=torch.float64)
        return Output(features=norms, logits=norms)


def _norm(gradients: Sequence[Tensor | None], name: str) -> float:
    """Joint norm in at least float32; tensors that the loss does not depend on count as 0."""
    parts = [at_least_float32(part) for part in gradients if part is not None]
    norm = math.hypot(*(float(part.norm()) for part in parts))
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"gradient_norms '{name}'", expected="finite gradients", got="NaN or infinity, although the loss is finite"
        )
    return norm
