"""Attention share of each modality as a torchmetrics metric, accumulated over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from ..errors import ConfigError, ShapeError


class ModalityShare(Metric):
    """Mean attention share of each head and modality over all samples and processes.

    Args:
        num_modalities: number of modalities of the share.
        heads: number of heads of the share.
        **options: of ``torchmetrics.Metric``.

    ``update(share)`` takes (sample, head, modality), such as ``Output.share``; NaN marks samples without the
    modality, which are excluded. ``compute()`` returns (head, modality), NaN without any sample. Sums are in float32;
    ``metric.set_dtype(torch.float64)`` keeps more digits over many millions of samples.

    Raises:
        ConfigError: no modality or no head. ShapeError: a share of another shape.

    A missing modality must be NaN: a share of 0 is included in the mean.

    Example:
        >>> metric = ModalityShare(2)
        >>> metric.update(torch.tensor([[[0.25, 0.75]], [[0.75, 0.25]], [[0.5, float("nan")]]]))
        >>> metric.compute()
        tensor([[0.5000, 0.5000]])
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, num_modalities: int, *, heads: int = 1, **options: Any) -> None:
        if num_modalities < 1 or heads < 1:
            raise ConfigError(
                "ModalityShare", expected="num_modalities >= 1 and heads >= 1", got=f"{num_modalities} and {heads}"
            )
        super().__init__(**options)
        self.add_state("total", torch.zeros(heads, num_modalities), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(heads, num_modalities, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, share: Float[Tensor, "sample head modality"]) -> None:
        """Adds the samples of one batch, which may be empty."""
        if share.ndim != 3 or share.shape[1:] != self.total.shape or not share.is_floating_point():
            raise ShapeError(
                "ModalityShare",
                expected=f"a float share (sample, head, modality) with (head, modality) = {tuple(self.total.shape)}",
                got=f"shape {tuple(share.shape)}, {share.dtype}",
            )
        share = share.detach().to(self.total)
        self.total += share.nansum(dim=0)
        self.samples += (~share.isnan()).sum(dim=0)

    def compute(self) -> Float[Tensor, "head modality"]:
        """Returns the mean shares."""
        return self.total / self.samples
