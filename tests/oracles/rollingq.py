"""Reference RollingQ: loops over samples, heads, queries and keys in float64."""

import math

import numpy as np


def rotation_row(x, y):
    """Row form of the rotation: R = I - G + G^2 / (1 + c) with G = y^T x - x^T y, for directions that are not
    opposite.
    """
    x, y = (np.asarray(v, dtype=np.float64) / np.linalg.norm(v) for v in (x, y))
    g = np.outer(y, x) - np.outer(x, y)
    return np.eye(len(x)) - g + g @ g / (1.0 + x @ y)


def cos(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def step(query, keys, c, rho):
    """Returns (AIR, alpha, anchor, R) from the mean query, name -> mean key and name -> indicator."""
    query = np.asarray(query, dtype=np.float64)
    air = {m: c[m] - sum(c[n] for n in c if n != m) / (len(c) - 1) for m in c}
    total = sum(math.exp(-2.0 * rho * c[m]) for m in c)
    alpha = {m: math.exp(-2.0 * rho * c[m]) / total for m in c}
    u = sum(alpha[m] * np.asarray(keys[m], dtype=np.float64) / np.linalg.norm(keys[m]) for m in c)
    anchor = u * np.linalg.norm(query) / np.linalg.norm(u)
    return air, alpha, anchor, rotation_row(query, anchor)


def indicator(kind, query, keys, labels, modality, modalities):
    """Target shares for one query row and one sample: valid keys (K, d) and their labels."""
    d = len(query)
    own = [k for k, label in zip(keys, labels, strict=True) if label == modality]
    mean = sum(own) / len(own)
    if kind == "cosine":
        return cos(query, mean)
    if kind == "logit":
        return float(query @ mean) / math.sqrt(d)
    weight = [math.exp(float(query @ k) / math.sqrt(d)) for k in keys]
    if kind == "mass":
        return sum(w for w, label in zip(weight, labels, strict=True) if label == modality) / sum(weight)
    per_token = {}
    for m in modalities:
        mine = [w for w, label in zip(weight, labels, strict=True) if label == m]
        if mine:
            per_token[m] = sum(mine) / len(mine)
    return per_token[modality] / sum(per_token.values())


def means(samples, names, head, *, kind="cosine"):
    """RollingQ step of one head: mean query, name -> mean key, name -> indicator, name -> tokens.

    ``samples`` are tuples (query (H, Q, d), key (Hk, K, d), labels (K,), valid (K,), rows (Q,)); a query head reads key
    head h // (H / Hk).
    """
    queries, keys, values, tokens = [], {n: [] for n in names}, {n: [] for n in names}, {n: [] for n in names}
    for query, key, labels, valid, rows in samples:
        group = query.shape[0] // key.shape[0]
        kept = [j for j in range(len(labels)) if valid[j]]
        k = [np.asarray(key[head // group, j], dtype=np.float64) for j in kept]
        label = [int(labels[j]) for j in kept]
        q = [np.asarray(query[head, i], dtype=np.float64) for i in range(query.shape[1]) if rows[i]]
        present = [m for m in range(len(names)) if m in label]
        if not q:
            continue
        queries.append(sum(q) / len(q))
        for m in present:
            own = [k[i] for i in range(len(k)) if label[i] == m]
            keys[names[m]].append(sum(own) / len(own))
            tokens[names[m]].append(len(own))
            values[names[m]].append(sum(indicator(kind, row, k, label, m, present) for row in q) / len(q))
    seen = [n for n in names if keys[n]]
    return (
        sum(queries) / len(queries),
        {n: sum(keys[n]) / len(keys[n]) for n in seen},
        {n: sum(values[n]) / len(values[n]) for n in seen},
        {n: sum(tokens[n]) / len(tokens[n]) for n in seen},
    )


def shares(query, keys, tokens):
    """Target shares: p_m proportional to L_m exp(q . E[K_m] / sqrt(d))."""
    weight = {n: tokens[n] * math.exp(float(query @ keys[n]) / math.sqrt(len(query))) for n in keys}
    return {n: w / sum(weight.values()) for n, w in weight.items()}
