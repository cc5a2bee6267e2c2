"""Common parts of the tests of masked values: the values under masks, and the comparison."""

import math

import torch

FILLS = (math.nan, math.inf, -math.inf, 3e38)


def outputs_and_gradients(result, leaves):
    """Returns the outputs and the gradients of their sum of squares with respect to the leaves."""
    parts = [part for part in result if part is not None]
    total = sum(part.square().sum() for part in parts if part.requires_grad)
    actual = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*parts, *(g for g in actual if g is not None)]


def assert_equal_and_finite(model, expected):
    assert len(model) == len(expected)
    for part, other in zip(model, expected, strict=True):
        assert part.isfinite().all()
        assert torch.equal(part, other)
