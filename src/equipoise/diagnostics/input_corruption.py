"""Corruption of the inputs of one modality at a given level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError, unknown_name

Kind = Literal["additive", "mix", "prob", "multibench_audio", "multibench_timeseries"]
AUDIO_RUN, TIMESERIES_RUN = 10, 3
"""Number of consecutive steps that MultiBench drops."""


def corrupt(
    values: Float[Tensor, "sample ..."], level: float, kind: Kind, generator: torch.Generator, std: float = 1.0
) -> Float[Tensor, "sample ..."]:
    """Corrupts inputs at level p, with e standard normal and sigma = ``std``::

        additive                x + p sigma e
        mix                     (1 - p) x + p sigma e
        prob                    sigma e for a whole sample, with probability p
        multibench_audio        with probability p, one of: x + p e; steps dropped with probability p; runs of 10 steps
                                dropped that start at a step with probability p
        multibench_timeseries   x + p e, e the same for all values of a step; then single values dropped with
                                probability p; then runs of 3 steps that start at a step with probability p

    Args:
        values: (sample, ...); the MultiBench kinds take (sample, step, ...). Dropped values are 0.
        level: p, from 0 to 1. Level 0 returns the values unchanged, bit for bit.
        kind: one of the above.
        generator: on the CPU, whatever the device of the values. From the same state, another level has the same
            numbers: what a low level drops, a higher one drops too.
        std: of the data as the model sees them; the MultiBench kinds take p itself.

    Raises:
        ConfigError: an unknown kind, a level outside [0, 1]. ShapeError: values that are not floating-point, or have
            no step dimension.

    Reference: Liang et al., "MultiBench: Multiscale Benchmarks for Multimodal Representation Learning" (NeurIPS
    2021); RollingQ (ICML 2025), Table 3.
    Differs from the released code in: samples that are not selected keep their values (the audio code of MultiBench
    sets them to 0); runs may start anywhere and overlap, and do not depend on other samples of the batch.

    Example:
        >>> values = torch.ones(2, 3)
        >>> corrupt(values, 0.25, "mix", torch.Generator(), std=0.0)
        tensor([[0.7500, 0.7500, 0.7500],
                [0.7500, 0.7500, 0.7500]])
    """
    check_corruption(kind, level, "corrupt")
    needs = 2 if kind.startswith("multibench") else 1
    if not values.is_floating_point() or values.ndim < needs:
        raise ShapeError(
            "corrupt",
            expected=f"floating values (sample, {'step, ' if needs == 2 else ''}...) for '{kind}'",
            got=f"shape {tuple(values.shape)}, {values.dtype}",
        )
    return values if level == 0 else KINDS[kind](values, level, generator, std)


def check_corruption(kind: str, level: float, who: str) -> None:
    """Raises ConfigError for an unknown kind or a level outside [0, 1]."""
    if kind not in KINDS:
        raise unknown_name(who, "kind", str(kind), KINDS)
    if not 0 <= level <= 1:
        raise ConfigError(who, expected="a level from 0 to 1", got=str(level))


def _additive(values: Tensor, level: float, generator: torch.Generator, std: float) -> Tensor:
    return values + level * std * _normal(values, generator, values.ndim)


def _mix(values: Tensor, level: float, generator: torch.Generator, std: float) -> Tensor:
    return (1 - level) * values + level * std * _normal(values, generator, values.ndim)


def _prob(values: Tensor, level: float, generator: torch.Generator, std: float) -> Tensor:
    noise = std * _normal(values, generator, values.ndim)
    return torch.where(_chance(values, level, generator, 1), noise, values)


def _audio(values: Tensor, level: float, generator: torch.Generator, std: float) -> Tensor:
    selected = _chance(values, level, generator, 1)
    choice = _spread(torch.randint(3, values.shape[:1], generator=generator).to(values.device), values)
    noisy = values + level * _normal(values, generator, values.ndim)
    dropped = _chance(values, level, generator, 2)
    runs = _runs(_chance(values, level, generator, 2), AUDIO_RUN)
    gone = (choice == 1) & dropped | (choice == 2) & runs
    return torch.where(selected, torch.where(choice == 0, noisy, values.masked_fill(gone, 0.0)), values)


def _timeseries(values: Tensor, level: float, generator: torch.Generator, std: float) -> Tensor:
    noisy = values + level * _normal(values, generator, 2)
    dropped = _chance(values, level, generator, values.ndim)
    return noisy.masked_fill(dropped | _runs(_chance(values, level, generator, 2), TIMESERIES_RUN), 0.0)


KINDS: dict[str, Callable[[Tensor, float, torch.Generator, float], Tensor]] = {
    "additive": _additive,
    "mix": _mix,
    "prob": _prob,
    "multibench_audio": _audio,
    "multibench_timeseries": _timeseries,
}


def _normal(values: Tensor, generator: torch.Generator, axes: int) -> Tensor:
    """Standard normal numbers for the first axes of the values, broadcast along the others."""
    return _spread(torch.randn(values.shape[:axes], generator=generator).to(values), values)


def _chance(values: Tensor, level: float, generator: torch.Generator, axes: int) -> Tensor:
    """True with probability ``level``, for the first axes of the values."""
    return _spread((torch.rand(values.shape[:axes], generator=generator) < level).to(values.device), values)


def _spread(drawn: Tensor, values: Tensor) -> Tensor:
    return drawn.reshape(*drawn.shape, *[1] * (values.ndim - drawn.ndim))


def _runs(starts: Bool[Tensor, "sample step ..."], length: int) -> Bool[Tensor, "sample step ..."]:
    """True for the steps at which a run starts, and the ``length - 1`` steps after each."""
    count = starts.long().cumsum(dim=1)
    earlier = F.pad(count.movedim(1, -1), (length, 0))[..., : count.shape[1]].movedim(-1, 1)
    return count > earlier
