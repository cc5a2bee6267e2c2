"""Attention as an explicit matrix with an intervention applied, in copies of whole models."""

import copy

import torch

import equipoise as eq
from equipoise.nn.attention import Attended
from equipoise.nn.transformer import AttentionCore
from oracles import quag as slow


def intervened(attention, columns, rows, seen, change):
    """Applies an intervention: ("hide", modality indices) or ("quag", operator, number of modalities, cls_rows)."""
    kind, *rest = change
    if kind == "hide":
        return slow.hidden(attention, columns, rest[0])
    return slow.quag(attention, rows, columns, slow.pairs_of(*rest), seen)


class ExplicitAttention(AttentionCore):
    """An attention core that builds the matrix explicitly and changes it."""

    def __init__(self, change):
        super().__init__()
        self.change_to = change

    def forward(self, query, key, value, *, modality=None, num_modalities=None, mask=None, is_causal=False, **_):
        if modality is None:
            return super().forward(query, key, value, mask=mask, is_causal=is_causal)
        mask = None if mask is None else mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        attention = slow.matrix(query, key, mask=mask, is_causal=is_causal)
        seen = slow.visible(mask, is_causal, attention.shape)
        columns = modality.expand(len(query), -1)
        rows = columns[:, : query.shape[2]]
        share = torch.stack([(attention * (columns == m)[:, None, None]).sum(-1) for m in range(num_modalities)], -1)
        attention = intervened(attention, columns, rows, seen, self.change_to)
        return Attended(slow.output(attention, value), share)


def with_explicit_attention(model, change):
    """Returns a copy of a model in which every attention is computed by `WrittenOut`."""
    copied = copy.deepcopy(model)
    for part in copied.modules():
        if isinstance(part, eq.nn.Attention):
            part.core = ExplicitAttention(change)
    return copied
