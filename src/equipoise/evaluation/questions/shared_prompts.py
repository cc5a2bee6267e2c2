"""``SharedPrompts``: scores several answers to a prompt with one pass over the prompt, where this was checked."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...inspection.prompt_inputs import Inputs

TOLERANCE = 1e-4
"""Largest difference of a log-likelihood, relative to values above 1; two units of lower precisions, not relative."""
ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on the length of the sequence, so that keys of a prompt alone may differ."""


class ScoredAnswers(NamedTuple):
    """Mean log-likelihood of the tokens of each answer, and the share of attention at the end of the prompt."""

    likelihoods: list[float]
    share: float | None


class SharedPrompts:
    """Kinds of inputs whose answers are scored with the keys and values of a single pass over the prompt.

    A kind is shared only if the first question of this kind has the same scores as by complete passes.

    Args:
        model: a transformers model; nothing is shared by encoder-decoders, whose prompts are short.
    """

    def __init__(self, model: Any) -> None:
        rope = str(getattr(model.config.get_text_config(), "rope_parameters", ""))
        self._possible = not model.config.is_encoder_decoder and not any(name in rope for name in ROPE_BY_LENGTH)
        self._trusted: dict[Hashable, bool] = {}
        self._unit = 2 * torch.finfo(model.dtype).eps

    def may_share(self, kind: Hashable) -> bool:
        """Whether a kind is shared, or has to be checked."""
        return self._possible and self._trusted.get(kind, True)

    def is_trusted(self, kind: Hashable) -> bool:
        """Whether a kind was checked."""
        return self._trusted.get(kind, False)

    def check(self, kind: Hashable, shared: ScoredAnswers | None, complete: ScoredAnswers) -> None:
        """Shares a kind from now on if all scores are equal within the tolerance; not if sharing has failed."""
        self._trusted[kind] = self._trusted.get(kind, True) and shared is not None and all(
            abs(one - other) <= max(self._unit, TOLERANCE * max(1.0, abs(other)))
            for one, other in zip(
                [*shared.likelihoods, shared.share or 0.0], [*complete.likelihoods, complete.share or 0.0], strict=True
            )
        )  # fmt: skip


def score_answers(model: Any, inputs: Inputs, answers: Sequence[Tensor], batch_size: int) -> list[float]:
    """Returns the mean log-likelihood of the tokens of each answer, with one pass over the prompt.

    The answers are read with copies of the keys and values of the prompt, which has no padding.

    Args:
        model: a decoder-only transformers model.
        inputs: a prompt, a batch of one.
        answers: (1, token) token ids.
        batch_size: number of answers in one pass.
    """
    if (mask := inputs.get("attention_mask")) is not None and not bool(mask.all()):
        raise ValueError("the prompt has padding")
    prompt = model(**inputs, use_cache=True)
    ids = inputs["input_ids"]
    # The name of the cache in transformers, and in its older versions.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    values: list[float] = []
    for begin in range(0, len(answers), batch_size):
        some = [answer[0].to(ids) for answer in answers[begin : begin + batch_size]]
        longest = max(len(answer) for answer in some)
        tokens = torch.stack([F.pad(answer, (0, longest - len(answer))) for answer in some])
        logits = prompt.logits[:, -1:].expand(len(some), -1, -1)
        if longest > 1:
            cache = copy.deepcopy(getattr(prompt, name))
            cache.batch_repeat_interleave(len(some))
            rest = model(input_ids=tokens[:, :-1], use_cache=True, **{name: cache}).logits
            logits = torch.cat([logits, rest], dim=1)
        likely = logits.float().log_softmax(dim=-1).gather(2, tokens[..., None].to(logits.device))[..., 0]
        values += [float(row[: len(answer)].double().mean()) for row, answer in zip(likely, some, strict=True)]
    return values
