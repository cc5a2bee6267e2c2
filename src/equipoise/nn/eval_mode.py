"""Context manager for evaluation mode without gradients; restores training modes and RNG state on exit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode_no_grad(model: nn.Module) -> Iterator[None]:
    """Evaluates a model without gradients; restores the mode of each module and the RNG state on exit and on errors.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with eval_mode_no_grad(model):
        ...     print([part.training for part in model], torch.is_grad_enabled())
        [False, False] False
        >>> [part.training for part in model]
        [True, False]
    """
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
