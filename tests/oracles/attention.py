"""Reference attention, shares and masks: slow and simple, in float64."""

import math

import torch


def attend(query, key, value, modality, num_modalities, mask=None, is_causal=False, scale=None):
    """(output, share, special) with loops over samples, heads and queries. `mask` is 4-D, boolean or additive."""
    batch, heads, rows, width = query.shape
    group = heads // key.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    labels = modality.expand(batch, -1)
    outputs, shares = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                k, v = key[b, h // group].double(), value[b, h // group].double()
                scores = scale * (k @ query[b, h, i].double())
                seen = torch.ones(len(k), dtype=torch.bool)
                if is_causal:
                    seen = torch.arange(len(k)) <= i
                if mask is not None:
                    row = mask.expand(batch, heads, rows, len(k))[b, h, i]
                    if row.dtype == torch.bool:
                        seen = seen & row
                    else:
                        seen = seen & (row > torch.finfo(row.dtype).min)
                        scores = scores + torch.where(seen, row.double(), 0.0)
                weights = torch.softmax(scores[seen], 0) if seen.any() else scores[seen]
                outputs.append(weights @ v[seen])
                columns = [weights[labels[b][seen] == m].sum() for m in range(-1, num_modalities)]
                shares.append(torch.stack(columns))
    output = torch.stack(outputs).view(batch, heads, rows, value.shape[-1])
    columns = torch.stack(shares).view(batch, heads, rows, num_modalities + 1)
    return output, columns[..., 1:], columns[..., 0]
