"""Reference OGM, AGM, OPM, MMCosine and MBSD: slow and simple, in loops over plain numbers."""

import itertools
import math

from oracles.plain import mean, softmax

FLOOR = 1e-8


def true_score(row, target, task):
    """Score of the prediction for one sample."""
    if task == "classification":
        return softmax(row)[target]
    if task == "multilabel":
        result = []
        for score, expected in zip(row, target, strict=True):
            yes = 1 / (1 + math.exp(-score))
            result.append(yes if expected == 1 else 1 - yes)
        return mean(result)
    return math.exp(-mean((a - b) ** 2 for a, b in zip(row, target, strict=True)))


def mean_scores(answers, targets, present, task="classification"):
    """answers[m][i] are rows of logits, present[m][i] is the presence; None for a modality missing from the batch."""
    result = []
    for rows, has in zip(answers, present, strict=True):
        kept = [true_score(row, t, task) for row, t, yes in zip(rows, targets, has, strict=True) if yes]
        result.append(mean(kept) if kept else None)
    return result


def ratios(scores):
    """rho_m of each modality; 1 if there is no other modality."""
    result = []
    for m, score in enumerate(scores):
        others = [s for n, s in enumerate(scores) if n != m and s is not None]
        result.append(1.0 if score is None or not others else score / mean(others))
    return result


def ogm(scores, alpha):
    return [1 - math.tanh(alpha * rho) if rho > 1 else 1.0 for rho in ratios(scores)]


def opm(scores, q_base, alpha):
    return [min(max(q_base * (1 + alpha * math.tanh(rho - 1)), 0), 1) if rho > 1 else 0.0 for rho in ratios(scores)]


def shapley(answer, count):
    """phi_m: the marginal contribution of modality m, mean over all orders; ``answer`` maps a frozenset to a number."""
    orders = list(itertools.permutations(range(count)))
    result = [0.0] * count
    for order in orders:
        for index, m in enumerate(order):
            before = frozenset(order[:index])
            result[m] += (answer[before | {m}] - answer[before]) / len(orders)
    return result


def agm_error(rows, targets, present, task="classification"):
    """e_m over the samples that have the modality; None if there are none."""
    result = [
        -math.log(max(true_score(row, t, task), FLOOR))
        for row, t, yes in zip(rows, targets, present, strict=True)
        if yes
    ]
    return mean(result) if result else None


def agm(errors, usual, alpha):
    """kappa_m; errors are None for a missing modality, usual is None for one that was never present."""
    known = [m for m in range(len(errors)) if errors[m] is not None and usual[m] is not None]
    factors = [1.0] * len(errors)
    for m in known:
        now, before, others = 0.0, 0.0, 0
        for n in known:
            if n != m:
                now += errors[n]
                before += usual[n]
                others += 1
        if others > 0:
            r = math.exp(now / others - errors[m])
            tau = math.exp(before / others - usual[m])
            factors[m] = math.exp(alpha * min(tau - r, 7))
    return factors


def cosine(one, other):
    lengths = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths > 0 else 0.0


def cosine_logits(features, weights, scale):
    """Logits of one sample from features[m] and weights[m][c]; a modality of zeros contributes nothing."""
    return [
        scale * sum(cosine(f, weight[c]) for f, weight in zip(features, weights, strict=True))
        for c in range(len(weights[0]))
    ]


def is_correct(row, target, task):
    if task == "classification":
        return row.index(max(row)) == target
    return true_score(row, target, task) > 0.5


def bernoulli_kl(p, q):
    """KL divergence of two Bernoulli distributions."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def mbsd_pair(one, other, target, task="classification"):
    """Term of one sample and the rows of logits of two modalities."""
    p, q = true_score(one, target, task), true_score(other, target, task)
    if not is_correct(one, target, task) and not is_correct(other, target, task):
        return 0.0
    apart = sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one)
    return abs(p - q) * (apart + bernoulli_kl(max(p, q), min(p, q)))


def mbsd(answers, targets, present, task="classification"):
    """The mean over pairs of the mean over samples that have both."""
    result = []
    for m, n in itertools.combinations(range(len(answers)), 2):
        kept = [
            mbsd_pair(answers[m][i], answers[n][i], target, task)
            for i, target in enumerate(targets)
            if present[m][i] and present[n][i]
        ]
        result.append(mean(kept) if kept else 0.0)
    return mean(result)
