"""Damage of some samples of a batch by corruptions of the catalog, for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...data.corruptions import CORRUPTIONS, SEVERITIES, InputKind, corrupt_batch, infer_kind, replace_samples


def fitting_corruptions(
    values: Any, corruptions: Sequence[str], kind: str | None, name: str
) -> tuple[InputKind | None, list[str]]:
    """Returns the kind of an input, and the corruptions that fit it; none for inputs that are not tensors."""
    if not isinstance(values, Tensor) or values.ndim < 2 or not len(values):
        return None, []
    input_kind: Any = kind or infer_kind(values, f"ModalityCorruption '{name}'")
    return input_kind, [one for one in corruptions if input_kind in CORRUPTIONS[one].kinds]


def damage_samples(
    result: dict[str, Any],
    name: str,
    kind: InputKind | None,
    corruptions: Sequence[str],
    degree: Float[Tensor, " batch"],
    destroyed: Bool[Tensor, " batch"],
    valid: Bool[Tensor, "batch ..."],
    random: torch.Generator,
) -> Bool[Tensor, " batch"]:
    """Damages a modality of some samples: one corruption for those to destroy, another one for the others.

    Args:
        result: the batch; its input and mask of the modality are replaced.
        name, kind: the modality, and the kind of its input.
        corruptions: names that fit the kind.
        degree: above 0 for the samples to damage.
        destroyed: which of them to destroy, where one of the corruptions can.
        valid: which samples or tokens are valid.
        random: CPU generator.

    Returns:
        Which samples were destroyed.
    """
    batch = dict(result)
    statistics = _statistics(batch[name], valid)
    destroying = [one for one in corruptions if CORRUPTIONS[one].destroys]
    if not destroying:
        destroyed = torch.zeros_like(destroyed)
    partly = (degree > 0) & ~destroyed
    for candidates, hit, destroys in ((destroying, destroyed, True), (corruptions, partly, False)):
        if not candidates:
            continue
        chosen = candidates[int(torch.randint(len(candidates), (1,), generator=random))]
        severity = int(torch.randint(1, len(SEVERITIES) + 1, (1,), generator=random))
        # Corruptions of whole samples affect a fraction of them at lower severities; here they affect those of ``hit``.
        by_sample = CORRUPTIONS[chosen].function is None
        damaged = corrupt_batch(
            batch, name, chosen, severity=SEVERITIES[-1] if destroys or by_sample else severity, kind=kind,
            statistics=statistics, seed=random,
        )  # fmt: skip
        replace_samples(result, damaged, name, hit)
        if by_sample:
            destroyed = destroyed | hit
    return destroyed


def _statistics(values: Tensor, valid: Bool[Tensor, "batch ..."]) -> tuple[float, float]:
    """Mean and standard deviation of the valid values of an input; (0, 1) for token ids and without values."""
    chosen = values[valid.to(values.device)] if values.is_floating_point() else values[:0]
    chosen = chosen[chosen.isfinite()]
    return (float(chosen.mean()), float(chosen.float().std())) if chosen.numel() > 1 else (0.0, 1.0)
