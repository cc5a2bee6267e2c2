"""What is left of the score when a modality is taken away, with the weights as they are (spec 8.5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import unknown_name
from .modality_ablation import TAKING, Semantics, ablated_logits, record_fusion
from .task_scores import outcomes, score_name


@dataclass(frozen=True)
class Masking:
    """The score with every modality, and with one of them taken away.

    Attributes:
        semantics: "mask" or "zero".
        full: score of the model as it is: accuracy, or minus the mean absolute error of a regression.
        without: name -> score without that modality.
        drop: name -> full minus without.
        outcomes: name -> (sample,) the outcome of every sample without that modality, whose mean is the score.
    """

    semantics: Semantics
    full: float
    without: dict[str, float]
    drop: dict[str, float]
    outcomes: dict[str, Tensor] = field(default_factory=dict, repr=False)


def mask_modality(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    modality: str | None = None,
    semantics: Semantics = "mask",
) -> Masking:
    """Takes a modality away from a trained model and measures the score that is left.

    ``"mask"``: none of its tokens is a key of any query in any layer of the fusion, and static fusions pool nothing of
    it; the same as a batch that lacks it. ``"zero"``: its tokens are zeros that still take part: a static fusion reads
    a zero vector, and attention goes on spending a share on them. A model that was trained with neither has never seen
    such inputs.

    Args:
        model: a FusionModel.
        loader: batches, dicts with every modality and targets. The encoders run once for each batch.
        modality: the one that is taken away; by default each in turn.
        semantics: "mask" or "zero".

    Returns:
        Masking. A drop near 0 says that the model does without the modality, not that the modality says nothing: two
        that say the same can each be spared (``modality_shapley`` divides that fairly).

    Raises:
        ConfigError: a model that is no FusionModel, an unknown modality or semantics. ShapeError: no batch, no targets.
        NonFiniteError: answers that are NaN.

    Reference: RollingQ (ICML 2025), Table 8; spec 8.5.
    Differs from the paper in: any number of modalities; zeroing has a name of its own.
    """
    if semantics not in TAKING:
        raise unknown_name("mask_modality", "semantics", str(semantics), TAKING)
    names = record_fusion(model, "mask_modality").names
    if modality is not None and modality not in names:
        raise unknown_name("mask_modality", "modality", modality, names)
    chosen = names if modality is None else (modality,)
    seen = ablated_logits(model, loader, [(), *((name,) for name in chosen)], semantics=semantics)
    full, *rest = (score_name(model, part, seen.target, "mask_modality") for part in seen.logits.unbind(dim=1))
    without = dict(zip(chosen, rest, strict=True))
    drop = {name: full - left for name, left in without.items()}
    kept = [outcomes(part, seen.target, model.task) for part in seen.logits[:, 1:].unbind(dim=1)]  # type: ignore[arg-type]
    return Masking(semantics, full, without, drop, dict(zip(chosen, kept, strict=True)))
