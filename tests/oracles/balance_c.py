"""Reference MMPareto, gradient blending, Greedy, MLA, ReconBoost and UMT: slow and simple, in loops."""

import math

from oracles.plain import mean, softmax


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def norm(vector):
    return math.sqrt(dot(vector, vector))


def cross_entropy(scores, target):
    return -math.log(softmax(scores)[target])


def min_norm(joint, alone):
    """The two weights of MMPareto; in case of conflict, from the minimum of the quadratic on the segment."""
    if dot(joint, alone) >= 0:
        return 0.5, 0.5
    # |w a + (1 - w) b|^2 = w^2 |a|^2 + 2 w (1 - w) a.b + (1 - w)^2 |b|^2; its derivative in w vanishes here.
    aa, ab, bb = dot(joint, joint), dot(joint, alone), dot(alone, alone)
    first = min(max((bb - ab) / (aa - 2 * ab + bb), 0.0), 1.0)
    return first, 1 - first


def pareto(joint, alone, gamma):
    """Lists of parameter tensors, each a flat list of numbers."""
    first, second = min_norm([x for part in joint for x in part], [x for part in alone for x in part])
    result = []
    for a, b in zip(joint, alone, strict=True):
        mixed = [2 * (first * x + second * y) for x, y in zip(a, b, strict=True)]
        total = [x + y for x, y in zip(a, b, strict=True)]
        boost = max(1.0, norm(total) / norm(mixed)) if norm(mixed) > 0 else 1.0
        result.append([gamma * x * boost for x in mixed])
    return result


def blending(start, end, floor):
    """Lists of (training loss, validation loss) for each kind of loss, before and after."""
    raw = []
    for (train_0, val_0), (train_1, val_1) in zip(start, end, strict=True):
        gained = val_0 - val_1
        overfit = (val_1 - train_1) - (val_0 - train_0)
        raw.append(abs(gained) / max(abs(overfit), floor) ** 2)
    if sum(raw) == 0:
        return [1 / len(raw) for _ in raw]
    return [weight / sum(raw) for weight in raw]


def learning_speed(gradients, parameters):
    """Contribution of one step to the speed: |gradient|^2 / |parameter|^2 over lists of flat tensors."""
    return sum(dot(g, g) for g in gradients) / sum(dot(p, p) for p in parameters)


def bypass_lead(speeds):
    """For each modality its log ratio of bypass to main speed, minus the mean of the others'; (main, bypass) given."""
    ratios = [math.log10(bypass / main) for main, bypass in speeds]
    leads = [r - mean(ratios[:m] + ratios[m + 1 :]) for m, r in enumerate(ratios)]
    return ratios, leads


def projector(matrix, row, alpha):
    """MLA's recursive projector after one mean feature row; lists of lists."""
    k = [dot(line, row) for line in matrix]
    scale = alpha + dot(row, k)
    size = range(len(k))
    changed = [[matrix[i][j] - k[i] * k[j] / scale for j in size] for i in size]
    length = norm([x for line in changed for x in line])
    return [[x / length for x in line] for line in changed]


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def by_entropy(scores):
    """MLA's test-time prediction for one sample, from the scores of each present modality."""
    entropies = [entropy(softmax(row)) for row in scores]
    weights = [math.exp(max(entropies) - h) for h in entropies]
    weights = [w / sum(weights) for w in weights]
    return weights, [sum(w * row[c] for w, row in zip(weights, scores, strict=True)) for c in range(len(scores[0]))]


def boosting(scores, others, previous, target, nu, task_weight, residual, agreement):
    """ReconBoost's loss of one modality over a batch; ``others`` is the sum of the other modalities' scores."""
    total = 0.0
    for own, rest, before, label in zip(scores, others, previous, target, strict=True):
        log_p = [math.log(p) for p in softmax(own)]
        ensemble = softmax([nu * x for x in rest])
        onehot = [float(c == label) for c in range(len(own))]
        first = -task_weight * dot(onehot, log_p)
        second = residual * dot([y * p for y, p in zip(onehot, ensemble, strict=True)], log_p)
        third = sum((a - b) ** 2 for a, b in zip(softmax(own), softmax(before), strict=True))
        total += first + second + agreement * third
    return total / len(target)


def distillation(student, teacher):
    """Mean squared difference of feature vectors, over samples and dimensions."""
    return mean(
        (a - b) ** 2 for one, other in zip(student, teacher, strict=True) for a, b in zip(one, other, strict=True)
    )
