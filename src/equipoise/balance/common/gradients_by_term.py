"""Gradient of one term of the loss during a backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import ConfigError


def term_gradients(
    term: Tensor, parameters: Sequence[nn.Parameter], gradient: Tensor, who: str
) -> Sequence[Tensor | None]:
    """Returns the gradient of one term with respect to parameters, None for those that it does not depend on.

    Args:
        term: a scalar; its graph is retained.
        parameters: parameters of the model.
        gradient: gradient of the final loss with respect to the term, as the loop scales it.
        who: name of the balancer, for error messages.

    Raises:
        ConfigError: part of the graph uses reentrant checkpointing, which does not support torch.autograd.grad.
    """
    if any("CheckpointFunction" in node for node in _nodes(term)):
        raise ConfigError(
            who, expected="a graph that supports torch.autograd.grad",
            got="reentrant activation checkpointing, which does not",
            fix="Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False); in transformers "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.',
        )  # fmt: skip
    return torch.autograd.grad(term, parameters, gradient.to(term), retain_graph=True, allow_unused=True)


def _nodes(term: Tensor) -> set[str]:
    """Returns the names of the operations in the graph of a term."""
    visited, stack, names = set(), [term.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in visited:
            visited.add(node)
            names.add(node.name())
            stack.extend(child for child, _ in node.next_functions)
    return names
