"""Squeeze-and-excitation gates between modalities, applied before any fusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...nn.distributed import all_reduce_sum
from ...tokens.token_batch import Output, Tokens


class CrossGate(nn.Module):
    """Squeeze and excitation over all modalities: one factor per channel of each modality's tokens.

    Args:
        names: the modalities.
        dim: width of their tokens.
        ratio: width of all pooled vectors together, times 2, divided by the width of the squeezed vector.

    Attributes:
        note: called with the sums over the gates of each training batch; see ``Balancer.note``.
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
            self._note_sums(
                gates.detach(), torch.stack([tokens[name].valid().any(dim=1) for name in self.names], dim=1)
            )
            gates = torch.where(self.held[:, None] > 0, self.mean.to(gates.dtype), gates)
        return {
            name: replace(tokens[name], values=tokens[name].values * gates[:, index, None])
            for index, name in enumerate(self.names)
        }

    def _note_sums(self, gates: Float[Tensor, "batch modality dim"], present: Tensor) -> None:
        sums = torch.cat([gates, torch.ones_like(gates[..., :1])], dim=-1).masked_fill(~present[..., None], 0.0)
        if self.note is not None:
            self.note("gates", sums.sum(dim=0, dtype=self.mean.dtype))

    def update_running_mean(self, sums: Float[Tensor, "modality dim1"]) -> None:
        """Updates the running means over all samples with the sums of one optimizer step, over all processes."""
        total, count = all_reduce_sum(sums).split([self.mean.shape[1], 1], dim=1)
        self.seen += count[:, 0].long()
        # An incremental mean: no sum grows without bound.
        self.mean += (total - count * self.mean) / self.seen.clamp(min=1)[:, None]


class GatedTokens(nn.Module):
    """A fusion that is applied to gated tokens; other attributes are those of the inner fusion.

    The returned output contains the tokens before the gates, so that unimodal heads use one modality only.
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
