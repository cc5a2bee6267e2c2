"""Reference consistency metrics, by loops and numpy in float64."""

import itertools

import numpy as np


def supermatrix(blocks, count, size):
    """P from {(i, j): (M, M)}: identity on the diagonal, transposes if only one direction is given."""
    full = np.zeros((count * size, count * size))
    for i in range(count):
        for j in range(count):
            if i == j:
                block = np.eye(size)
            else:
                block = blocks[i, j] if (i, j) in blocks else blocks[j, i].T
            for a in range(size):
                for b in range(size):
                    full[i * size + a, j * size + b] = block[a, b]
    return full


def nuclear(matrix):
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def effective_rank(matrix):
    return nuclear(matrix) ** 2 / float((matrix**2).sum())


def score(matrix, count):
    total = len(matrix)
    size = total // count
    return min(1.0, max(0.0, (total - effective_rank(matrix)) / (total - size)))


def cycle_error(matrix, count):
    size = len(matrix) // count

    def block(i, j):
        return matrix[i * size : (i + 1) * size, j * size : (j + 1) * size]

    if count == 2:
        errors = [((block(i, j) @ block(j, i) - np.eye(size)) ** 2).sum() for i, j in ((0, 1), (1, 0))]
    else:
        errors = [
            ((block(i, j) @ block(j, k) - block(i, k)) ** 2).sum()
            for i, j, k in itertools.permutations(range(count), 3)
        ]
    return float(np.mean(errors)) / (2 * size)


def consistent(count, size, random):
    """P of consistent random permutations."""
    stack = np.concatenate([np.eye(size)[random.permutation(size)] for _ in range(count)])
    return stack @ stack.T
