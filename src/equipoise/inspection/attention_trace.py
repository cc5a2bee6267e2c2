"""Records the shares of prompt and answer and the attention of single tokens in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..recording import AttentionCall, AttentionRecord, LabeledKeys, labels_for, open_session
from ..recording.attention_call import select_queries
from ..recording.share_measurement import explicit_attention


class TraceReader(NamedTuple):
    """A query whose attention is stored.

    Attributes:
        text: the token, or the name of a group of tokens.
        part: ``"prompt"`` or ``"answer"``.
        place: position of the token in the sequence; None for the mean over all queries of its part.
        query: position of the query: that of the token in the prompt, and the one before for tokens of the answer,
            which it predicts; None for a mean.
    """

    text: str
    part: str
    place: int | None = None
    query: int | None = None


Choose = Callable[[tuple[str, ...], Tensor], list[TraceReader]]


class AttentionTrace:
    """Handler that keeps the attention of some queries of one sequence on every key.

    Args:
        choose: (modality names, (token,) labels) -> the queries to keep.
        groups: name -> (query,) True for the queries of a group.

    Attributes:
        readers: the chosen queries; set by the first self-attention layer.
        labels: (token,) modality index of each token, set by the same layer.
        rows: layer -> (head, reader, key), for self-attention layers.
        uniform: layer -> group -> (modality,) share if each query attended uniformly to its visible keys, mean over the
            group.
    """

    replaces_output = False

    def __init__(self, choose: Choose, groups: dict[str, Bool[Tensor, " query"]]) -> None:
        self._choose, self._groups = choose, groups
        self.readers: list[TraceReader] = []
        self.labels: Tensor | None = None
        self.rows: dict[str, Tensor] = {}
        self.uniform: dict[str, dict[str, Tensor]] = {}

    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        batch, _, queries, keys = call.sizes
        length = len(next(iter(self._groups.values())))
        if known.unimodal or (batch, queries) != (1, length):
            return
        labels = known.keys.cpu().expand(1, keys)[0]
        if keys == length:
            if self.labels is None:
                self.labels, self.readers = labels, self._choose(known.names, labels)
            places = torch.tensor([[reader.query for reader in self.readers]], device=call.query.device)
            self.rows[layer] = torch.cat(list(explicit_attention(select_queries(call, places))), dim=2)[0].float().cpu()
        visible = call.visible()
        visible = (
            torch.ones(queries, keys) if visible is None else visible[0].any(dim=0).expand(queries, keys).float().cpu()
        )
        one_hot = (labels[:, None] == torch.arange(len(known.names))).float()
        uniform = (visible @ one_hot) / visible.sum(dim=1, keepdim=True).clamp(min=1)
        self.uniform[layer] = {name: uniform[group].mean(dim=0) for name, group in self._groups.items()}

    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def on_missing(self, layer: str, reason: str) -> None:
        return None


class HandlerList:
    """Passes every call to several handlers."""

    replaces_output = False

    def __init__(self, *handlers: Any) -> None:
        self._handlers = handlers

    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        for handler in self._handlers:
            handler.on_attention(layer, backend, call, known)

    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def on_missing(self, layer: str, reason: str) -> None:
        for handler in self._handlers:
            handler.on_missing(layer, reason)


def trace_attention(
    model: nn.Module, inputs: dict[str, Any], groups: dict[str, Bool[Tensor, " query"]], choose: Choose, layers: Any
) -> tuple[Float[Tensor, "token word"], dict[str, AttentionRecord], AttentionTrace]:  # fmt: skip
    """Returns the logits of the sequence, a record for each group of queries, and the trace of single queries."""
    labeler, ways, follow = labels_for(model, None, None)
    records = {name: AttentionRecord(labeler, group[None], tokens=True) for name, group in groups.items()}
    trace = AttentionTrace(choose, groups)
    with open_session(model, labeler, ways, follow, HandlerList(*records.values(), trace), layers):
        logits = model(**inputs, use_cache=False).logits
    return logits[0], records, trace
