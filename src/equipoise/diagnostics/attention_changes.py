"""Changes of a single attention call: masking a modality, or averaging quadrants (QUAG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import unknown_name
from ..recording import AttentionCall, LabeledKeys
from ..recording.share_measurement import attention_output
from .quag_operators import ClsRows, averaged_attention, operators, quag_attention, quag_output


class AttentionChange(Protocol):
    """A change of attention calls."""

    @property
    def what(self) -> str:
        """Description that follows "attention" in error messages."""
        ...

    def check(self, names: Sequence[str], who: str) -> None:
        """Raises ConfigError if the change does not apply to these modalities."""
        ...

    def output(self, call: AttentionCall, known: LabeledKeys) -> Tensor | str | None:
        """Returns the changed output, the reason why it cannot be computed, or None if there is nothing to change.

        If the model computes its attention matrix explicitly, the changed matrix is returned instead.
        """
        ...


class ModalityCallChange:
    """Base class of changes of an attention call that depend on the keys of one modality.

    Attributes:
        name: the modality.
    """

    name: str

    @property
    def what(self) -> str:
        return f"to several modalities, with keys of '{self.name}'"

    def check(self, names: Sequence[str], who: str) -> None:
        if self.name not in names:
            raise unknown_name(who, "modality", self.name, names)

    def output(self, call: AttentionCall, known: LabeledKeys) -> Tensor | str | None:
        """Returns the output of the changed call, or its attention matrix if the model computes one explicitly."""
        changed = self.changed(call, known)
        if changed is None or isinstance(changed, str):
            return changed
        return attention_output(changed) if changed.attention is None else changed.attention

    def changed(self, call: AttentionCall, known: LabeledKeys) -> AttentionCall | str | None:
        """Returns the changed call, the reason why it cannot be changed, or None if there is nothing to change."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaskModality:
    """Takes the softmax over the keys of all other modalities.

    Attributes:
        gone: names of the masked modalities.
    """

    gone: tuple[str, ...]

    @property
    def what(self) -> str:
        return f"with keys of {' or '.join(repr(name) for name in self.gone)}"

    def check(self, names: Sequence[str], who: str) -> None:
        for name in self.gone:
            if name not in names:
                raise unknown_name(who, "modality", name, names)

    def output(self, call: AttentionCall, known: LabeledKeys) -> Tensor | str | None:
        batch, _, _, keys = call.sizes
        numbers = torch.tensor([known.names.index(name) for name in self.gone])
        hidden = torch.isin(known.keys.cpu(), numbers).expand(batch, keys).to(call.query.device)
        if not bool(hidden.any()):
            return None
        if call.attention is not None:
            masked = call.attention.masked_fill(hidden[:, None, None], 0.0)
            return masked / masked.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(masked.dtype).tiny)
        # Replace masked keys and values by zeros: a NaN would propagate even with weight 0.
        blank = hidden[:, None, :, None]
        visible = call.with_mask(~hidden[:, None, None])
        return attention_output(
            replace(visible, key=call.key.masked_fill(blank, 0.0), value=call.value.masked_fill(blank, 0.0))
        )


@dataclass(frozen=True)
class QuagAveraging:
    """Averages attention inside the quadrants of a QUAG operator.

    Attributes:
        operator: a name of ``operators``.
        cls_rows: treatment of queries that are special tokens.
    """

    operator: str
    cls_rows: ClsRows = "keys"

    @property
    def what(self) -> str:
        return f"with quadrants of '{self.operator}'"

    def check(self, names: Sequence[str], who: str) -> None:
        known = operators(names, cls_rows=self.cls_rows)
        if self.operator not in known:
            raise unknown_name(who, "operator", self.operator, known)

    def output(self, call: AttentionCall, known: LabeledKeys) -> Tensor | str | None:
        batch, _, rows, keys = call.sizes
        count, device = len(known.names), call.query.device
        pairs = operators(known.names, cls_rows=self.cls_rows)[self.operator]
        labels, queries = known.keys.to(device), known.queries
        if queries is None:
            by_reader = averaged_attention(pairs, count, torch.arange(-1, count)[None])[0]
            if bool((by_reader != by_reader[0]).any()):
                return "the modality of its queries is not known"
            queries = torch.zeros(rows, dtype=torch.long)
        queries = queries.to(device).expand(batch, rows)
        present = (labels.expand(batch, keys)[..., None] == torch.arange(count, device=device)).any(dim=1)
        if not bool((averaged_attention(pairs, count, queries) & present[:, None]).any()):
            return None
        if call.attention is not None:
            visible = call.attention > 0 if call.mask is None else call.visible()
            return quag_attention(call.attention, queries, labels, pairs, visible=visible)
        return quag_output(call, labels, queries, count, pairs)
