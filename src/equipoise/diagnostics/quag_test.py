"""Score with attention averaged within quadrants of modalities (QUAG)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..results.task_metrics import Metric
from ..tokens.token_batch import Output
from .attention_changes import QuagAveraging
from .interventions import Intervention, apply_intervention
from .modality_ablation import record_fusion
from .prediction_collection import collect_predictions
from .quag_operators import ClsRows, chosen_operators
from .task_scores import outcomes, score_name


@dataclass(frozen=True)
class Quag:
    """The score without averaging and under each operator.

    Attributes:
        origin: score without averaging: accuracy, or minus the mean absolute error of a regression, or ``metric``.
        scores: operator -> score.
        drops: operator -> origin minus score.
        changed: operator -> attention layers in which it was applied; without any, the score equals the origin.
        outcomes: operator -> (sample,) outcome of each sample; the mean is the score of the task.
        logits: operator -> (sample, output) predictions.
    """

    origin: float
    scores: dict[str, float]
    drops: dict[str, float]
    changed: dict[str, tuple[str, ...]]
    outcomes: dict[str, Tensor] = field(default_factory=dict, repr=False)
    logits: dict[str, Tensor] = field(default_factory=dict, repr=False)


def quag(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    operators: Sequence[str] | None = None,
    cls_rows: ClsRows = "keys",
    metric: str | Metric | None = None,
) -> Quag:
    """Averages attention inside quadrants and measures the score, without retraining.

    A'_ij = mean of A_ij' over the keys j' of j's modality visible to i, if (modality of i, modality of j) is a
    quadrant of the operator; in every head of every attention layer of the fusion with known key labels.

    Args:
        model: a FusionModel with attention.
        loader: batches, dicts with every modality and targets. The encoders run once for each batch.
        operators: some of "unimodal", "crossmodal", "avg-<name>", "all"; by default all with a quadrant.
        cls_rows: treatment of a class token as query: ``"keys"`` averages it for "avg-..." and "all", ``"skip"`` never,
            ``"all"`` for every operator.
        metric: name of a metric of ``equipoise.results`` that replaces the score of the task.

    Returns:
        Quag. A small drop means that the mean of the tokens in the quadrant is sufficient. If only a class token
        attends, as in joint attention of depth 1, "unimodal" and "crossmodal" have no effect.

    Raises:
        ConfigError: the model is not a FusionModel, a static fusion, or an unknown operator or cls_rows. ShapeError: no
            batch, or no targets. NonFiniteError: a prediction is NaN.

    Reference: RollingQ (ICML 2025), Table 9; Rawal et al., *Dissecting Multimodality in VideoQA Transformer Models by
    Impairing Modality Fusion* (ICML 2024).
    Differs from the paper in: any number of modalities; the treatment of the class token is an option.
    """
    names = record_fusion(model, "quag").names
    chosen = chosen_operators(names, operators, cls_rows)
    interventions = [Intervention("quag", QuagAveraging(name, cls_rows)) for name in chosen]
    for one in interventions:
        one.check(names)
    predictions = collect_predictions(_Averaged(model, interventions), loader)
    origin, *rest = (
        score_name(model, part, predictions.target, "quag", metric) for part in predictions.logits.unbind(dim=1)
    )
    scores = dict(zip(chosen, rest, strict=True))
    drops = {name: origin - score for name, score in scores.items()}
    task = str(model.task)
    averaged_outcomes = [outcomes(part, predictions.target, task) for part in predictions.logits[:, 1:].unbind(dim=1)]
    changed = {name: one.changed for name, one in zip(chosen, interventions, strict=True)}
    logits = dict(zip(chosen, predictions.logits[:, 1:].unbind(dim=1), strict=True))
    return Quag(origin, scores, drops, changed, dict(zip(chosen, averaged_outcomes, strict=True)), logits)


class _Averaged(nn.Module):
    """Encodes a batch once and fuses it without averaging and under each intervention."""

    def __init__(self, model: nn.Module, interventions: Sequence[Intervention]) -> None:
        super().__init__()
        self.model, self.interventions, self.names = model, interventions, model.names

    def forward(self, batch: Mapping[str, Any]) -> Output:
        tokens = self.model.encode(batch)  # type: ignore[operator]
        outputs = [self.model.fuse(tokens)]  # type: ignore[operator]
        for one in self.interventions:
            with apply_intervention(self.model, one):
                outputs.append(self.model.fuse(tokens))  # type: ignore[operator]
            if not one.met:
                raise _static(self.model)
        logits = torch.stack([output.logits for output in outputs], dim=1)
        return Output(features=logits, logits=logits)


def _static(model: nn.Module) -> ConfigError:
    return ConfigError(
        "quag",
        expected="a fusion with attention over keys whose modalities are known",
        got=f"{(getattr(model, 'adapted_class', None) or type(getattr(model, 'fusion', model))).__name__}, which has "
        f"none",
        fix="Static fusions have no attention to average; use mask_modality instead.",
    )
