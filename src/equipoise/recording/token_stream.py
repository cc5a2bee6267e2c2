"""The labels of a sequence of tokens, which grows while a model decodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from ..tokens.token_batch import SPECIAL
from .forward_inputs import ForwardInputs
from .submodels import ORDER


class TokenStream:
    """Labels of all tokens so far, the last ``rows`` of which are new.

    In this order: what the user gives, ``mm_token_type_ids`` or a mask of places among the inputs, the placeholders of
    the configuration.

    Args:
        names: of the labels.
        placeholders: token id -> name.
        given: (key,) or (batch, key) labels of the prompt, from the user.

    Attributes:
        labels: (batch, token), or (1, token) for all samples; None where they are not known.
        why: they are not known.
        told: whether anything could tell a token that is not text.
        rows, valid, answer: of the tokens of this pass.
        continues: the pass goes on with the samples of the one before.
        static: keys may be more than the tokens so far.
    """

    def __init__(self, names: Sequence[str], placeholders: dict[int, str], given: Tensor | None) -> None:
        self._names, self._placeholders, self._given = tuple(names), placeholders, given
        self.labels: Int[Tensor, "batch token"] | None = None
        self.valid: Bool[Tensor, "batch token"] | None = None
        self.answer: Bool[Tensor, "batch token"] | None = None
        self.rows, self.continues, self.static, self.told = 0, False, False, False
        self.why = "nothing has told its tokens"
        self._lost = False

    @property
    def text(self) -> int:
        """The label of words."""
        return self._names.index("text") if "text" in self._names else SPECIAL

    def words(self, inputs: ForwardInputs) -> None:
        """A pass of words alone."""
        self._lost = self._lost and inputs.past > 0
        self._begin(inputs, None if inputs.shape is None else torch.full(inputs.shape, self.text))

    def begin(self, inputs: ForwardInputs) -> None:
        """A pass whose tokens may be of any modality."""
        self._lost = self._lost and inputs.past > 0
        if inputs.shape is None and self._given is None:
            return self._fail("its inputs hold neither input_ids nor inputs_embeds")
        if self._given is not None and (inputs.past == 0 or (inputs.partial and inputs.past < self._given.shape[-1])):
            return self._begin(inputs, self._prompt(inputs))
        new = self._new(inputs)
        if new is not None and inputs.text:
            # Whatever it is called, what was generated is text.
            new[:, -min(inputs.text, new.shape[1]) :] = self.text
        self._begin(inputs, new)

    def _prompt(self, inputs: ForwardInputs) -> Tensor:
        """The user's labels, repeated for samples that are returned several times, and text behind them."""
        given = self._first()
        if inputs.generates and inputs.shape is not None and inputs.shape[0] % len(given) == 0:
            given = given.repeat_interleave(inputs.shape[0] // len(given), dim=0)
        if inputs.partial and inputs.shape is not None:
            return given[:, inputs.past : inputs.past + inputs.shape[1]]
        return F.pad(given, (0, inputs.text), value=self.text)

    def forget(self) -> None:
        self._fail("nothing has told its tokens")

    def _begin(self, inputs: ForwardInputs, new: Tensor | None) -> None:
        before = self.labels
        self.valid, self.answer, self.static, self.continues = inputs.valid, inputs.answer, inputs.static, False
        if new is None:
            if inputs.shape is None:
                self._fail("its inputs hold neither input_ids nor inputs_embeds")
            return None
        if self.valid is not None and self.valid.shape[1] == new.shape[1]:
            new = new.masked_fill(~self.valid.to(new.device), SPECIAL)
        self.rows = new.shape[1]
        if inputs.past == 0:
            self.labels = new
            return None
        self.continues = before is not None and before.shape[0] in (1, new.shape[0])
        past = before if self.continues else self._unseen(inputs.past)
        if past is None or (why := self._unfit(past.shape[1], inputs)):
            return self._fail(why if past is not None else f"its cache holds {inputs.past} tokens from before, whose "
                              "modality is not known")  # fmt: skip
        batch = max(len(past), len(new))
        parts = [past[:, : inputs.past].to(new.device), new]
        self.labels = torch.cat([part.expand(batch, -1) for part in parts], dim=1)

    def _unseen(self, past: int) -> Tensor | None:
        """Labels of tokens that went through the model before it was watched."""
        if self._given is not None:
            return None if self._lost else self._first()
        return torch.full((1, past), self.text) if len(self._names) == 1 else None

    def _unfit(self, known: int, inputs: ForwardInputs) -> str:
        """Why labels of so many tokens cannot be those of a cache; a cache may have been cut, but not into a prompt."""
        past = inputs.past
        if self._given is not None and not self._given.shape[-1] <= past and not inputs.partial:
            return f"modality is given for {self._given.shape[-1]} tokens, and the prompt has {past}"
        if past > known:
            return f"its cache holds {past} tokens, and the inputs tell the modality of {known}"
        return ""

    def _first(self) -> Tensor:
        given = self._given
        return given[None] if given.ndim == 1 else given  # type: ignore[union-attr]

    def _new(self, inputs: ForwardInputs) -> Tensor | None:
        """(batch, token) labels by types, places or placeholders."""
        if inputs.shape is None:
            return None
        if inputs.types is not None:
            self.told = True
            numbers = [self._names.index(name) if name in self._names else SPECIAL for name in ORDER]
            return torch.tensor(numbers, device=inputs.types.device)[inputs.types.long().clamp(0, len(ORDER) - 1)]
        self.told = bool(self._placeholders or inputs.places) or (self.told and inputs.past > 0)
        # A single token that follows was generated, whatever it is called.
        ids = inputs.ids if inputs.past == 0 or inputs.shape[1] > 1 else None
        labels = torch.full(inputs.shape, self.text, device=None if ids is None else ids.device)
        if ids is None and not inputs.places and len(self._names) > 1 and inputs.past == 0:
            self._fail("its inputs are inputs_embeds without input_ids, which alone tell pictures from text")
            return None
        tokens = self._placeholders.items() if ids is not None else ()
        for name, where in (*((name, ids == token) for token, name in tokens), *inputs.places.items()):
            label = self._names.index(name) if name in self._names else SPECIAL
            labels = labels.to(where.device).masked_fill(where, label)
        return labels

    def _fail(self, why: str) -> None:
        if not self._lost:
            self.why = why
        self.labels, self.continues, self.rows, self._lost = None, False, 0, True


def fit_labels(labels: Int[Tensor, "batch token"], keys: int, stream: TokenStream) -> tuple[Tensor, int] | None:
    """Labels (batch, key) of what a layer sees of a stream, and the place of the first; None where it sees another.

    A layer with a sliding window keeps the last keys alone, a cache of fixed size has room behind them.
    """
    total = labels.shape[1]
    if keys == total:
        return labels, 0
    if keys > total:
        return (F.pad(labels, (0, keys - total), value=SPECIAL), 0) if stream.static else None
    return (labels[:, total - keys :], total - keys) if stream.continues else None
