"""Replaces estimated reliability by values that the caller gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import ConfigError, unknown_name


def replace_reliability(
    reliability: Mapping[str, Tensor], given: float | Mapping[str, float | Tensor] | None,
    present: Bool[Tensor, "batch modality"], who: str,
) -> dict[str, Tensor]:  # fmt: skip
    """Replaces estimates by given values; missing modalities keep 0.

    Args:
        reliability: modality -> (batch,).
        given: a number for all modalities, or name -> number or (batch,) for some; None changes nothing.
        present: which modalities each sample has.
        who: used in errors.

    Raises:
        ConfigError: an unknown modality, or a value that is not in [0, 1].

    Example:
        >>> estimates, present = {"audio": torch.tensor([0.3])}, torch.ones(1, 1, dtype=torch.bool)
        >>> replace_reliability(estimates, 0.5, present, "example")
        {'audio': tensor([0.5000])}
    """
    result = dict(reliability)
    if given is None:
        return result
    values = given if isinstance(given, Mapping) else dict.fromkeys(reliability, given)
    for name in values:
        if name not in reliability:
            raise unknown_name(who, "modality", str(name), tuple(reliability))
    for index, (name, like) in enumerate(reliability.items()):
        if name not in values:
            continue
        value = torch.as_tensor(values[name], dtype=like.dtype, device=like.device)
        fits = value.ndim == 0 or value.shape == like.shape
        if not fits or not bool(((value >= 0) & (value <= 1)).all()):
            raise ConfigError(
                f"{who} '{name}'", expected=f"rho in [0, 1], a number or (batch,) = {tuple(like.shape)}",
                got=f"{value.tolist() if value.numel() < 5 else f'shape {tuple(value.shape)}'}",
            )  # fmt: skip
        result[name] = value.expand(like.shape).masked_fill(~present[:, index], 0.0)
    return result
