"""Rotation of the queries of ``nn.MultiheadAttention``, whose projection is a parameter and not a module."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...recording.multihead_projection import HeadProjection, project_heads
from .query_key_statistics import key_mask
from .rotation_target import ForeignTarget, Observe, Rotate, rotated_rows

WEIGHTS = ("in_proj_weight", "q_proj_weight", "in_proj_bias")


class MultiheadRotationTarget(ForeignTarget):
    """``nn.MultiheadAttention``, with one input projection or three, batch first or not.

    During each forward pass the attributes with the query weights hold rotated weights: q = x (R^T W)^T + b R is the
    rotated query of every row, so the fast path, masks and ``watch`` use it too. The parameters are not changed.
    """

    default_rows = "all"

    def __init__(self, layer: nn.MultiheadAttention, names: Sequence[str] | None) -> None:
        self.names = tuple(names or ())
        self.heads, self.head_dim = layer.num_heads, layer.head_dim
        self.layer = self.projection = self.host_module = layer
        if self._key not in layer._parameters:
            raise ConfigError(
                "RollingQ", expected=f"nn.MultiheadAttention with '{self._key}' as a parameter",
                got="a parametrized weight", fix="Remove the parametrization, or attach RollingQ before it.",
            )  # fmt: skip
        self._signature = inspect.signature(nn.MultiheadAttention.forward)
        self._before: list[dict[str, Any]] = []

    @property
    def _key(self) -> str:
        return "in_proj_weight" if self.layer._qkv_same_embed_dim else "q_proj_weight"

    @property
    def weight(self) -> Tensor:
        return getattr(self.layer, self._key)

    def check_rows(self, query_rows: str) -> None:
        if query_rows != "all":
            raise ConfigError(
                "RollingQ", expected='query_rows="all" for nn.MultiheadAttention, which projects all rows at once',
                got=f'query_rows="{query_rows}"', fix="Leave query_rows out.",
            )  # fmt: skip

    def register_hooks(self, rotate: Rotate, observe: Observe) -> list[Any]:
        self.rotate, self.observe = rotate, observe
        return [
            self.layer.register_forward_pre_hook(self._on_forward, with_kwargs=True),
            self.layer.register_forward_hook(self._on_end, always_call=True),
        ]

    def _on_forward(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rotated = self._rotated()
        self._before.append({name: vars(layer)[name] for name in rotated if name in vars(layer)})
        # A plain attribute hides the parameter of the same name without replacing it.
        vars(layer).update(rotated)
        if self.observing():
            self._observe(self._signature.bind(layer, *args, **kwargs).arguments)

    def _on_end(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self._before:
            before = self._before.pop()
            for name in WEIGHTS:
                vars(layer).pop(name, None)
            vars(layer).update(before)

    def _rotated(self) -> dict[str, Tensor]:
        """The attributes with rotated query weights."""
        weight, bias = self.weight, self.layer.in_proj_bias
        width = self.heads * self.head_dim
        with torch.autocast(weight.device.type, enabled=False):
            rows = self.rotate(_by_head(weight[:width], self.heads))
            result = {self._key: torch.cat([_flat(rows), weight[width:]])}
            if bias is not None:
                row = _flat(self.rotate(_by_head(bias[:width, None], self.heads)))
                result["in_proj_bias"] = torch.cat([row[:, 0], bias[width:]])
        return result

    def _observe(self, arguments: dict[str, Any]) -> None:
        query, key, value, padding = (
            arguments["query"],
            arguments["key"],
            arguments["value"],
            arguments.get("key_padding_mask"),
        )
        if query.is_nested:
            lengths = torch.tensor([len(part) for part in query.unbind()], device=query.device)
            query = key = value = query.to_padded_tensor(0.0)
            padding = torch.arange(query.shape[1], device=query.device) >= lengths[:, None]
        call = project_heads(
            HeadProjection.of(self.layer), query, key, value, batch_first=self.layer.batch_first, padding=padding
        )
        keys = call.key.shape[2] - call.added
        valid = self.valid
        if call.mask is not None:
            visible = key_mask(call.mask[..., :keys], len(call.key), keys)
            valid = visible if valid is None or visible is None else valid & visible
        self.observe(call.query, call.key[:, :, :keys], self.labels, valid)

    def merge(self, rotation: Tensor) -> None:
        width = self.heads * self.head_dim
        with torch.no_grad():
            self.weight[:width] = rotated_rows(self.weight[:width], rotation)
            if (bias := self.layer.in_proj_bias) is not None:
                bias[:width] = rotated_rows(bias[:width, None], rotation)[:, 0]


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """(head * dim, in) -> (1, head, in, dim): each column of a head's weight is rotated like a query."""
    return rows.unflatten(0, (heads, -1)).mT[None]


def _flat(parts: Tensor) -> Tensor:
    return parts[0].mT.flatten(0, 1)
