"""``ChoiceTokens``: token ids of the choices of questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ...errors import DataError
from .question_set import MediaQuestion


class ChoiceTokens:
    """Tokenizes choices, each text once.

    Args:
        tokenizer: of the model.
        placeholders: ids of media tokens, which are not part of a choice.
        lead: what the model writes before an answer.
    """

    def __init__(self, tokenizer: Any, placeholders: Sequence[int], lead: str = "") -> None:
        self._tokenizer, self._placeholders, self._lead = tokenizer, set(placeholders), lead
        self._known: dict[str, Int[Tensor, "1 token"]] = {}

    def of(self, question: MediaQuestion) -> list[Int[Tensor, "1 token"]]:
        """Returns the token ids of each choice.

        Raises:
            DataError: a choice without tokens or with placeholders, or two choices with the same tokens, whose
                likelihoods are equal.
        """
        for text in question.choices:
            if text not in self._known:
                self._known[text] = self._encoded(text, question)
        texts: dict[tuple[int, ...], str] = {}
        for text in question.choices:
            first = texts.setdefault(tuple(self._known[text][0].tolist()), text)
            if first != text:
                raise DataError(
                    f"evaluate sample {question.index}", expected="choices with different tokens",
                    got=f"{first!r} and {text!r}, which are equal for the tokenizer",
                    fix='Choose other words, or use score="generated".',
                )  # fmt: skip
        return [self._known[text] for text in question.choices]

    def _encoded(self, text: str, question: MediaQuestion) -> Int[Tensor, "1 token"]:
        written = f"{self._lead}{text}"
        encoded = self._tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        if not encoded.shape[1] or self._placeholders & set(encoded[0].tolist()):
            raise DataError(
                f"evaluate sample {question.index}", expected="choices of at least one token without placeholders",
                got=repr(text),
            )  # fmt: skip
        return encoded
