"""Reference QUAG and masked modalities: slow and simple, in float64."""

import math

import torch


def pairs_of(operator, count, cls_rows):
    """Quadrants (row, column) of an operator; -1 is the row of a class token."""
    every = range(count)
    if operator == "unimodal":
        pairs = {(m, m) for m in every}
    elif operator == "crossmodal":
        pairs = {(m, n) for m in every for n in every if m != n}
    elif operator == "all":
        pairs = {(m, n) for m in every for n in every}
    else:
        pairs = {(m, operator) for m in every}
    joins = {"skip": False, "keys": operator not in ("unimodal", "crossmodal"), "all": True}[cls_rows]
    return pairs | ({(-1, n) for _, n in pairs} if joins else set())


def averaged(row, reader, labels, seen, pairs):
    """One row of attention as a list, under QUAG."""
    row = list(row)
    for read in sorted({column for one, column in pairs if one == reader}):
        places = [j for j, label in enumerate(labels) if label == read and seen[j]]
        mean = sum(row[j] for j in places) / len(places) if places else 0.0
        for j in places:
            row[j] = mean
    return row


def quag(attention, rows, columns, pairs, visible):
    """The attention matrix (batch, head, query, key) under QUAG."""
    result = torch.empty(attention.shape, dtype=torch.float64)
    for b, sample in enumerate(attention.double().tolist()):
        for h, head in enumerate(sample):
            for i, row in enumerate(head):
                seen = visible[b, h, i].tolist()
                one = averaged(row, int(rows[b, i]), columns[b].tolist(), seen, pairs)
                result[b, h, i] = torch.tensor(one, dtype=torch.float64)
    return result


def visible(mask, is_causal, sizes):
    *_, rows, keys = sizes
    seen = torch.ones(sizes, dtype=torch.bool)
    if mask is not None:
        seen &= (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min).expand(sizes)
    if is_causal:
        seen &= torch.arange(keys) <= torch.arange(rows)[:, None]
    return seen


def matrix(query, key, *, mask=None, is_causal=False, scale=None, softcap=None, sinks=None):
    """Attention after softmax, (batch, head, query, key); rows without visible keys are 0."""
    (batch, heads, rows, width), keys = query.shape, key.shape[2]
    group = heads // key.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    seen = visible(mask, is_causal, (batch, heads, rows, keys))
    added = torch.zeros((), dtype=torch.float64)
    if mask is not None and mask.dtype != torch.bool:
        added = mask.double()
    added = added.expand(batch, heads, rows, keys)
    result = torch.zeros(batch, heads, rows, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                here = seen[b, h, i]
                if not here.any():
                    continue
                scores = scale * (key[b, h // group].double() @ query[b, h, i].double())
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = (scores + added[b, h, i])[here]
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double()])
                result[b, h, i, here] = scores.softmax(0)[: int(here.sum())]
    return result


def output(attention, value):
    """(batch, head, query, dim) from an explicit attention matrix; heads may share values."""
    group = attention.shape[1] // value.shape[1]
    heads = [attention[:, h] @ value[:, h // group].double() for h in range(attention.shape[1])]
    return torch.stack(heads, dim=1)


def hidden(attention, columns, gone):
    """Attention to the keys of the other modalities only, renormalized; 0 if there are none."""
    kept = attention.clone()
    for b, labels in enumerate(columns.tolist()):
        for j, label in enumerate(labels):
            if label in gone:
                kept[b, :, :, j] = 0.0
    total = kept.sum(-1, keepdim=True)
    return torch.where(total > 0, kept / total.clamp(min=1e-300), 0.0)
