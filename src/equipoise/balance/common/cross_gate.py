"""Gates between modalities, in front of any fusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...tokens.token_batch import Output, Tokens
from .unimodal_scores import summed


class CrossGate(nn.Module):
    """Squeeze and excitation over all modalities: a factor for every channel of every modality's tokens.

    Args:
        names: the modalities.
        dim: width of their tokens.
        ratio: the squeezed vector is 2 / ratio times as wide as all pooled vectors together.

    Attributes:
        note: is given the sums over a training batch's gates, as ``Balancer.note``.
    """

    def __init__(self, names: tuple[str, ...], dim: int, ratio: float) -> None:
        super().__init__()
        self.names, width = names, max(1, int(2 * len(names) * dim / ratio))
        self.squeeze = nn.Linear(len(names) * dim, width)
        self.excite = nn.ModuleDict({name: nn.Linear(width, dim) for name in names})
        # Not bool: torch.optim.swa_utils.AveragedModel cannot subtract it.
        self.register_buffer("held", torch.zeros(len(names), dtype=torch.uint8))
        self.register_buffer("mean", torch.ones(len(names), dim))
        self.register_buffer("seen", torch.zeros(len(names), dtype=torch.long))
        self.note: Callable[[str, Tensor], None] | None = None

    held: Tensor
    mean: Tensor
    seen: Tensor

    def forward(self, tokens: Mapping[str, Tokens]) -> dict[str, Tokens]:
        pooled = torch.cat([tokens[name].pooled() for name in self.names], dim=-1)
        squeezed = self.squeeze(pooled).relu()
        gates = torch.stack([2 * self.excite[name](squeezed).sigmoid() for name in self.names], dim=1)
        if self.training:
            self._sum_up(gates.detach(), torch.stack([tokens[name].valid().any(dim=1) for name in self.names], dim=1))
            gates = torch.where(self.held[:, None] > 0, self.mean.to(gates.dtype), gates)
        return {
            name: replace(tokens[name], values=tokens[name].values * gates[:, place, None])
            for place, name in enumerate(self.names)
        }

    def _sum_up(self, gates: Float[Tensor, "batch modality dim"], present: Tensor) -> None:
        kept = torch.cat([gates, torch.ones_like(gates[..., :1])], dim=-1).masked_fill(~present[..., None], 0.0)
        if self.note is not None:
            self.note("gates", kept.sum(dim=0, dtype=self.mean.dtype))

    def settle(self, sums: Float[Tensor, "modality dim1"]) -> None:
        """Moves the running means, over all samples so far, by those of one optimizer step on all processes."""
        total, count = summed(sums).split([self.mean.shape[1], 1], dim=1)
        self.seen += count[:, 0].long()
        # A mean moves by its newcomers' part of all, so nothing grows without bound.
        self.mean += (total - count * self.mean) / self.seen.clamp(min=1)[:, None]


class GatedTokens(nn.Module):
    """A fusion with gates in front; everything else about it is the fusion's own.

    The tokens that it returns are those of the encoders, so that unimodal heads do not see the other modalities.
    """

    def __init__(self, inner: nn.Module, gate: CrossGate) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("inner")
            if inner is None:
                raise
            return getattr(inner, name)

    def forward(self, tokens: Mapping[str, Tokens]) -> Output:
        fused = self.inner(self.gate(tokens))
        return fused.with_(tokens={name: tokens[name] for name in fused.tokens})
