"""Reference rotation, attention, static and joint fusion: slow and simple, in float64."""

import math

import torch


def rotation_column(source, target):
    """W = I + G + G^2 / (1 + c) with W x = y for columns; the row form is its transpose."""
    x, y = (v.double() / math.sqrt(sum(float(e) ** 2 for e in v)) for v in (source, target))
    d = len(x)
    c = sum(float(x[i] * y[i]) for i in range(d))
    G = torch.zeros(d, d, dtype=torch.float64)
    for i in range(d):
        for j in range(d):
            G[i, j] = y[i] * x[j] - x[i] * y[j]
    return torch.eye(d, dtype=torch.float64) + G + G @ G / (1 + c)


def linear(state, prefix, x):
    """x W^T + b for one vector, from a state dict in float64."""
    return x @ state[prefix + "weight"].mT + state.get(prefix + "bias", 0.0)


def layer_norm(state, prefix, x, eps=1e-6):
    mean = x.mean()
    return (x - mean) / math.sqrt(float(((x - mean) ** 2).mean()) + eps) * state[prefix + "weight"] + state[
        prefix + "bias"
    ]


def gelu(x):
    return torch.stack([0.5 * e * (1 + torch.special.erf(e / math.sqrt(2.0))) for e in x])


def read_out(query, keys, values, labels, valid, num_modalities):
    """One query row of one head: softmax over the valid keys; zeros if there are none. Returns output and share."""
    share, output = torch.zeros(num_modalities, dtype=torch.float64), torch.zeros(values.shape[-1], dtype=torch.float64)
    allowed = [j for j in range(len(keys)) if valid[j]]
    if not allowed:
        return output, share
    logits = [float(query @ keys[j]) / math.sqrt(len(query)) for j in allowed]
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    for j, weight in zip(allowed, weights, strict=True):
        probability = weight / sum(weights)
        output += probability * values[j]
        if labels[j] >= 0:
            share[labels[j]] += probability
    return output, share


def attention(state, prefix, rows, source, labels, valid, heads, num_modalities):
    """Multi-head attention of all rows of one sample: outputs (row, dim) and shares (head, row, modality)."""
    query = torch.stack([linear(state, prefix + "query.", row) for row in rows])
    key = torch.stack([linear(state, prefix + "key.", row) for row in source])
    value = torch.stack([linear(state, prefix + "value.", row) for row in source])
    width = query.shape[-1] // heads
    shares = torch.zeros(heads, len(rows), num_modalities, dtype=torch.float64)
    outputs = []
    for i in range(len(rows)):
        parts = []
        for head in range(heads):
            here = slice(head * width, (head + 1) * width)
            part, shares[head, i] = read_out(
                query[i, here], key[:, here], value[:, here], labels, valid, num_modalities
            )
            parts.append(part)
        outputs.append(linear(state, prefix + "out.", torch.cat(parts)))
    return torch.stack(outputs), shares


def block(state, prefix, rows, labels, valid, heads, num_modalities):
    """A pre-norm block on one sample: x + attention(norm(x)), then x + mlp(norm(x))."""
    normed = torch.stack([layer_norm(state, prefix + "norm_attention.", row) for row in rows])
    read_out, shares = attention(state, prefix + "attention.", normed, normed, labels, valid, heads, num_modalities)
    rows = rows + read_out
    hidden = [gelu(linear(state, prefix + "mlp.0.", layer_norm(state, prefix + "norm_mlp.", row))) for row in rows]
    return rows + torch.stack([linear(state, prefix + "mlp.2.", h) for h in hidden]), shares


def transformer(state, prefix, rows, valid, depth, heads):
    labels = [-1] * len(rows)
    for number in range(depth):
        rows, _ = block(state, f"{prefix}blocks.{number}.", rows, labels, valid, heads, 1)
    return torch.stack([layer_norm(state, prefix + "norm.", row) for row in rows])


def joint_attention(state, tokens, *, heads, depth=1, include_cls_key=True):
    """Joint attention over all rows; tokens: a list of (values, mask). Returns features and shares."""
    names, features, shares = len(tokens), [], []
    for sample in range(len(tokens[0][0])):
        rows, labels, valid = [state["cls"]], [-1], [True]
        for index, (values, mask) in enumerate(tokens):
            for position in range(values.shape[1]):
                rows.append(values[sample, position].double())
                labels.append(index)
                valid.append(True if mask is None else bool(mask[sample, position]))
        rows = torch.stack(rows)
        if depth == 1:
            start = 0 if include_cls_key else 1
            rows, share = attention(
                state, "attention.", rows, rows[start:], labels[start:], valid[start:], heads, names
            )  # fmt: skip
            features.append(rows[0])
        else:
            for number in range(depth):
                rows, share = block(state, f"blocks.{number}.", rows, labels, valid, heads, names)
            features.append(layer_norm(state, "norm.", rows[0]))
        shares.append(share[:, 0])
    return torch.stack(features), torch.stack(shares)


def mean_pool(values, mask, cls=False):
    """The class token, or the mean over valid tokens; zeros for a sample without tokens."""
    result = torch.zeros(values.shape[0], values.shape[2], dtype=torch.float64)
    for sample in range(values.shape[0]):
        rows = [j for j in range(values.shape[1]) if mask is None or mask[sample, j]]
        rows = [j for j in rows if j == 0] if cls else rows
        for j in rows:
            result[sample] += values[sample, j].double() / len(rows)
    return result


def static(kind, fusion, head, vectors, source=0):
    """Logits of a static fusion from pooled vectors, a list of (batch, dim); the source is the first."""
    others = [f for m, f in enumerate(vectors) if m != source] or [vectors[source]]
    logits = []
    for sample in range(len(vectors[0])):
        f = [v[sample] for v in vectors]
        if kind == "unimodal":
            logits.append(linear(head, "", f[source]))
        elif kind == "concat":
            logits.append(linear(head, "", torch.cat(f)))
        elif kind == "sum":
            logits.append(sum(linear(head, f"parts.{m}.", f[m]) for m in range(len(f))))
        else:
            mixed = torch.zeros_like(f[0])
            for index, other in enumerate(others):
                mixed += _modulated(kind, fusion, index, f[source], other[sample])
            logits.append(linear(head, "", mixed))
    return torch.stack(logits)


def _modulated(kind, state, index, source, target):
    if kind == "film":
        both = linear(state, f"modulation.{index}.", source)
        gamma, beta = both[: len(target)], both[len(target) :]
        return gamma * target + beta
    gate = linear(state, f"gate.{index}.", source)
    return torch.stack([1 / (1 + torch.exp(-g)) for g in gate]) * linear(state, f"value.{index}.", target)


def patch_encoder(state, pixels, patch, depth, heads):
    """Patches row by row, class token first, positions added, blocks, final norm."""
    result = []
    for picture in pixels.double():
        rows = [state["cls"]]
        for top in range(0, picture.shape[1], patch):
            for left in range(0, picture.shape[2], patch):
                piece = picture[:, top : top + patch, left : left + patch]
                rows.append((state["patches.weight"] * piece).sum(dim=(1, 2, 3)) + state["patches.bias"])
        rows = torch.stack(rows) + state["positions"]
        result.append(transformer(state, "transformer.", rows, [True] * len(rows), depth, heads))
    return torch.stack(result)


def sequence_encoder(state, frames, mask, stride, depth, heads):
    """Frames joined by stride (zeros where there are none), projected, class token, positions, blocks, final norm."""
    result, masks = [], []
    for number, sample in enumerate(frames.double()):
        real = [mask is None or bool(mask[number, t]) for t in range(len(sample))]
        rows, valid = [state["cls"]], [any(real)]
        for start in range(0, len(sample), stride):
            group = torch.zeros(stride, sample.shape[1], dtype=torch.float64)
            for offset in range(stride):
                if start + offset < len(sample) and real[start + offset]:
                    group[offset] = sample[start + offset]
            rows.append(linear(state, "project.", group.flatten()))
            valid.append(any(real[start : start + stride]))
        rows = torch.stack(rows) + state["positions"][: len(rows)]
        result.append(transformer(state, "transformer.", rows, valid, depth, heads))
        masks.append(valid)
    return torch.stack(result), torch.tensor(masks)


def state_as_float64(module):
    """The state dict of a module, in float64."""
    return {name: value.double() for name, value in module.state_dict().items()}
