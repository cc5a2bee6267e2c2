"""Data on which reliability is calibrated: evidence, predictions of all subsets, and targets of damaged samples."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MOST_VALUES = 8_000_000
"""Largest number of logits that are kept; a random subset of the samples is kept above it."""


class CalibrationRecords:
    """Collects damaged validation samples in batches.

    Args:
        random: generator that selects the samples that are kept.
    """

    def __init__(self, random: torch.Generator) -> None:
        self._random = random
        self._parts: list[list[Tensor]] = []
        self._keys: list[Tensor] = []
        self._kept = 0

    def add(
        self,
        evidence: Float[Tensor, "batch modality evidence"],
        logits: Float[Tensor, "batch subset output"],
        target: Tensor,
        present: Bool[Tensor, "batch modality"],
    ) -> None:
        """Adds samples whose predictions are finite; a modality without finite evidence counts as missing."""
        present = present & evidence.isfinite().all(dim=-1)
        valid = present.any(dim=1) & logits.flatten(1).isfinite().all(dim=1)
        columns = (evidence, logits, target.to(valid.device), present)
        part = [values[valid].detach().cpu() for values in columns]
        self._parts.append(part)
        self._keys.append(torch.rand(len(part[0]), generator=self._random, dtype=torch.float64))
        self._kept += len(part[0])
        if self._kept > 2 * self._limit():
            self._reduce()

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns evidence and logits in float64, targets, and which modalities the samples have."""
        self._reduce()
        evidence, logits, target, present = self._parts[0]
        return evidence.double(), logits.double(), target, present

    def count(self) -> list[int]:
        """Returns the number of samples with each modality."""
        return torch.cat([part[3] for part in self._parts]).sum(dim=0).tolist() if self._parts else []

    def _limit(self) -> int:
        return max(1, MOST_VALUES // max(1, self._parts[0][1].shape[1:].numel()))

    def _reduce(self) -> None:
        columns = [torch.cat(values) for values in zip(*self._parts, strict=True)]
        keys = torch.cat(self._keys)
        if len(keys) > self._limit():
            # The smallest of independent uniform numbers select a uniform random subset, in the order of the samples.
            kept = keys.argsort()[: self._limit()].sort().values
            columns, keys = [values[kept] for values in columns], keys[kept]
        self._parts, self._keys, self._kept = [columns], [keys], len(keys)
