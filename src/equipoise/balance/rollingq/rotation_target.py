"""Layers that RollingQ can rotate: an ``Attention`` layer, or a named query projection of any module."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ...nn.transformer import Attention

Rotate = Callable[[Tensor], Tensor]
Observe = Callable[..., None]


class RotationTarget(ABC):
    """A query projection with its heads and modalities, and the module that stores the state of the rotation."""

    names: tuple[str, ...]
    heads: int
    head_dim: int
    projection: nn.Linear
    host_module: nn.Module

    @abstractmethod
    def register_hooks(self, rotate: Rotate, observe: Observe) -> list[Any]:
        """Registers the hooks; returns their handles."""

    @abstractmethod
    def only_first_row(self) -> bool:
        """Returns whether only the first query row is used."""

    def merge(self, rotation: Tensor) -> None:
        """W <- R^T W, b <- b R, for (head, dim, dim) rotations, or one over all heads together."""
        # Move to CPU first: some devices (MPS) have no float64.
        linear, blocks = self.projection, rotation.detach().cpu().double()
        with torch.no_grad():
            weight = linear.weight.cpu().double().unflatten(0, (len(blocks), -1))
            linear.weight.copy_((blocks.mT @ weight).flatten(0, 1).to(linear.weight.dtype))
            if linear.bias is not None:
                bias = linear.bias.cpu().double().unflatten(0, (len(blocks), 1, -1))
                linear.bias.copy_((bias @ blocks).flatten().to(linear.bias.dtype))


class AttentionRotationTarget(RotationTarget):
    """An ``Attention`` layer of this library."""

    def __init__(self, layer: Attention, names: Sequence[str] | None) -> None:
        self.layer = layer
        self.names = tuple(names or layer.names)
        if layer.names and self.names != tuple(layer.names):
            raise ConfigError(
                "RollingQ",
                expected=f"the names of the layer, {tuple(layer.names)}, in the same order",
                got=f"names = {self.names}",
                fix="Leave names out: the layer has its names from the fusion.",
            )
        self.heads, self.head_dim = layer.heads, layer.head_dim
        self.projection, self.host_module = layer.query, layer.core

    def only_first_row(self) -> bool:
        return self.layer.readout

    def register_hooks(self, rotate: Rotate, observe: Observe) -> list[Any]:
        self.rotate, self.observe = rotate, observe
        return [self.host_module.register_forward_pre_hook(self._on_attention, with_kwargs=True)]

    # Hooks are bound methods, not closures, so that a deep copy of the model has hooks of the copied object.
    def _on_attention(self, core: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        query, key, value = args
        query = self.rotate(query)
        self.observe(query, key, kwargs.get("modality"), kwargs.get("mask"))
        return (query, key, value), kwargs


class ProjectionRotationTarget(RotationTarget):
    """A query projection in a module of another library; the user sets its key labels with ``RollingQ.layout``."""

    def __init__(
        self, module: nn.Module, query: str, key: str, num_heads: int | None, names: Sequence[str] | None
    ) -> None:
        self.projection = self.host_module = _linear(module, query)
        self.key = _linear(module, key)
        if not num_heads or self.projection.out_features % num_heads:
            raise ConfigError(
                "RollingQ",
                got=f"num_heads = {num_heads}",
                expected=f"num_heads that divides the width {self.projection.out_features} of '{query}'",
            )
        self.names, self.heads = tuple(names or ()), num_heads
        self.head_dim = self.projection.out_features // num_heads
        if self.key.out_features % self.head_dim or num_heads % (self.key.out_features // self.head_dim):
            raise ConfigError(
                "RollingQ",
                got=f"width {self.key.out_features}",
                expected=f"'{key}' of a width that groups {num_heads} query heads of {self.head_dim}",
            )
        self.labels: Tensor | None = None
        self.valid: Tensor | None = None
        if "position_embeddings" in inspect.signature(module.forward).parameters or hasattr(module, "rotary_emb"):
            warnings.warn(
                f"RollingQ: {type(module).__name__} seems to use rotary position embeddings. The rotation after '{query}' is "
                "applied before them, so angles to keys are measured without positions.",
                stacklevel=4,
            )

    def only_first_row(self) -> bool:
        return False

    def register_hooks(self, rotate: Rotate, observe: Observe) -> list[Any]:
        self.rotate, self.observe = rotate, observe
        self._states: dict[str, Tensor] = {}
        return [
            self.projection.register_forward_hook(self._on_query),
            self.key.register_forward_hook(self._on_key),
        ]

    def _on_query(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        rotated = self.rotate(self._split(output))
        self._collect("query", rotated)
        return rotated.transpose(1, 2).flatten(2)

    def _on_key(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._collect("key", self._split(output))

    def _collect(self, part: str, states: Tensor) -> None:
        self._states[part] = states.detach()
        if len(self._states) == 2:
            self.observe(self._states.pop("query"), self._states.pop("key"), self.labels, self.valid)

    def _split(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise ShapeError("RollingQ", expected="projections of shape (batch, token, dim)", got=f"{tuple(x.shape)}")
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = dict(module.named_modules()).get(name)
    if isinstance(linear, nn.Linear):
        return linear
    known = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    raise ConfigError(
        "RollingQ",
        expected=f"a torch.nn.Linear named '{name}' in {type(module).__name__}",
        got=type(linear).__name__ if linear is not None else "no such module",
        fix=f"Linear layers in this module: {', '.join(known) or 'none'}.",
    )


def find_rotation_target(
    layer: nn.Module, query: str | None, key: str | None, num_heads: int | None, names: Sequence[str] | None
) -> RotationTarget:
    """Returns the rotation target for the arguments of RollingQ; raises ConfigError if arguments are missing."""
    if isinstance(layer, Attention):
        target: RotationTarget = AttentionRotationTarget(layer, names)
    elif query and key:
        target = ProjectionRotationTarget(layer, query, key, num_heads, names)
    else:
        raise ConfigError(
            "RollingQ",
            expected="an equipoise Attention layer, or a module with the names of its projections",
            got=type(layer).__name__,
            fix='Pass query="q_proj", key="k_proj", num_heads=..., names=(...).',
        )
    if len(target.names) < 2:
        raise ConfigError(
            "RollingQ",
            expected="a layer whose queries attend to two or more modalities",
            got=f"names = {target.names}",
            fix="Build the model first (FusionModel sets the names), or pass names=(...).",
        )
    if isinstance(getattr(target.host_module, "rolling", None), nn.Module):
        raise ConfigError(
            "RollingQ",
            expected="a layer without a RollingQ",
            got="a layer that already has one",
            fix="Call fold or detach on it first.",
        )
    return target
