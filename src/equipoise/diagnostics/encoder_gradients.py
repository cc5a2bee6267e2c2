"""How much the fused loss teaches each encoder: norms of its gradients (spec 8.8)."""

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
from ..tokens.token_batch import Output
from .modality_ablation import FusedLogits, record_fusion
from .prediction_collection import collect_predictions


@dataclass(frozen=True)
class GradientNorms:
    """Mean over batches of the norms of the task loss's gradients.

    Attributes:
        parameters: name -> norm over all parameters of the encoder; NaN for one that is frozen.
        outputs: name -> norm at the encoder's output, over all tokens of a batch.
        ratio: name -> its ``parameters`` over the mean of the others'; NaN without others.
        output_ratio: the same of ``outputs``.
        batches: how many were seen.
    """

    parameters: dict[str, float]
    outputs: dict[str, float]
    ratio: dict[str, float]
    output_ratio: dict[str, float]
    batches: int


def gradient_norms(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], *, max_batches: int | None = None
) -> GradientNorms:
    """Norms of the gradients that the fused answer's loss, and nothing else, sends to each encoder::

        g_m = mean over batches of sqrt(sum over parameters of encoder m of |dL/dtheta|^2)

    Nothing is changed: no ``.grad`` is written, modes and random state come back. Losses of unimodal heads, penalties,
    clipping and modulation by balancers have no part in it, and there is no dropout.

    Args:
        model: a FusionModel.
        loader: batches, dicts with every modality and targets.
        max_batches: stop after so many.

    Returns:
        GradientNorms. A batch in which no sample has a modality does not count for it; NaN where no batch does. Norms
        of parameters grow with the encoder's size and with what it is fed, so across encoders of different kinds
        ``outputs`` says more. A small norm may also mean that there is nothing left to learn. Norms of a mean over a
        batch shrink as batches grow: compare at one batch size.

    Raises:
        ConfigError: a model that is no FusionModel, max_batches below 1. ShapeError: no batch, no targets.
        NonFiniteError: a loss that is NaN or infinite.

    Reference: RollingQ (ICML 2025), Figure 7; spec 8.8.
    Differs from the paper in: evaluation mode, on any data, instead of along the training; norms at the outputs too.
    """
    if max_batches is not None and max_batches < 1:
        raise ConfigError("gradient_norms", expected="max_batches >= 1 or None", got=str(max_batches))
    names = record_fusion(model, "gradient_norms").names
    norms = collect_predictions(_Differentiated(model), islice(loader, max_batches)).logits
    parameters, outputs = norms.nanmean(dim=0).T
    named = (parameters, outputs, ratios(parameters), ratios(outputs))
    return GradientNorms(*(dict(zip(names, values.tolist(), strict=True)) for values in named), batches=len(norms))


def ratios(norms: Float[Tensor, " modality"]) -> Float[Tensor, " modality"]:
    """Each norm over the mean of the others; those that are NaN do not count.

    Example:
        >>> ratios(torch.tensor([6.0, 2.0, 4.0]))
        tensor([2.0000, 0.4000, 1.0000])
    """
    beside = norms.expand(len(norms), -1).masked_fill(torch.eye(len(norms), dtype=torch.bool), torch.nan)
    return norms / beside.nanmean(dim=1)


class _Differentiated(nn.Module):
    """A model whose logits are (1, modality, 2): of one batch, the norms at each encoder's parameters and output."""

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
        wanted = [*(part.values for part in tokens.values()), *trained]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        outputs, of = found[: len(tokens)], dict(zip(trained, found[len(tokens) :], strict=True))
        rows = []
        for (name, part), output in zip(tokens.items(), outputs, strict=True):
            own = [of[parameter] for parameter in model.encoders[name].parameters() if parameter in of]
            has = len(part) > 0 and bool(part.present().any())
            rows.append([_norm(own, name) if has and own else math.nan, _norm([output], name) if has else math.nan])
        norms = torch.tensor([rows], dtype=torch.float64)
        return Output(features=norms, logits=norms)


def _norm(gradients: Sequence[Tensor | None], name: str) -> float:
    """Of all together, in float32 at least; what the loss does not hang on counts as 0."""
    known = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in gradients if part is not None]
    norm = math.hypot(*(float(part.norm()) for part in known))
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"gradient_norms '{name}'", expected="finite gradients", got="NaN or infinity, although the loss is finite"
        )
    return norm
