"""Gradient checkpointing: layers recompute their activations in the backward pass instead of storing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError


class CheckpointedLayer(nn.Module):
    """Base class of layers whose activations can be recomputed in the backward pass.

    Attributes:
        gradient_checkpointing: True recomputes them, in training mode with gradients only.
    """

    gradient_checkpointing: bool = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **options)
        return super().__call__(*args, **options)


def enable_gradient_checkpointing(model: nn.Module) -> int:
    """Makes the layers of a model recompute their activations in the backward pass, which saves memory.

    Without checkpointing, a stack of L layers stores the activations of all of them until the backward pass; with it,
    the inputs of the layers and the activations of one. The forward pass of each layer is computed twice. Outputs and
    gradients do not change: random numbers of dropout are repeated. Balancers and ``eq.watch`` count each pass once.

    It applies to the transformer layers of equipoise (encoders, fusions, Q-Former, resampler), to models of
    transformers and timm, which have a method of their own, and to no other modules. Recipes have the option
    ``train.gradient_checkpointing``.

    Args:
        model: a ``FusionModel``, an adapted model, or any module that contains such layers.

    Returns:
        Number of layers and pretrained models with checkpointing.

    Raises:
        ConfigError: the model contains none of them.

    When it misleads: layers are the smallest unit, so that a model with one layer saves nothing. The memory of
    parameters, gradients and optimizer does not change.

    Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
    Differs from it in: every layer is a segment.

    Example:
        >>> import equipoise as eq
        >>> encoders = {name: eq.encoders.SequenceEncoder(3, max_length=9, dim=8) for name in ("audio", "image")}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), num_outputs=2)
        >>> enable_gradient_checkpointing(model)
        4
    """
    count = 0
    for enable in list(_units(model)):
        # Models of timm without support, such as VGG, have a method that asserts.
        with suppress(AssertionError):
            enable()
            count += 1
    if not count:
        raise ConfigError(
            "gradient checkpointing", expected="a model with transformer layers of equipoise, transformers or timm",
            got=f"{type(model).__name__}, which has none",
            fix="Leave out train.gradient_checkpointing, or call torch.utils.checkpoint in the forward of the model.",
        )  # fmt: skip
    return count


def _units(module: nn.Module) -> Iterator[Callable[[], Any]]:
    """Yields a function for each outermost module that supports checkpointing, which enables it."""
    if isinstance(module, CheckpointedLayer):
        yield lambda: setattr(module, "gradient_checkpointing", True)
    elif getattr(module, "supports_gradient_checkpointing", False) is True:
        # Renamed in transformers 5.
        new = getattr(module, "activation_checkpointing_enable", None)
        enable: Any = new or module.gradient_checkpointing_enable
        option = "activation_checkpointing_kwargs" if new else "gradient_checkpointing_kwargs"
        yield lambda: enable(**{option: {"use_reentrant": False}})
    elif callable(getattr(module, "set_grad_checkpointing", None)):
        yield lambda: module.set_grad_checkpointing(True)  # type: ignore[operator]
    else:
        for child in module.children():
            yield from _units(child)
