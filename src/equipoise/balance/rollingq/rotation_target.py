"""Layers that RollingQ can rotate: an ``Attention`` layer, or the query projection of any module."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

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
    projection: nn.Module
    """The module with the query weights; they are read from a state dict together with the rotation."""
    host_module: nn.Module
    default_rows: Literal["first", "all"] = "first"
    observing: Callable[[], bool]
    """Whether statistics are collected in this forward pass; set by RollingQ."""

    @property
    def weight(self) -> Tensor:
        """The query weight, whose device and type the rotation has."""
        return self.projection.weight  # type: ignore[return-value]

    @abstractmethod
    def register_hooks(self, rotate: Rotate, observe: Observe) -> list[Any]:
        """Registers the hooks; returns their handles."""

    @abstractmethod
    def only_first_row(self) -> bool:
        """Returns whether only the first query row is used."""

    def check_rows(self, query_rows: str) -> None:  # noqa: B027
        """Raises ConfigError if the target cannot rotate these query rows."""

    def check_mergeable(self) -> None:  # noqa: B027
        """Raises ConfigError if the rotation cannot be merged into the weights."""

    def merge(self, rotation: Tensor) -> None:
        """W <- R^T W, b <- b R, for (head, dim, dim) rotations, or one over all heads together."""
        merge_into_outputs(self.projection, slice(None), rotation)


class ForeignTarget(RotationTarget):
    """Attention of another library, whose key labels the user sets with ``RollingQ.layout``."""

    labels: Tensor | None = None
    valid: Tensor | None = None

    def only_first_row(self) -> bool:
        return False


def merge_into_outputs(linear: nn.Module, outputs: slice | Tensor, rotation: Tensor) -> None:
    """Rotates the selected outputs of a linear layer: W <- R^T W, b <- b R on those rows, for each block of R.

    An adapter of LoRA adds to the outputs of its base layer, so both are rotated.
    """
    for part, transposed in _summands(linear):
        with torch.no_grad():
            weight = part.weight.T if transposed else part.weight
            weight[outputs] = rotated_rows(weight[outputs], rotation)
            if part.bias is not None:
                part.bias[outputs] = rotated_rows(part.bias[outputs][:, None], rotation)[:, 0]


def rotated_rows(rows: Tensor, rotation: Tensor) -> Tensor:
    """Returns R^T W for the rows of a weight, in blocks; computed in float64."""
    # Move to CPU first: some devices (MPS) have no float64.
    blocks = rotation.detach().cpu().double()
    result = blocks.mT @ rows.detach().cpu().double().unflatten(0, (len(blocks), -1))
    return result.flatten(0, 1).to(rows.device, rows.dtype)


def _summands(linear: nn.Module) -> list[tuple[Any, bool]]:
    """The linear layers whose outputs are added, and whether their weight is (in, out), as in Hugging Face's Conv1D."""
    base = getattr(linear, "base_layer", None)
    if isinstance(base, nn.Module):
        return [*_summands(base), *((part, False) for part in getattr(linear, "lora_B", nn.ModuleDict()).values())]
    return [(linear, type(linear).__name__ == "Conv1D")]


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


class ProjectionRotationTarget(ForeignTarget):
    """A query projection in a module of another library; the user sets its key labels with ``RollingQ.layout``."""

    def __init__(
        self, module: nn.Module, query: str, key: str, num_heads: int | None, names: Sequence[str] | None
    ) -> None:
        self.projection = self.host_module = _linear(module, query)
        self.key, width = _linear(module, key), out_features(self.projection)
        if not num_heads or width % num_heads:
            raise ConfigError(
                "RollingQ",
                got=f"num_heads = {num_heads}",
                expected=f"num_heads that divides the width {width} of '{query}'",
            )
        self.names, self.heads = tuple(names or ()), num_heads
        self.head_dim = width // num_heads
        key_width = out_features(self.key)
        if key_width % self.head_dim or num_heads % (key_width // self.head_dim):
            raise ConfigError(
                "RollingQ",
                got=f"width {key_width}",
                expected=f"'{key}' of a width that groups {num_heads} query heads of {self.head_dim}",
            )
        if "position_embeddings" in inspect.signature(module.forward).parameters or hasattr(module, "rotary_emb"):
            warnings.warn(
                f"RollingQ: {type(module).__name__} seems to use rotary position embeddings. The rotation after "
                f"'{query}' is applied before them, so angles to keys are measured without positions.",
                stacklevel=4,
            )

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


def _linear(module: nn.Module, name: str) -> nn.Module:
    linear = dict(module.named_modules()).get(name)
    if linear is not None and is_linear(linear):
        return linear
    linear_names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    raise ConfigError(
        "RollingQ",
        expected=f"a torch.nn.Linear named '{name}' in {type(module).__name__}",
        got=type(linear).__name__ if linear is not None else "no such module",
        fix=f"Linear layers in this module: {', '.join(linear_names) or 'none'}.",
    )


def is_linear(module: nn.Module | None) -> bool:
    """Returns whether it is a linear layer: of torch, Conv1D of Hugging Face, or one wrapped by LoRA."""
    base = getattr(module, "base_layer", None)
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or (base is not None and is_linear(base))


def out_features(linear: nn.Module) -> int:
    """Returns the number of outputs of a linear layer."""
    part, transposed = _summands(linear)[0]
    return part.weight.shape[1 if transposed else 0]
