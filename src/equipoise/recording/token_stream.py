"""Labels of a token sequence that grows while a model decodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from ..tokens.token_batch import SPECIAL
from .forward_inputs import ForwardInputs
from .submodels import ORDER

NO_TOKENS = "its inputs contain neither input_ids nor inputs_embeds"


class TokenStream:
    """Labels of all tokens so far; the last ``rows`` tokens are new in this pass.

    Labels come from, in this order: the user, ``mm_token_type_ids`` or a mask of positions among the inputs, and the
    placeholders of the configuration.

    Args:
        names: modality names of the labels.
        placeholders: token id -> modality name.
        labels: (key,) or (batch, key) labels of the prompt, from the user.

    Attributes:
        labels: (batch, token), or (1, token) for all samples; None if they are unknown.
        why: reason why they are unknown.
        distinguishes: whether the inputs or the configuration distinguish other tokens from text.
        rows, valid, answer: number, padding mask and answer mask of the tokens of this pass.
        continues: the pass continues the samples of the previous one.
        static: there may be more keys than tokens so far.
    """

    def __init__(self, names: Sequence[str], placeholders: dict[int, str], labels: Tensor | None) -> None:
        self._names, self._placeholders, self._given = tuple(names), placeholders, labels
        self.labels: Int[Tensor, "batch token"] | None = None
        self.valid: Bool[Tensor, "batch token"] | None = None
        self.answer: Bool[Tensor, "batch token"] | None = None
        self.rows, self.continues, self.static, self.distinguishes = 0, False, False, False
        self.why = "its tokens are unknown"
        self._lost = False

    @property
    def text(self) -> int:
        """Label of text."""
        return self._names.index("text") if "text" in self._names else SPECIAL

    def begin_text(self, inputs: ForwardInputs) -> None:
        """Starts a pass of text only."""
        self._lost = self._lost and inputs.past > 0
        self._begin(inputs, None if inputs.shape is None else torch.full(inputs.shape, self.text))

    def begin(self, inputs: ForwardInputs) -> None:
        """Starts a pass with tokens of any modality."""
        self._lost = self._lost and inputs.past > 0
        if inputs.shape is None and self._given is None:
            return self._fail(NO_TOKENS)
        if self._given is not None and (inputs.past == 0 or (inputs.partial and inputs.past < self._given.shape[-1])):
            return self._begin(inputs, self._prompt(inputs))
        new = self._new(inputs)
        if new is not None and inputs.text:
            # Generated tokens are text, even placeholder ids.
            new[:, -min(inputs.text, new.shape[1]) :] = self.text
        self._begin(inputs, new)

    def _prompt(self, inputs: ForwardInputs) -> Tensor:
        """Returns the user's labels, repeated for samples that are returned several times, followed by text."""
        labels = self._first()
        if inputs.generates and inputs.shape is not None and inputs.shape[0] % len(labels) == 0:
            labels = labels.repeat_interleave(inputs.shape[0] // len(labels), dim=0)
        if inputs.partial and inputs.shape is not None:
            return labels[:, inputs.past : inputs.past + inputs.shape[1]]
        return F.pad(labels, (0, inputs.text), value=self.text)

    def reset(self) -> None:
        """Marks the tokens as unknown."""
        self._fail("its tokens are unknown")

    def _begin(self, inputs: ForwardInputs, new: Tensor | None) -> None:
        before = self.labels
        self.valid, self.answer, self.static, self.continues = inputs.valid, inputs.answer, inputs.static, False
        if new is None:
            if inputs.shape is None:
                self._fail(NO_TOKENS)
            return None
        if self.valid is not None and self.valid.shape[1] == new.shape[1]:
            new = new.masked_fill(~self.valid.to(new.device), SPECIAL)
        self.rows = new.shape[1]
        if inputs.past == 0:
            self.labels = new
            return None
        self.continues = before is not None and before.shape[0] in (1, new.shape[0])
        past = before if self.continues else self._unobserved(inputs.past)
        if past is None or (why := self._why_cache_differs(past.shape[1], inputs)):
            return self._fail(
                why if past is not None else f"its cache contains {inputs.past} earlier tokens of unknown modality"
            )
        batch = max(len(past), len(new))
        parts = [past[:, : inputs.past].to(new.device), new]
        self.labels = torch.cat([part.expand(batch, -1) for part in parts], dim=1)

    def _unobserved(self, past: int) -> Tensor | None:
        """Returns the labels of tokens that were processed before recording started."""
        if self._given is not None:
            return None if self._lost else self._first()
        return torch.full((1, past), self.text) if len(self._names) == 1 else None

    def _why_cache_differs(self, length: int, inputs: ForwardInputs) -> str:
        """Returns why ``length`` labels do not fit the cache.

        A cache may have been cropped, but not within the prompt.
        """
        past = inputs.past
        if self._given is not None and not self._given.shape[-1] <= past and not inputs.partial:
            return f"modality is given for {self._given.shape[-1]} tokens, and the prompt has {past}"
        if past > length:
            return f"its cache contains {past} tokens, and the modality of {length} is known"
        return ""

    def _first(self) -> Tensor:
        labels = self._given
        return labels[None] if labels.ndim == 1 else labels  # type: ignore[union-attr]

    def _new(self, inputs: ForwardInputs) -> Tensor | None:
        """Returns (batch, token) labels from token types, position masks or placeholders."""
        if inputs.shape is None:
            return None
        if inputs.types is not None:
            self.distinguishes = True
            numbers = [self._names.index(name) if name in self._names else SPECIAL for name in ORDER]
            return torch.tensor(numbers, device=inputs.types.device)[inputs.types.long().clamp(0, len(ORDER) - 1)]
        self.distinguishes = bool(self._placeholders or inputs.media_masks) or (self.distinguishes and inputs.past > 0)
        # A single new token after a prompt was generated, so it is text even with a placeholder id.
        ids = inputs.ids if inputs.past == 0 or inputs.shape[1] > 1 else None
        labels = torch.full(inputs.shape, self.text, device=None if ids is None else ids.device)
        if ids is None and not inputs.media_masks and len(self._names) > 1 and inputs.past == 0:
            self._fail(
                "its inputs are inputs_embeds without input_ids, which are needed to distinguish images from text"
            )
            return None
        tokens = self._placeholders.items() if ids is not None else ()
        for name, where in (*((name, ids == token) for token, name in tokens), *inputs.media_masks.items()):
            label = self._names.index(name) if name in self._names else SPECIAL
            labels = labels.to(where.device).masked_fill(where, label)
        return labels

    def _fail(self, why: str) -> None:
        if not self._lost:
            self.why = why
        self.labels, self.continues, self.rows, self._lost = None, False, 0, True


def fit_labels(labels: Int[Tensor, "batch token"], keys: int, stream: TokenStream) -> tuple[Tensor, int] | None:
    """Returns the labels (batch, key) of a layer's keys and the position of the first; None if the keys do not fit.

    A layer with a sliding window has only the last keys; a cache of fixed size has empty slots after them.
    """
    total = labels.shape[1]
    if keys == total:
        return labels, 0
    if keys > total:
        return (F.pad(labels, (0, keys - total), value=SPECIAL), 0) if stream.static else None
    return (labels[:, total - keys :], total - keys) if stream.continues else None
