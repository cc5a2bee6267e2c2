"""Reference fusion transformers: slow and simple, in float64, one sample at a time without padding."""

import math

import torch

from oracles.fusion import attention, block, joint_attention, layer_norm, linear


def samples(tokens):
    """Returns name -> valid rows for every sample."""
    batch = len(next(iter(tokens.values())).values)
    return [
        {name: part.values[b][part.valid()[b]].detach().double() for name, part in tokens.items()} for b in range(batch)
    ]


def norms(state, prefix, rows, eps=1e-6):
    return torch.stack([layer_norm(state, prefix, row, eps) for row in rows]) if len(rows) else rows


def reads(state, prefix, rows, source, heads):
    """Attention output of each row over a source; for an empty source, the projection of zero."""
    if not len(rows):
        return rows
    if not len(source):
        return torch.stack([linear(state, prefix + "out.", torch.zeros_like(row)) for row in rows])
    return attention(state, prefix, rows, source, [-1] * len(source), [True] * len(source), heads, 1)[0]


def relu(x):
    return torch.stack([e if e > 0 else torch.zeros_like(e) for e in x])


def pooled(rows, cls):
    if not len(rows):
        return torch.zeros(rows.shape[-1], dtype=torch.float64)
    return rows[0] if cls else sum(rows) / len(rows)


def substate(state, prefix):
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


# MulT


def positions(length, width):
    half = width // 2
    table = torch.zeros(length, width, dtype=torch.float64)
    for t in range(length):
        for i in range(half):
            angle = (t + 1) / 10_000 ** (i / max(half - 1, 1))
            table[t, i], table[t, half + i] = math.sin(angle), math.cos(angle)
    return table


def cross_encoder(state, prefix, rows, source, *, depth, heads, causal):
    """``source`` None: self-attention."""

    def embedded(values):
        return math.sqrt(values.shape[1]) * values + positions(*values.shape)

    rows, source = embedded(rows), None if source is None else embedded(source)
    for number in range(depth):
        here = f"{prefix}blocks.{number}."
        keys = norms(state, here + "norm_attention.", rows if source is None else source)
        queries = norms(state, here + "norm_attention.", rows)
        read = []
        for i, query in enumerate(queries):
            gap = abs(len(rows) - len(keys))
            allowed = [key for j, key in enumerate(keys) if not causal or j <= i + gap]
            read.append(
                reads(state, here + "attention.", query[None], torch.stack(allowed) if allowed else keys[:0], heads)
            )
        rows = rows + torch.cat(read) if read else rows
        hidden = [relu(linear(state, here + "mlp.0.", row)) for row in norms(state, here + "norm_mlp.", rows)]
        rows = rows + torch.stack([linear(state, here + "mlp.3.", h) for h in hidden]) if hidden else rows
    return norms(state, prefix + "norm.", rows)


def mult(state, tokens, *, heads, depth, causal=False):
    """Features (sample, feature) without readout, and the final streams of every sample."""
    features, streams = [], []
    for sample in samples(tokens):
        narrow = {
            name: torch.stack([linear(state, f"project.{name}.", row) for row in rows])
            if len(rows)
            else torch.zeros(0, len(state[f"project.{name}.weight"]), dtype=torch.float64)
            for name, rows in sample.items()
        }
        final = {}
        for m in tokens:
            sources = sorted(n for n in tokens if n != m) or [m]
            options = {"heads": heads, "causal": causal}
            read = [
                cross_encoder(
                    state, f"cross.{m}.{n}.", narrow[m], narrow[n] if n != m else None, depth=depth, **options
                )
                for n in sources
            ]
            final[m] = cross_encoder(
                state, f"memory.{m}.", torch.cat(read, dim=1), None, depth=max(depth, 3), **options
            )
        streams.append(final)
        last = [rows[-1] if len(rows) else rows.new_zeros(rows.shape[1]) for rows in final.values()]
        features.append(torch.cat(last))
    return torch.stack(features), streams


def residual_head(state, h):
    """y = W_o (h + W_2 relu(W_1 h))."""
    hidden = [linear(state, "hidden.3.", relu(linear(state, "hidden.0.", row))) for row in h]
    return torch.stack([linear(state, "out.", row + extra) for row, extra in zip(h, hidden, strict=True)])


def readout(state, streams, heads=1):
    """Joint attention on the final streams: features and shares of every sample."""
    result = []
    for final in streams:
        parts = [(rows[None], None) for rows in final.values()]
        result.append(joint_attention(substate(state, "joint."), parts, heads=heads))
    return torch.cat([features for features, _ in result]), torch.cat([share for _, share in result])


# MBT


def mbt(state, tokens, *, depth, heads, exchange="bottleneck"):
    """(sample, modality, dim): pooled vector of each modality divided by the number of present modalities."""
    cls = {name: part.cls for name, part in tokens.items()}
    result = []
    for sample in samples(tokens):
        shared = state.get("bottleneck", torch.zeros(0, next(iter(sample.values())).shape[1], dtype=torch.float64))
        streams = {name: rows for name, rows in sample.items() if len(rows)}
        for number in range(depth):
            after, bottlenecks = {}, []
            for name, rows in streams.items():
                others = [r for other, r in streams.items() if other != name] if exchange == "cross" else [shared]
                both = torch.cat([*others, rows])
                both, _ = block(state, f"blocks.{name}.{number}.", both, [-1] * len(both), [True] * len(both), heads, 1)
                after[name] = both[len(both) - len(rows) :]
                bottlenecks.append(both[: len(both) - len(rows)])
            streams = after
            if exchange == "bottleneck" and bottlenecks:
                shared = sum(bottlenecks) / len(bottlenecks)
        vectors = []
        for name, rows in sample.items():
            if name not in streams:
                vectors.append(torch.zeros(rows.shape[1], dtype=torch.float64))
            else:
                vectors.append(pooled(norms(state, f"norms.{name}.", streams[name]), cls[name]) / len(streams))
        result.append(torch.stack(vectors))
    return torch.stack(result)


# Post-norm layers


def post_attention(state, prefix, rows, source, heads, eps=1e-6):
    return norms(state, prefix + "norm.", rows + reads(state, prefix + "attention.", rows, source, heads), eps)


def post_block(state, prefix, rows, source, heads, eps=1e-6):
    """``source`` is the rows, or the part of them that is visible."""
    rows = post_attention(state, prefix + "reading.", rows, source, heads, eps)
    hidden = [relu(linear(state, prefix + "mlp.0.", row)) for row in rows]
    rows = rows + torch.stack([linear(state, prefix + "mlp.2.", h) for h in hidden]) if hidden else rows
    return norms(state, prefix + "norm.", rows, eps)


# JMT


def stretched(rows, length):
    """Linear interpolation that keeps both ends."""
    if not len(rows):
        return torch.zeros(length, rows.shape[1], dtype=torch.float64)
    result = []
    for t in range(length):
        index = t * (len(rows) - 1) / max(length - 1, 1)
        low = min(math.floor(index + 1e-9), len(rows) - 1)
        high = min(low + 1, len(rows) - 1)
        result.append(rows[low] + (index - low) * (rows[high] - rows[low]))
    return torch.stack(result)


def jmt(state, tokens, *, heads, depth, output):
    names, result = sorted(tokens), []
    cls = all(part.cls for part in tokens.values())
    width = state["join.bias"].shape[0]
    for sample in samples(tokens):
        length = max(len(rows) for rows in sample.values())
        count = len(names) + 1
        pairs = [(s, t) for s in range(count) for t in range(count) if s != t]
        if length == 0:
            result.append(torch.zeros(width * (len(pairs) if output == "fc" else 1), dtype=torch.float64))
            continue
        streams = [stretched(sample[name], length) for name in names]
        present = [len(sample[name]) > 0 for name in names] + [True]
        streams.append(torch.stack([linear(state, "join.", torch.cat([s[t] for s in streams])) for t in range(length)]))
        for number in range(count):
            for layer in range(depth):
                rows = streams[number]
                readable = rows if present[number] else rows[:0]
                streams[number] = post_block(state, f"encoders.{number}.{layer}.", rows, readable, heads)
        read = [
            reads(state, f"cross.{s}.", streams[s], streams[t] if present[t] else streams[t][:0], heads)
            for s, t in pairs
        ]
        places = []
        for t in range(length):
            if output == "fc":
                places.append(
                    torch.cat([r[t] if present[s] else 0 * r[t] for r, (s, _) in zip(read, pairs, strict=True)])
                )
                continue
            rows = torch.stack([r[t] for r in read])
            asking = [index for index, (s, _) in enumerate(pairs) if present[s]]
            for layer in range(depth):
                rows = post_block(state, f"pair_encoder.{layer}.", rows, rows[asking], heads)
            places.append(reads(state, "pair_attention.", rows[-1:], rows[asking], heads)[0])
        result.append(pooled(torch.stack(places), cls))
    return torch.stack(result)


# MMML


def mmml(state, tokens, *, heads, depth):
    """Features (sample, feature) without readout, and the final streams of every sample."""
    features, final = [], []
    for streams in samples(tokens):
        for number in range(depth):
            here, after = f"layers.{number}.", {}
            for name, rows in streams.items():
                others = [r for other, r in streams.items() if other != name] or [rows]
                crossed = post_attention(state, f"{here}cross.{name}.", rows, torch.cat(others), heads, 1e-12)
                after[name] = post_block(state, f"{here}own.{name}.", crossed, crossed, heads, 1e-12)
            streams = after
        final.append(streams)
        features.append(torch.cat([pooled(rows, tokens[name].cls) for name, rows in streams.items()]))
    return torch.stack(features), final


# Mid fusion


def mid(state, tokens, *, heads, depth):
    """Features (sample, dim) and shares of the class row in the last block (sample, head, modality)."""
    features, shares = [], []
    for sample in samples(tokens):
        rows = torch.cat([state["cls"][None], *sample.values()])
        labels = [-1] + [index for index, part in enumerate(sample.values()) for _ in part]
        for number in range(depth):
            rows, share = block(state, f"blocks.{number}.", rows, labels, [True] * len(rows), heads, len(sample))
        features.append(layer_norm(state, "norm.", rows[0]))
        shares.append(share[:, 0])
    return torch.stack(features), torch.stack(shares)


# Contributions


def joint_contributions(state, head, tokens, *, heads, include_cls_key=True):
    """(sample, modality, output) of joint attention of depth 1, key by key."""
    result = []
    for sample in samples(tokens):
        rows = torch.cat([state["cls"][None], *sample.values()])
        labels = [-1] + [index for index, part in enumerate(sample.values()) for _ in part]
        query = linear(state, "attention.query.", rows[0])
        allowed = list(range(len(rows))) if include_cls_key else list(range(1, len(rows)))
        width = len(query) // heads
        parts = torch.zeros(len(sample) + 1, len(query), dtype=torch.float64)
        for h in range(heads):
            here = slice(h * width, (h + 1) * width)
            keys = [linear(state, "attention.key.", rows[j])[here] for j in allowed]
            scores = [math.exp(float(query[here] @ key) / math.sqrt(width)) for key in keys]
            for j, score in zip(allowed, scores, strict=True):
                value = linear(state, "attention.value.", rows[j])[here]
                parts[labels[j], here] += score / sum(scores) * value
        projected = [part @ state["attention.out.weight"].mT @ head["weight"].mT for part in parts]
        biases = state["attention.out.bias"] @ head["weight"].mT + head["bias"]
        rest = (projected.pop() + biases) / len(sample)
        result.append(torch.stack([part + rest for part in projected]))
    return torch.stack(result)
