"""Common parts of the tests of masked values: the values under masks, and the comparison."""

import math

import torch

FILLS = (math.nan, math.inf, -math.inf, 3e38)


def outputs_and_gradients(result, leaves):
    """Returns the outputs and the gradients of their sum of squares with respect to the leaves."""
    parts = [part for part in result if part is not None]
    total = sum(part.square().sum() for part in parts if part.requires_grad)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*parts, *(g for g in found if g is not None)]


def assert_equal_and_finite(made, wanted):
    assert len(made) == len(wanted)
    for part, other in zip(made, wanted, strict=True):
        assert part.isfinite().all()
        assert torch.equal(part, other)
