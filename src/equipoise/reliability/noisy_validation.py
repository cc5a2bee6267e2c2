"""Validation data with white noise of random degree, and the statistics of the training data that the noise has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.corruptions import corrupt_input
from ..diagnostics.prediction_collection import valid_of
from ..errors import ShapeError

COPIES = 4
"""Number of noisy copies of each validation sample."""
PROBABILITY, REPLACED = 0.4, 0.5
"""Probability of noise for each modality, and of noise that replaces the input: those of training with corruption."""


class InputMoments:
    """Mean and standard deviation of the floating inputs of each modality and of the targets, over all batches."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._target: Tensor | None = None
        self.batches = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Adds the valid, finite values of a batch."""
        self.batches += 1
        for name in self.names:
            for key, values in _floating(batch.get(name)).items():
                values = values[valid_of(batch, name, values).expand(values.shape)].double()
                values = values[values.isfinite()]
                self._sums[name, key] = self._sums.get((name, key), 0) + _moments(values)
        target = batch["target"].double().cpu().reshape(len(batch["target"]), -1)
        parts = torch.stack([torch.full_like(target[0], len(target)), target.sum(dim=0), target.square().sum(dim=0)])
        self._target = parts if self._target is None else self._target + parts

    def check(self, who: str) -> None:
        """Raises ShapeError if no batch was added."""
        if not self.batches:
            raise ShapeError(
                who, expected="at least one batch", got="none", fix="Is the split empty, or the iterator used up?"
            )

    def of(self, name: str, key: str = "") -> tuple[float, float]:
        """Returns (mean, standard deviation) of an input; (0, 1) without values."""
        count, total, squares = self._sums.get((name, key), torch.zeros(3)).tolist()
        if not count:
            return 0.0, 1.0
        mean = total / count
        return mean, max(squares / count - mean * mean, 0.0) ** 0.5

    def target(self) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation (output,) of the targets; 1 in place of a deviation of 0."""
        assert self._target is not None
        count, total, squares = self._target
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        return mean, std.where(std > 1e-12, 1.0)


def noisy_batch(
    batch: Mapping[str, Any], names: Sequence[str], moments: InputMoments, random: torch.Generator
) -> dict[str, Any]:
    """Mixes white noise with modalities of random samples, ``x <- sqrt(1 - d^2) x + d noise``.

    d = 1 for half of these, and uniform in (0, 1) for the others. Token ids are replaced by others of the batch with
    probability d. Integer tensors in a mapping are unchanged.
    """
    result = dict(batch)
    masks = batch.get("mask") or {}
    for name in names:
        value = batch[name]
        if value is None:
            continue
        drawn = torch.rand(2, len(batch["target"]), generator=random)
        hit, u = drawn[0] < PROBABILITY, drawn[1]
        degree = torch.where(u < REPLACED, 1.0, (u - REPLACED) / (1 - REPLACED)).where(hit, 0.0)
        parts = {key: _mix(part, degree, moments.of(name, key), random) for key, part in _floating(value).items()}
        if isinstance(value, Mapping):
            result[name] = {**value, **parts}
        elif parts:
            result[name] = parts[""]
        elif isinstance(value, Tensor) and value.ndim == 2 and value.dtype != torch.bool:
            other = corrupt_input(value, "replaced", kind="tokens", mask=masks.get(name), seed=random).values
            chosen = torch.rand(value.shape, generator=random) < degree[:, None]
            result[name] = torch.where(chosen.to(value.device), other, value)
    return result


def _mix(values: Tensor, degree: Tensor, statistics: tuple[float, float], random: torch.Generator) -> Tensor:
    mean, std = statistics
    noise = mean + std * torch.randn(values.shape, generator=random).to(values)
    degree = degree.reshape(-1, *[1] * (values.ndim - 1)).to(values)
    mixed = (1 - degree.square()).clamp(min=0).sqrt() * values + degree * noise
    # Destroyed values may have been NaN.
    return torch.where(degree >= 1, noise, torch.where(degree > 0, mixed, values))


def _floating(value: Any) -> dict[str, Tensor]:
    """The floating tensors of an input by key; a single tensor has the key ''."""
    parts = value if isinstance(value, Mapping) else {"": value}
    return {
        key: part for key, part in parts.items() if isinstance(part, Tensor) and part.is_floating_point() and part.ndim
    }


def _moments(values: Tensor) -> Tensor:
    count = torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
    return torch.stack([count, values.sum(), values.square().sum()]).cpu()
