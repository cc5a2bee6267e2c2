"""What a backward pass brings of one term of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import ConfigError


def term_gradients(
    term: Tensor, parameters: Sequence[nn.Parameter], gradient: Tensor, who: str
) -> Sequence[Tensor | None]:
    """The gradient of one term with respect to parameters, None where it does not depend on them.

    Args:
        term: a scalar; its graph stays.
        parameters: of the model.
        gradient: of the final loss with respect to the term, as the loop scales it.
        who: begins the error's message.

    Raises:
        ConfigError: a part of the graph is under reentrant checkpointing, which computes gradients in a whole backward
            pass alone.
    """
    if any("CheckpointFunction" in node for node in _nodes(term)):
        raise ConfigError(
            who, expected="a loss whose terms can be differentiated apart",
            got="reentrant activation checkpointing, which cannot",
            fix="Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False); in transformers "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.',
        )  # fmt: skip
    return torch.autograd.grad(term, parameters, gradient.to(term), retain_graph=True, allow_unused=True)


def _nodes(term: Tensor) -> set[str]:
    """Names of the operations in the graph of a term."""
    seen, left, names = set(), [term.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            left.extend(child for child, _ in node.next_functions)
    return names
