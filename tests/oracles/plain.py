"""Arithmetic on plain numbers that the oracles of the balancers share."""

import math


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def softmax(scores):
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]
