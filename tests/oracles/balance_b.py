"""Reference PMR, CML, LFM, AMCo, sample valuation and re-learning: slow and simple, in loops."""

import itertools
import math

from oracles.plain import mean, softmax


def distance(one, other):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def class_mean(features, labels, expected):
    """Mean of the rows with a label; None if there are none."""
    members = [row for row, label in zip(features, labels, strict=True) if label == expected]
    return [mean(column) for column in zip(*members, strict=True)] if members else None


def prototype_probabilities(feature, prototypes):
    """Softmax over the existing prototypes; class -> probability."""
    known = [c for c, prototype in enumerate(prototypes) if prototype is not None]
    return dict(zip(known, softmax([-distance(feature, prototypes[c]) for c in known]), strict=True))


def pmr(features, prototypes, labels, alpha, mu, hard=False):
    """PMR's term for two modalities, as the paper writes it: features[m][i], prototypes[m][c], labels[i]."""
    result = [[prototype_probabilities(f, prototypes[m]) for f in features[m]] for m in range(2)]
    rho = sum(p[y] for p, y in zip(result[0], labels, strict=True)) / sum(
        p[y] for p, y in zip(result[1], labels, strict=True)
    )
    beta = min(1 / rho - 1, 1) if rho < 1 else 0
    gamma = min(rho - 1, 1) if rho >= 1 else 0
    if hard:
        beta, gamma, mu = float(rho < 1), float(rho > 1), 0
    losses = [mean(-math.log(p[y]) for p, y in zip(result[m], labels, strict=True)) for m in range(2)]
    entropies = [mean(entropy(p.values()) for p in result[m]) for m in range(2)]
    pulled = alpha * (beta * losses[0] + gamma * losses[1])
    return pulled - mu * (gamma * entropies[0] + beta * entropies[1])


def cross_entropy(scores, target):
    return -math.log(softmax(scores)[target])


def cml(chain, labels, strength):
    """CML's loss of a chain of logits: chain[t][i] is a row of scores."""
    losses = [mean(cross_entropy(row, y) for row, y in zip(step, labels, strict=True)) for step in chain]
    rises = 0.0
    for before, after in itertools.pairwise(chain):
        rises += mean(max(0.0, max(softmax(b)) - max(softmax(a))) for a, b in zip(before, after, strict=True))
    return sum(losses) / len(losses) + strength * rises


def jensen_shannon(one, other):
    """Divergence of two lists of nonzero probabilities."""
    middle = [(p + q) / 2 for p, q in zip(one, other, strict=True)]
    left = sum(p * math.log(p / m) for p, m in zip(one, middle, strict=True))
    right = sum(q * math.log(q / m) for q, m in zip(other, middle, strict=True))
    return (left + right) / 2


def lfm(logits, alone, labels, a1):
    """LFM's loss: logits[i], alone[m][i] and labels[i]."""
    task = mean(cross_entropy(row, y) for row, y in zip(logits, labels, strict=True))
    pairs = [
        mean(jensen_shannon(softmax(a), softmax(b)) for a, b in zip(one, other, strict=True))
        for one, other in itertools.combinations(alone, 2)
    ]
    return 2 * ((1 - a1) * task + a1 * mean(pairs))


def mass_of(parts):
    """Each modality's part of one softmax over all logits: parts[m] is a row of scores."""
    together = softmax([score for row in parts for score in row])
    count = len(parts[0])
    return [sum(together[m * count : (m + 1) * count]) for m in range(len(parts))]


def amco(parts, labels, hidden, mix, bias, sigma):
    """AMCo's loss: parts[m][i] is a row of scores, ``hidden`` are the masked classes, ``mix`` the rows of M."""
    samples = range(len(labels))
    masses = [mean(mass_of([part[i] for part in parts])[m] for i in samples) for m in range(len(parts))]
    total = sum(mean(cross_entropy(part[i], labels[i]) for i in samples) for part in parts)
    joint = []
    for i in samples:
        summed = [0.0] * len(parts[0][0])
        for part, mass in zip(parts, masses, strict=True):
            for c, score in enumerate(part[i]):
                summed[c] += 0.0 if mass > sigma and c in hidden else score
        scores = [sum(w * x for w, x in zip(row, summed, strict=True)) + b for row, b in zip(mix, bias, strict=True)]
        joint.append(cross_entropy(scores, labels[i]))
    return mean(joint) + total


def shapley(worth, count):
    """Shapley values from all orders of the modalities: worth[frozenset of indices]."""
    values = [0.0] * count
    orders = list(itertools.permutations(range(count)))
    for order in orders:
        before = frozenset()
        for m in order:
            values[m] += (worth[before | {m}] - worth[before]) / len(orders)
            before = before | {m}
    return values


def copies_of(value):
    """Number of copies of a sample for a modality with the given value."""
    if value >= 1:
        return 0
    return 1 if value >= 0.4 else 2 if value >= -0.1 else 3


def purity(clusters, labels):
    """Fraction of samples in the most frequent class of their cluster."""
    hits = 0
    for cluster in set(clusters):
        members = [label for c, label in zip(clusters, labels, strict=True) if c == cluster]
        hits += max(members.count(label) for label in set(members))
    return hits / len(labels)
