"""Parameters and FLOPs of one forward pass, counted in full or with the rules of thop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..nn.eval_mode import eval_mode_no_grad
from .flop_count import FlopCount

Convention = Literal["full", "thop"]
TABLE_BATCH = 64
"""Batch size of the GFLOPs in published tables."""
NORMS = (nn.LayerNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass.

    Attributes:
        convention: counting rule.
        parameters: number of parameters.
        flops: floating-point operations of one sample; a multiplication and an addition count as two.
        batch_size: number of samples for ``gflops``.
    """

    convention: Convention
    parameters: int
    flops: float
    batch_size: int

    @property
    def macs(self) -> float:
        """Multiply-accumulate operations of one sample."""
        return self.flops / 2

    @property
    def gflops(self) -> float:
        """Floating-point operations of ``batch_size`` samples in units of 10^9."""
        return self.flops * self.batch_size / 1e9


def cost(model: nn.Module, batch: Any, *, convention: Convention = "full", batch_size: int | None = None) -> Cost:
    """Counts parameters and FLOPs of the forward pass ``model(batch)`` in evaluation mode.

    ``"full"`` is recommended for comparisons: all parameters, and all matrix products and convolutions, including those
    of attention with any kernel. Norms, activations and softmax are not counted.

    ``"thop"`` reproduces published tables. Only modules with a rule are counted, with their parameters and, per call::

        Linear  in * out per token      Conv  kernel * in / groups * out      norms  4 per element (2 without weights)

    Biases, class tokens, position tables, the products Q K^T and A V, softmax and ``nn.MultiheadAttention`` are not
    counted. A module with a floating-point buffer ``rotation`` (RollingQ) is counted as in the paper: the buffer as
    parameters, and one product with it per sample.

    Args:
        model: any module that takes one batch.
        batch: argument of the model; the first dimension of its first tensor is the number of samples.
        convention: "full" or "thop".
        batch_size: for ``gflops``; by default 1 for "full" and 64, as in the tables, for "thop".

    Returns:
        Cost. FLOPs are averaged over the batch, including padding. They are a weak predictor of run time: a fused
        kernel may be several times faster than separate operations.

    Raises:
        ConfigError: an unknown convention.
        ShapeError: a batch without tensors or without samples.

    Reference: RollingQ (ICML 2025), Table 4.
    Differs from the paper in: attention and all parameters are counted by default.

    Example:
        >>> import torch
        >>> result = cost(nn.Linear(3, 5), torch.zeros(2, 7, 3))
        >>> result.parameters, result.macs
        (20, 105.0)
    """
    if convention not in ("full", "thop"):
        raise ConfigError("cost", expected="convention 'full' or 'thop'", got=repr(convention))
    samples = _samples(batch)
    with eval_mode_no_grad(model):
        parameters, flops = (_full if convention == "full" else _thop)(model, batch, samples)
    batch_size = batch_size or (1 if convention == "full" else TABLE_BATCH)
    return Cost(convention, parameters, flops / samples, batch_size)


def _full(model: nn.Module, batch: Any, samples: int) -> tuple[int, int]:
    with FlopCount() as counter:
        model(batch)
    return sum(p.numel() for p in model.parameters()), counter.flops


def _thop(model: nn.Module, batch: Any, samples: int) -> tuple[int, int]:
    parameters, macs, handles = 0, 0, []

    def count(rule: Callable[[Any, Tensor, Tensor], int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            nonlocal macs
            macs += rule(module, args[0], output)

        return hook

    skipped = {part for m in model.modules() if isinstance(m, nn.MultiheadAttention) for part in m.modules()}
    try:
        for module in model.modules():
            rule = None if module in skipped else _rule(module)
            if rule is not None:
                parameters += sum(p.numel() for p in module.parameters(recurse=False))
                handles.append(module.register_forward_hook(count(rule)))
            rotation = getattr(module, "rotation", None)
            if isinstance(rotation, Tensor) and rotation.is_floating_point() and "rotation" in module._buffers:
                parameters += rotation.numel()
                macs += samples * rotation.numel()
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return parameters, 2 * macs


def _rule(module: nn.Module) -> Callable[[Any, Tensor, Tensor], int] | None:
    """Function (module, input, output) -> multiply-accumulates of a call; None for modules that are not counted."""
    if isinstance(module, nn.Linear):
        return lambda m, x, y: y.numel() * m.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return lambda m, x, y: y.numel() * (m.in_channels // m.groups) * math.prod(m.kernel_size)
    if isinstance(module, NORMS):
        has_weights = getattr(module, "affine", False) or getattr(module, "elementwise_affine", False)
        return lambda m, x, y: x.numel() * (4 if has_weights else 2)
    return None


def _samples(batch: Any) -> int:
    tensor = next(_tensors(batch), None)
    if tensor is None or tensor.ndim == 0 or len(tensor) == 0:
        got = type(batch).__name__ if tensor is None else f"a first tensor of shape {tuple(tensor.shape)}"
        raise ShapeError("cost", expected="a batch with tensors of one or more samples", got=got)
    return len(tensor)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for part in batch:
            yield from _tensors(part)
