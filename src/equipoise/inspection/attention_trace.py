"""One pass, seen by several at once: shares of prompt and answer, and the attention of single tokens."""

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
    """Whose attention is kept.

    Attributes:
        text: the token, or what it stands for.
        part: ``"prompt"`` or ``"answer"``.
        place: of the token in the sequence; None for a mean over all queries of its part.
        query: place of the query: the token's own in the prompt, the one before for a token of the answer, which is
            written by it; None for a mean.
    """

    text: str
    part: str
    place: int | None = None
    query: int | None = None


Choose = Callable[[tuple[str, ...], Tensor], list[TraceReader]]


class AttentionTrace:
    """Attention of some queries of one sequence on every key.

    Args:
        choose: names of the modalities, (token,) labels -> the readers, whose ``query`` says which row is theirs.
        groups: name -> (query,) True for the queries whose even share is asked for.

    Attributes:
        readers: those that were chosen, as soon as a layer reads the sequence itself.
        labels: (token,) modality of the sequence, from the same layer.
        rows: site -> (head, reader, key) of layers that read the sequence itself.
        even: site -> group -> (modality,) share, if every key that a query sees got the same; mean over the group.
    """

    replaces_output = False

    def __init__(self, choose: Choose, groups: dict[str, Bool[Tensor, " query"]]) -> None:
        self._choose, self._groups = choose, groups
        self.readers: list[TraceReader] = []
        self.labels: Tensor | None = None
        self.rows: dict[str, Tensor] = {}
        self.even: dict[str, dict[str, Tensor]] = {}

    def on_attention(self, site: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        batch, _, queries, keys = call.sizes
        length = len(next(iter(self._groups.values())))
        if known.unimodal or (batch, queries) != (1, length):
            return
        labels = known.keys.cpu().expand(1, keys)[0]
        if keys == length:
            if self.labels is None:
                self.labels, self.readers = labels, self._choose(known.names, labels)
            places = torch.tensor([[reader.query for reader in self.readers]], device=call.query.device)
            self.rows[site] = torch.cat(list(explicit_attention(select_queries(call, places))), dim=2)[0].float().cpu()
        seen = call.visible()
        seen = torch.ones(queries, keys) if seen is None else seen[0].any(dim=0).expand(queries, keys).float().cpu()
        hot = (labels[:, None] == torch.arange(len(known.names))).float()
        even = (seen @ hot) / seen.sum(dim=1, keepdim=True).clamp(min=1)
        self.even[site] = {name: even[group].mean(dim=0) for name, group in self._groups.items()}

    def replace_output(self, site: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def on_missing(self, site: str, reason: str) -> None:
        return None


class HandlerList:
    """Several handlers that are shown the same."""

    replaces_output = False

    def __init__(self, *handlers: Any) -> None:
        self._handlers = handlers

    def on_attention(self, site: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        for handler in self._handlers:
            handler.on_attention(site, backend, call, known)

    def replace_output(self, site: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def on_missing(self, site: str, reason: str) -> None:
        for handler in self._handlers:
            handler.on_missing(site, reason)


def trace_attention(
    model: nn.Module, inputs: dict[str, Any], groups: dict[str, Bool[Tensor, " query"]], choose: Choose, layers: Any
) -> tuple[Float[Tensor, "token word"], dict[str, AttentionRecord], AttentionTrace]:  # fmt: skip
    """Logits of the sequence, what was seen of each group of queries, and the single readers."""
    labeler, ways, follow = labels_for(model, None, None)
    seen = {name: AttentionRecord(labeler, group[None], tokens=True) for name, group in groups.items()}
    trace = AttentionTrace(choose, groups)
    with open_session(model, labeler, ways, follow, HandlerList(*seen.values(), trace), layers):
        logits = model(**inputs, use_cache=False).logits
    return logits[0], seen, trace
