"""Reference MODA: slow and simple, in float64, one sample, head and query at a time."""

import math

import torch


def logit(hidden, decay, base=0.0):
    """Log of the summed weights of the pseudo-attention scores."""
    if not hidden:
        return -math.inf
    return math.log(sum(math.exp(base - j * decay) for j in range(hidden)))


def modular(query, key, value, modality, *, seen, merge, gate=None, pseudo=None, scale=None):
    """(output, own lse, cross lse). ``seen`` (batch, query, key); ``pseudo`` (decay, base, hidden(b, i, own))."""
    batch, heads, rows, width = query.shape
    group, scale = heads // key.shape[1], width**-0.5 if scale is None else scale
    outputs, sums = [], []
    for b in range(batch):
        labels = modality if modality.ndim == 1 else modality[b]
        for h in range(heads):
            for i in range(rows):
                k, v = key[b, h // group].double(), value[b, h // group].double()
                scores = scale * (k @ query[b, h, i].double())
                own = (labels == labels[i]) & (labels[i] >= 0)
                parts = []
                for mine, side in ((True, own), (False, ~own)):
                    here = seen[b, i] & side
                    weights = scores[here].exp()
                    extra = 0.0
                    if pseudo is not None:
                        decay, base, hidden = pseudo
                        extra = math.exp(logit(hidden(b, i, mine), decay, base))
                    z = weights.sum() + extra
                    result = weights @ v[here] / z if here.any() else torch.zeros(v.shape[1], dtype=torch.float64)
                    parts.append((result, z, bool(here.any())))
                (o1, z1, any1), (o2, z2, any2) = parts
                if merge == "sum":
                    output = o1 + o2
                elif merge == "concat":
                    output = torch.cat([o1, o2])
                elif merge == "mass":
                    output = (z1 * o1 + z2 * o2) / (z1 + z2) if z1 + z2 > 0 else o1
                else:
                    part = 1 / (1 + math.exp(-gate[h]))
                    output = o1 if not any2 else o2 if not any1 else part * o1 + (1 - part) * o2
                outputs.append(output)
                sums.append(torch.stack([z1.log(), z2.log()]))
    shape = (batch, heads, rows)
    sums = torch.stack(sums).view(*shape, 2)
    return torch.stack(outputs).view(*shape, -1), sums[..., 0], sums[..., 1]


def norm(matrix, kind):
    if kind == "row":
        return torch.stack([row / row.norm() if row.norm() > 0 else row for row in matrix])
    size = {
        "fro": lambda: math.sqrt(sum(float(e) ** 2 for e in matrix.flatten())),
        "spectral": lambda: (
            float((matrix.T @ matrix).trace()) and float(torch.linalg.eigvalsh(matrix.T @ matrix)[-1].sqrt())
        ),
        "trace": lambda: sum(float(matrix[i, i]) for i in range(len(matrix))),
        "none": lambda: 1.0,
    }[kind]()
    return matrix / size if size > 1e-12 else torch.zeros_like(matrix)


def basis(keys, values, kind, norm_kind, normalize):
    """Basis from the keys (key, width) of one modality; the identity if there are none."""
    if not len(keys):
        return torch.eye(keys.shape[-1], dtype=torch.float64)
    unit = torch.stack([k / k.norm() for k in keys]) if normalize else keys
    if kind == "covariance":
        unit = unit - unit.mean(0)
    other = values if kind == "key_value" else unit
    return norm(sum(torch.outer(k, o) for k, o in zip(unit, other, strict=True)), norm_kind)


def aligned(key, value, modality, valid, state, *, count, kind="gram", norm_kind="row", normalize=True, upto=None):
    """Keys after alignment. ``upto(b, j)`` is the number of positions that key j may depend on; None: all."""
    result = key.double().clone()
    batch, heads, length, width = key.shape
    for b in range(batch):
        labels = modality if modality.ndim == 1 else modality[b]
        for h in range(heads):
            for j in range(length):
                if not valid[b, j] or labels[j] < 0:
                    continue
                m = int(labels[j])
                end = length if upto is None else upto(b, j)
                inside = valid[b] & (torch.arange(length) < end)
                mapped = torch.zeros(width, width, dtype=torch.float64)
                others = [n for n in range(count) if n != m]
                if others:
                    weights = torch.full((len(others),), 1 / len(others), dtype=torch.float64)
                    if "mix" in state:
                        weights = torch.softmax(state["mix"].double()[m, others], 0)
                    for w, n in zip(weights, others, strict=True):
                        chosen = inside & (labels == n)
                        k, v = key[b, h, chosen].double(), value[b, h, chosen].double()
                        mapped += w * basis(k, v, kind, norm_kind, normalize)
                k, weight = key[b, h, j].double(), state["weight"].double()[m]
                if "scale" in state:
                    result[b, h, j] = (k + state["scale"].double()[m] * (k @ mapped)) @ weight
                else:
                    result[b, h, j] = torch.cat([k, k @ mapped]) @ weight
    return result
