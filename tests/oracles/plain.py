"""Arithmetic on plain numbers for the reference balancers."""

import math


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def softmax(scores):
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]
