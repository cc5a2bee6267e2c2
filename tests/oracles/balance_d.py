"""Reference ARL, InfoReg, CGGM, data remixing, QMF and TMC: slow and simple, in loops over plain numbers."""

import math

from scipy.special import gammaln, psi

from oracles.plain import mean, softmax


def entropy(scores):
    return -sum(p * math.log(p) for p in softmax(scores) if p > 0)


def cross_entropy(scores, target):
    return -math.log(softmax(scores)[target])


def arl(entropies, sizes, temperature, floor):
    """Factors of two or more modalities, all of which have samples."""
    number = len(entropies)
    certain = [1 / max(h / sum(entropies), floor / number) for h in entropies]
    certain = [c / sum(certain) for c in certain]
    used = [s / sum(sizes) for s in sizes]
    others = [mean(u for n, u in enumerate(used) if n != m) for m in range(number)]
    return [1 + w for w in softmax([temperature * o * c for o, c in zip(others, certain, strict=True)])]


def growth(traces, window=10):
    """Growth of the mean trace over a window, from the traces of all epochs of one modality."""
    now = sum(traces[-window:]) / window
    before = sum(traces[:-1][-window:]) / window
    return (now - before) / now


def restraint(scores, rates, strength, threshold):
    result = []
    for m, score in enumerate(scores):
        gap = score - mean(s for n, s in enumerate(scores) if n != m)
        result.append(strength * math.exp(math.tanh(gap)) if gap > 0 and rates[m] > threshold else 0.0)
    return result


def cggm_terms(progress):
    total = sum(progress)
    return [min(max((total - d) / total, 0.0), 1.0) for d in progress]


def cosine(one, other):
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def remixed(alone):
    """The modality of each sample; alone[m][i] are its logits from one modality."""
    return [max(range(len(alone)), key=lambda m: entropy(alone[m][i])) for i in range(len(alone[0]))]


def energy_weight(scores, scale):
    return scale * math.log(sum(math.exp(score) for score in scores))


def ranking(weights, losses):
    """Ranking loss of the weights of all samples, neighbors in a ring."""
    result = []
    for i in range(len(weights)):
        j = (i + 1) % len(weights)
        sign = (losses[i] > losses[j]) - (losses[i] < losses[j])
        result.append(max(0.0, sign * (weights[i] - weights[j]) + abs(losses[i] - losses[j])))
    return mean(result)


def scaled(values, others=()):
    low, high = min([*values, *others]), max([*values, *others])
    return [(value - low) / (high - low) for value in values]


def dempster(one, other):
    """Evidence of two combined modalities: belief masses, conflict, and back."""
    outcomes = len(one)
    masses, doubts = [], []
    for evidence in (one, other):
        strength = sum(evidence) + outcomes
        masses.append([e / strength for e in evidence])
        doubts.append(outcomes / strength)
    conflict = sum(masses[0][i] * masses[1][j] for i in range(outcomes) for j in range(outcomes) if i != j)
    belief = [
        (a * b + a * doubts[1] + b * doubts[0]) / (1 - conflict) for a, b in zip(masses[0], masses[1], strict=True)
    ]
    doubt = doubts[0] * doubts[1] / (1 - conflict)
    return [b * outcomes / doubt for b in belief]


def evidential(evidence, target, strength):
    """Evidential loss of one sample."""
    alpha = [e + 1 for e in evidence]
    expected = psi(sum(alpha)) - psi(alpha[target])
    false = [1.0 if k == target else a for k, a in enumerate(alpha)]
    total, outcomes = sum(false), len(false)
    divergence = gammaln(total) - sum(gammaln(a) for a in false) - gammaln(outcomes)
    divergence += sum((a - 1) * (psi(a) - psi(total)) for a in false)
    return float(expected + strength * divergence)


def softplus(score):
    return math.log1p(math.exp(score))
