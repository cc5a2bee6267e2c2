"""What becomes of an answer when the model is kept from something that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .prompt_inputs import complete_inputs


class MediaEffect(NamedTuple):
    """One change and what it does.

    Attributes:
        change: what was done.
        log_likelihood: of the answer after it, mean over its tokens, in nats.
        difference: to the whole input; negative where the answer has become less likely.
    """

    change: str
    log_likelihood: float
    difference: float


def mean_log_likelihood(logits: Float[Tensor, "token word"], answer: Int[Tensor, " token"]) -> float:
    """Mean over the answer's tokens of log p(token | all before), in nats; logits of the whole sequence.

    Example:
        >>> round(mean_log_likelihood(torch.zeros(3, 4), torch.tensor([1, 2])), 4)
        -1.3863
    """
    before = logits[-len(answer) - 1 : -1].float()
    return float(torch.log_softmax(before, dim=-1).gather(1, answer.to(logits.device)[:, None]).mean())


def blank_media(
    model: nn.Module, blank: Mapping[str, dict[str, Any]], answer: Int[Tensor, "1 token"], whole: float
) -> list[MediaEffect]:
    """The answer after a blank picture of the same size, and after silence of the same length."""
    found = []
    for name, inputs in blank.items():
        given = complete_inputs(inputs, answer, model.config.model_type)  # type: ignore[union-attr]
        value = mean_log_likelihood(model(**given, use_cache=False).logits[0], answer[0])
        found.append(MediaEffect(f"blank {name}", value, value - whole))
    return found


def measure_effects(model: nn.Module, inputs: dict[str, Any], answer: Int[Tensor, "1 token"]) -> list[MediaEffect]:
    """The answer with each modality hidden, and under the operators of QUAG; inputs of the whole sequence."""
    from ..diagnostics.answer_likelihood import IGNORED, answer_effects

    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -answer.shape[1] :] = answer
    words = {"mask": "{} hidden", "quag": "QUAG {}"}
    return [
        MediaEffect(words[row["change"]].format(row["of"]), row["log_likelihood"], -row["drop"])
        for row in answer_effects(model, {**inputs, "use_cache": False}, labels) if row["change"] in words
    ]  # fmt: skip
