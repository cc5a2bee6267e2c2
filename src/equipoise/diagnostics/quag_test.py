"""What is left of the score when attention no longer tells one token of a modality from another (spec 8.6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Output
from .attention_changes import QuagAveraging
from .interventions import Intervention, apply_intervention
from .modality_ablation import record_fusion
from .prediction_collection import collect_predictions
from .quag_operators import ClsRows, chosen_operators
from .task_scores import outcomes, score_name


@dataclass(frozen=True)
class Quag:
    """The score as it is, and under each operator.

    Attributes:
        origin: score of the model as it is: accuracy, or minus the mean absolute error of a regression.
        scores: operator -> score.
        drops: operator -> origin minus score.
        changed: operator -> the attention layers in which it averaged anything; where there is none the score is the
            origin.
        outcomes: operator -> (sample,) the outcome of every sample, whose mean is the score.
    """

    origin: float
    scores: dict[str, float]
    drops: dict[str, float]
    changed: dict[str, tuple[str, ...]]
    outcomes: dict[str, Tensor] = field(default_factory=dict, repr=False)


def quag(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    operators: Sequence[str] | None = None,
    cls_rows: ClsRows = "keys",
) -> Quag:
    """Averages attention inside quadrants and measures the score that is left; nothing is trained again.

    A'_ij = mean of A_ij' over the keys j' of j's modality that i sees, where (modality of i, modality of j) is a
    quadrant of the operator; in every attention layer of the fusion that knows its keys, every head.

    Args:
        model: a FusionModel with attention.
        loader: batches, dicts with every modality and targets. The encoders run once for each batch.
        operators: some of "unimodal", "crossmodal", "avg-<name>", "all"; by default all that have a quadrant.
        cls_rows: what a class token does that reads: ``"keys"`` it takes part in "avg-..." and "all", ``"skip"`` in
            nothing, ``"all"`` in everything.

    Returns:
        Quag. A small drop says that the model does not need to tell apart the tokens that it reads there: it would do
        with their mean. Where a class token alone reads, as in joint attention of depth 1, "unimodal" and "crossmodal"
        change nothing.

    Raises:
        ConfigError: a model that is no FusionModel, a static fusion, an unknown operator or cls_rows. ShapeError: no
            batch, no targets. NonFiniteError: answers that are NaN.

    Reference: RollingQ (ICML 2025), Table 9; Rawal et al., *Dissecting Multimodality in VideoQA Transformer Models by
    Impairing Modality Fusion* (ICML 2024); spec 8.6.
    Differs from the paper in: any number of modalities; the class token's part has a name.
    """
    names = record_fusion(model, "quag").names
    chosen = chosen_operators(names, operators, cls_rows)
    made = [Intervention("quag", QuagAveraging(name, cls_rows)) for name in chosen]
    for one in made:
        one.check(names)
    seen = collect_predictions(_Averaged(model, made), loader)
    origin, *rest = (score_name(model, part, seen.target, "quag") for part in seen.logits.unbind(dim=1))
    scores = dict(zip(chosen, rest, strict=True))
    drops = {name: origin - score for name, score in scores.items()}
    kept = [outcomes(part, seen.target, model.task) for part in seen.logits[:, 1:].unbind(dim=1)]  # type: ignore[arg-type]
    changed = {name: one.changed for name, one in zip(chosen, made, strict=True)}
    return Quag(origin, scores, drops, changed, dict(zip(chosen, kept, strict=True)))


class _Averaged(nn.Module):
    """Encodes a batch once and fuses it as it is, then under each intervention."""

    def __init__(self, model: nn.Module, made: Sequence[Intervention]) -> None:
        super().__init__()
        self.model, self.made, self.names = model, made, model.names

    def forward(self, batch: Mapping[str, Any]) -> Output:
        tokens = self.model.encode(batch)  # type: ignore[operator]
        outputs = [self.model.fuse(tokens)]  # type: ignore[operator]
        for one in self.made:
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
        got=f"{type(getattr(model, 'fusion', model)).__name__}, which has none",
        fix="Static fusions have no attention to average; mask_modality asks what they owe to a modality.",
    )
