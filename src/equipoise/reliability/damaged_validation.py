"""Validation data with random damage, and the statistics of the training data that noise has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    InputKind,
    check_corruptions,
    corrupt_batch,
    corruption_names,
    infer_kind,
    replace_samples,
)
from ..diagnostics.prediction_collection import valid_of
from ..errors import ConfigError, ShapeError

COPIES = 6
"""Number of damaged copies of each validation sample."""
PROBABILITY, REPLACED = 0.4, 0.5
"""Probability of damage for each modality, and of noise that replaces the input: those of training with corruption."""


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


def damaged_batch(
    batch: Mapping[str, Any], names: Sequence[str], moments: InputMoments, random: torch.Generator,
    corruptions: Sequence[str], kinds: Mapping[str, InputKind],
) -> dict[str, Any]:  # fmt: skip
    """Damages modalities of random samples, but never all modalities of a sample.

    Each damaged input has a corruption of its own, drawn from those that fit it, at a random severity. Inputs that are
    no kind of the catalog are mixed with white noise, ``x <- sqrt(1 - d^2) x + d noise``, with d = 1 for half of them
    and uniform in (0, 1) for the others. Integer tensors in a mapping are unchanged."""
    result = dict(batch)
    count = len(batch["target"])
    drawn = torch.rand(3, count, len(names), generator=random)
    hit = drawn[0] < PROBABILITY
    if len(names) > 1:
        spared = torch.nn.functional.one_hot(drawn[1].argmax(dim=1), len(names)).bool()
        hit &= ~(hit.all(dim=1, keepdim=True) & spared)
    for index, name in enumerate(names):
        value = batch[name]
        if value is None:
            continue
        kind = kinds.get(name) or _kind(value)
        fitting = [one for one in corruptions if kind in CORRUPTIONS[one].kinds]
        if fitting:
            chosen = (drawn[2, :, index] * len(fitting)).long()
            for number, corruption in enumerate(fitting):
                severity = SEVERITIES[int(torch.randint(len(SEVERITIES), (1,), generator=random))]
                affected = hit[:, index] & (chosen == number)
                # A generator of its own: another list of corruptions does not change the damage of this one.
                own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=random)))
                if bool(affected.any()):
                    by_sample = CORRUPTIONS[corruption].function is None
                    damaged = corrupt_batch(
                        batch, name, corruption, severity=SEVERITIES[-1] if by_sample else severity, kind=kind,
                        statistics=moments.of(name), seed=own,
                    )  # fmt: skip
                    replace_samples(result, damaged, name, affected)
        elif kind is None:
            u = drawn[2, :, index]
            degree = torch.where(u < REPLACED, 1.0, (u - REPLACED) / (1 - REPLACED)).where(hit[:, index], 0.0)
            parts = {key: _mix(part, degree, moments.of(name, key), random) for key, part in _floating(value).items()}
            result[name] = {**value, **parts} if isinstance(value, Mapping) else parts.get("", value)
    return result


def check_calibration_corruptions(corruptions: Sequence[str] | None) -> list[str]:
    """Returns the corruptions of the calibration; by default all but ``missing``, which changes the mask.

    Raises:
        ConfigError: an unknown corruption, or none.
    """
    names = list(corruption_names() if corruptions is None else dict.fromkeys(corruptions))
    check_corruptions(names, "Reliability.fit")
    names = [name for name in names if name != "missing"]
    if not names:
        raise ConfigError("Reliability.fit", expected="one or more corruptions other than 'missing'", got="none")
    return names


def _kind(value: Any) -> InputKind | None:
    """Kind of an input in the catalog; None for others, such as mappings and videos."""
    if not isinstance(value, Tensor):
        return None
    try:
        return infer_kind(value)
    except ShapeError:
        return None


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
