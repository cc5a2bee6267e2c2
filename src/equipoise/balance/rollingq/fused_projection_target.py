"""Rotation of the queries in a projection that computes queries, keys and values together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from .rotation_target import ForeignTarget, Observe, Rotate, merge_into_outputs, out_features


class FusedProjectionTarget(ForeignTarget):
    """One linear layer for queries, keys and values, as in timm, GPT-2 or BLOOM.

    Args:
        projection: the linear layer.
        name: its name, for errors.
        heads: number of query heads.
        head_dim: width of a head.
        key_heads: number of key heads.
        by_head: the outputs are [query, key, value] for each head in turn, instead of all queries, keys and values.
        names: the modalities.
    """

    default_rows = "all"

    def __init__(
        self, projection: nn.Module, name: str, *, heads: int, head_dim: int, key_heads: int, by_head: bool,
        names: Sequence[str] | None,
    ) -> None:  # fmt: skip
        self.names, self.heads, self.head_dim = tuple(names or ()), heads, head_dim
        self.projection = self.host_module = projection
        queries, keys = heads * head_dim, key_heads * head_dim
        width = out_features(projection)
        if width != queries + 2 * keys or heads % key_heads:
            raise ConfigError(
                "RollingQ", got=f"width {width}",
                expected=f"'{name}' of width {queries} + 2 * {keys}: {heads} query heads and {key_heads} key and value "
                f"heads of {head_dim}",
                fix="Pass num_heads=..., or the names of separate projections.",
            )  # fmt: skip
        order = torch.arange(width)
        if by_head:
            query, key, _ = order.view(heads, 3, head_dim).unbind(dim=1)
            self.query_outputs: slice | Tensor = query.flatten()
            self.key_outputs: slice | Tensor = key.flatten()
        else:
            self.query_outputs, self.key_outputs = slice(0, queries), slice(queries, queries + keys)

    def register_hooks(self, rotate: Rotate, observe: Observe) -> list[Any]:
        self.rotate, self.observe = rotate, observe
        return [self.projection.register_forward_hook(self._on_output)]

    def _on_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if output.ndim != 3:
            shape = tuple(output.shape)
            raise ShapeError("RollingQ", expected="projections of shape (batch, token, dim)", got=f"{shape}")
        query = self.rotate(self._split(output[..., self.query_outputs]))
        if self.observing():
            self.observe(query.detach(), self._split(output[..., self.key_outputs]).detach(), self.labels, self.valid)
        rotated = query.transpose(1, 2).flatten(2)
        if isinstance(self.query_outputs, slice):
            return torch.cat([rotated, output[..., self.query_outputs.stop :]], dim=-1)
        return output.index_copy(-1, self.query_outputs.to(output.device), rotated.to(output.dtype))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge(self, rotation: Tensor) -> None:
        merge_into_outputs(self.projection, self.query_outputs, rotation)
