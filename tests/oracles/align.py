"""Alignment losses and metrics by double loops in float64."""

import itertools
import math

import numpy as np


def cosine_logits(a, b, scale, bias=0.0):
    rows, columns = len(a), len(b)
    return np.array([[scale * sum(a[i] * b[j]) + bias for j in range(columns)] for i in range(rows)])


def directed_info_nce(z, positives, ignored=None, smoothing=0.0, beta=0.0, top_k=None):
    """Mean over rows with a positive of -sum_j t_j log p_j."""
    losses = []
    for i, row in enumerate(z):
        own = [j for j in range(len(row)) if positives[i][j]]
        if not own:
            continue
        others = [j for j in range(len(row)) if not positives[i][j] and not (ignored is not None and ignored[i][j])]
        mean = sum(math.exp(beta * row[j]) for j in others) / len(others) if others else 1.0
        weight = {j: math.exp(beta * row[j]) / mean for j in others} | dict.fromkeys(own, 1.0)
        if top_k is not None:
            seen = sorted((weight[j] * math.exp(row[j]) for j in others), reverse=True)
            others = [j for j in others if weight[j] * math.exp(row[j]) >= seen[min(top_k, len(seen)) - 1]]
        kept = own + others
        total = sum(weight[j] * math.exp(row[j]) for j in kept)
        loss = 0.0
        for j in kept:
            target = smoothing / len(kept) + ((1 - smoothing) / len(own) if j in own else 0.0)
            loss -= target * math.log(weight[j] * math.exp(row[j]) / total)
        losses.append(loss)
    return sum(losses) / len(losses) if losses else 0.0


def info_nce(a, b, scale, positives=None, ignored=None, **options):
    z = cosine_logits(a, b, scale)
    positives = np.eye(len(a), dtype=bool) if positives is None else positives
    there = directed_info_nce(z, positives, ignored, **options)
    back = directed_info_nce(z.T, positives.T, None if ignored is None else ignored.T, **options)
    return (there + back) / 2


def siglip(a, b, scale, bias, ids=None):
    ids = range(len(a)) if ids is None else ids
    total = 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            sign = 1 if ids[i] == ids[j] else -1
            total += math.log(1 + math.exp(-sign * (scale * sum(a[i] * b[j]) + bias)))
    return total / len(a)


def triplet(similarity, positives, margin):
    losses = []
    for i, row in enumerate(similarity):
        own = [row[j] for j in range(len(row)) if positives[i][j]]
        others = [row[j] for j in range(len(row)) if not positives[i][j]]
        if own and others:
            losses.append(max(0.0, margin + max(others) - min(own)))
    return sum(losses) / len(losses) if losses else 0.0


def captioning(logits, labels):
    losses = []
    for sample, words in zip(logits, labels, strict=True):
        for t in range(len(words) - 1):
            if words[t + 1] != -100:
                total = sum(math.exp(x) for x in sample[t])
                losses.append(-math.log(math.exp(sample[t][words[t + 1]]) / total))
    return sum(losses) / len(losses) if losses else 0.0


def splice(text, ids, labels, mask, places, media):
    """Rows of (embedding, label, modality), one placeholder for a whole medium; ``places``: kind -> id, in order."""
    left, rows = {kind: list(parts) for kind, parts in media.items()}, []
    for sample in range(len(ids)):
        row = []
        for word in range(len(ids[sample])):
            if not mask[sample][word]:
                continue
            kind = next((kind for kind, index in places.items() if ids[sample][word] == index), None)
            if kind is None:
                row.append((text[sample][word], labels[sample][word], 0))
            else:
                number = 1 + list(places).index(kind)
                row += [(token, -100, number) for token in left[kind].pop(0)]
        rows.append(row)
    return rows


def neighbors(order):
    return list(itertools.pairwise(order))


def orders(row, relevant, ties):
    """Yields the relevance in ranking order, for every order of tied items, by trying all permutations."""
    everything = itertools.permutations(range(len(row)))
    sorted_ = [order for order in everything if all(row[a] >= row[b] for a, b in neighbors(order))]
    if ties != "average":
        first = ties == "optimistic"
        sorted_ = [
            order
            for order in sorted_
            if all(row[a] > row[b] or (relevant[a] == first) >= (relevant[b] == first) for a, b in neighbors(order))
        ]
    return [[relevant[j] for j in order] for order in sorted_]


def rank_of_first(ranking):
    return 1 + ranking.index(True)


def average_precision(ranking):
    places = [index for index, right in enumerate(ranking) if right]
    return sum((i + 1) / (index + 1) for i, index in enumerate(places)) / len(places)


def warping(cost):
    """Returns the minimum cost over all monotone paths, by enumeration."""
    rows, columns = len(cost), len(cost[0])

    def onward(i, j):
        if (i, j) == (rows - 1, columns - 1):
            return cost[i][j]
        steps = [(i + 1, j), (i, j + 1), (i + 1, j + 1)]
        return cost[i][j] + min(onward(*at) for at in steps if at[0] < rows and at[1] < columns)

    return onward(0, 0)


def soft_attention(query, key, value, mask):
    """Softmax attention of one head; a row without keys gives 0."""
    output = np.zeros((len(query), value.shape[1]))
    for i in range(len(query)):
        seen = [j for j in range(len(key)) if mask[i][j]]
        weight = [math.exp(sum(query[i] * key[j]) / math.sqrt(query.shape[1])) for j in seen]
        for w, j in zip(weight, seen, strict=True):
            output[i] += w / sum(weight) * value[j]
    return output
