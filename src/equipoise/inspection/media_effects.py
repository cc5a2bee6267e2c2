"""Measures how the likelihood of an answer changes when a modality is masked, blanked or averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .prompt_inputs import complete_inputs


class MediaEffect(NamedTuple):
    """Effect of one change of the input on the likelihood of the answer.

    Attributes:
        change: description of the change.
        log_likelihood: log-likelihood of the answer after the change, mean over its tokens, in nats.
        difference: difference from the unchanged input; negative if the answer has become less likely.
    """

    change: str
    log_likelihood: float
    difference: float


def mean_log_likelihood(logits: Float[Tensor, "token word"], answer: Int[Tensor, " token"]) -> float:
    """Computes the mean over the answer's tokens of log p(token | all before), in nats.

    Args:
        logits: logits of the whole sequence, which ends with the answer.
        answer: token ids of the answer.

    Example:
        >>> round(mean_log_likelihood(torch.zeros(3, 4), torch.tensor([1, 2])), 4)
        -1.3863
    """
    predicting = logits[-len(answer) - 1 : -1].float()
    return float(torch.log_softmax(predicting, dim=-1).gather(1, answer.to(logits.device)[:, None]).mean())


def blank_media(
    model: nn.Module, blank: Mapping[str, dict[str, Any]], answer: Int[Tensor, "1 token"], whole: float
) -> list[MediaEffect]:
    """Measures the effect of a blank image of the same size and of silence of the same length."""
    effects = []
    for name, inputs in blank.items():
        complete = complete_inputs(inputs, answer, model.config.model_type)  # type: ignore[union-attr]
        value = mean_log_likelihood(model(**complete, use_cache=False).logits[0], answer[0])
        effects.append(MediaEffect(f"blank {name}", value, value - whole))
    return effects


def measure_effects(model: nn.Module, inputs: dict[str, Any], answer: Int[Tensor, "1 token"]) -> list[MediaEffect]:
    """Measures the effect of masking each modality and of the QUAG operators; ``inputs`` include the answer."""
    from ..diagnostics.answer_likelihood import IGNORED, answer_effects

    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -answer.shape[1] :] = answer
    descriptions = {"mask": "{} hidden", "quag": "QUAG {}"}
    return [
        MediaEffect(descriptions[row["change"]].format(row["of"]), row["log_likelihood"], -row["drop"])
        for row in answer_effects(model, {**inputs, "use_cache": False}, labels) if row["change"] in descriptions
    ]  # fmt: skip
