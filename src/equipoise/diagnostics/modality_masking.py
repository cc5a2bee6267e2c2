"""Score with modalities masked or zeroed, without retraining."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import unknown_name
from ..results.task_metrics import Metric
from .modality_ablation import ABLATIONS, Semantics, ablated_logits, record_fusion
from .task_scores import outcomes, score_name


@dataclass(frozen=True)
class Masking:
    """The score with all modalities and without each of them.

    Attributes:
        semantics: "mask" or "zero".
        full: score with all modalities: accuracy, or minus the mean absolute error of a regression, or ``metric``.
        without: name -> score without that modality.
        drop: name -> full minus without.
        outcomes: name -> (sample,) outcome of each sample without that modality; the mean is the score of the task.
        logits: name -> (sample, output) predictions without that modality.
    """

    semantics: Semantics
    full: float
    without: dict[str, float]
    drop: dict[str, float]
    outcomes: dict[str, Tensor] = field(default_factory=dict, repr=False)
    logits: dict[str, Tensor] = field(default_factory=dict, repr=False)


def mask_modality(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    modality: str | None = None,
    semantics: Semantics = "mask",
    metric: str | Metric | None = None,
) -> Masking:
    """Removes a modality from the input of the fusion of a trained model and measures the score.

    ``"mask"``: the tokens of the modality are masked in every layer of the fusion and excluded from pooling, as in a
    batch that lacks it. ``"zero"``: the tokens are replaced by zeros and still take part: a static fusion receives a
    zero vector, and attention still assigns a share to them. Both inputs are out of distribution for a model that was
    not trained with them. A model of ``eq.adapt`` takes no masks of tokens: ``"zero"`` is then used for both.

    Args:
        model: a FusionModel.
        loader: batches, dicts with every modality and targets. The encoders run once for each batch.
        modality: the modality to remove; by default each in turn.
        semantics: "mask" or "zero".
        metric: name of a metric of ``equipoise.results`` that replaces the score of the task.

    Returns:
        Masking. A drop near 0 means that the model does not need the modality given the others, not that the modality
        is uninformative: either of two redundant modalities can be removed (``modality_shapley`` divides their
        contribution).

    Raises:
        ConfigError: the model is not a FusionModel, or an unknown modality or semantics. ShapeError: no batch, or no
        targets. NonFiniteError: a prediction is NaN.

    Reference: RollingQ (ICML 2025), Table 8.
    Differs from the paper in: any number of modalities; zeroing is a separate option.
    """
    if semantics not in ABLATIONS:
        raise unknown_name("mask_modality", "semantics", str(semantics), ABLATIONS)
    names = record_fusion(model, "mask_modality").names
    if not getattr(model, "masks_tokens", True):
        semantics = "zero"
    if modality is not None and modality not in names:
        raise unknown_name("mask_modality", "modality", modality, names)
    chosen = names if modality is None else (modality,)
    predictions = ablated_logits(model, loader, [(), *((name,) for name in chosen)], semantics=semantics)
    full, *rest = (
        score_name(model, part, predictions.target, "mask_modality", metric)
        for part in predictions.logits.unbind(dim=1)
    )
    without = dict(zip(chosen, rest, strict=True))
    drop = {name: full - left for name, left in without.items()}
    task = str(model.task)
    masked_outcomes = [outcomes(part, predictions.target, task) for part in predictions.logits[:, 1:].unbind(dim=1)]
    logits = dict(zip(chosen, predictions.logits[:, 1:].unbind(dim=1), strict=True))
    return Masking(semantics, full, without, drop, dict(zip(chosen, masked_outcomes, strict=True)), logits)
