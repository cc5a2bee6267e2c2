"""Rotation of the queries of a layer: stores, applies, multiplies and saves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...geometry import orthogonalize
from ...io.recorded_options import RecordedOptions
from ...nn.distributed import is_distributed
from ..balancer import Balancer
from .compile_disabled import CompileDisabled
from .effective_rotation import EffectiveRotation
from .rolling_step import RollingStep


class Rotation(RecordedOptions, Balancer):
    """Base class of RollingQ: rotations of the queries of one layer and their counters, as buffers.

    Args:
        groups: number of rotations: one per head, or one for all heads together.
        width: width d of a rotation.
        names: the modalities.
        first_row_only: rotate only the first query row.
        like: a weight of the layer, for device and dtype; the rotation is stored in float32 at least.

    Attributes:
        rotation: (group, d, d), for row vectors.
        rotations: number of rotations so far.
        epochs: number of finished epochs.
        last_epoch: the epoch of the last rotation.
        air: (group, modality) imbalance at the last decision; NaN for modalities without statistics.
    """

    rotation: Tensor
    rotations: Tensor
    epochs: Tensor
    last_epoch: Tensor
    air: Tensor

    def __init__(self, groups: int, width: int, names: Sequence[str], *, first_row_only: bool, like: Tensor) -> None:
        super().__init__()
        self.names, self._first_row_only = tuple(names), first_row_only
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.register_buffer("rotation", torch.eye(width, dtype=dtype, device=like.device).repeat(groups, 1, 1))
        for counter in ("rotations", "epochs", "last_epoch"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.int64, device=like.device))
        self.register_buffer("air", torch.full((groups, len(self.names)), torch.nan, dtype=dtype, device=like.device))
        self._weights_loaded = False
        # Whether the buffer has changed is data-dependent control flow, which torch.compile cannot trace.
        self._offset = CompileDisabled(EffectiveRotation().offset)

    def rotate(self, query: Float[Tensor, "batch head query dim"]) -> Float[Tensor, "batch head query dim"]:
        """Rotates queries by the rotation in the buffer, in the dtype of the queries.

        Computed as ``q + q (R - I)``, so that with R = I the result equals ``q`` bit for bit, whatever the precision of
        matrix products, without a flag that could disagree with the buffer.
        """
        offset = self._offset(self.rotation, not (self.training and torch.is_grad_enabled())).to(query.dtype)
        if self._first_row_only and query.shape[2] > 1:
            return torch.cat([_add_offset(query[:, :, :1], offset), query[:, :, 1:]], dim=2)
        return _add_offset(query, offset)

    def effective(self) -> Float[Tensor, "group d d"]:
        """Returns the rotations that are applied: the nearest rotations to the buffer, which may have been averaged.

        Raises:
            ConfigError: a buffer from which no rotation can be recovered.
        """
        offset = self._offset(self.rotation)
        return offset + torch.eye(offset.shape[-1], dtype=offset.dtype, device=offset.device)

    def rotates(self) -> bool:
        """Returns whether the rotation differs from the identity; forces a GPU sync."""
        return bool(self._offset(self.rotation).any())

    def _multiply(self, steps: Sequence[RollingStep | None]) -> None:
        """Applies one rotation: the step of each group, or None for groups to leave unchanged."""
        count, effective = self._count(), self.effective()
        for group, step in enumerate(steps):
            if step is not None:
                # Move to the CPU first: some devices have no float64.
                product = effective[group].cpu().double() @ step.rotation.cpu().double()
                self.rotation[group] = orthogonalize(product).to(self.rotation.device, self.rotation.dtype)
        self.rotations.fill_(count + 1)
        self.last_epoch.copy_(self.epochs)

    def _count(self) -> int:
        """Returns the number of rotations; at least 1 for a rotated layer, where averaging may have rounded it to 0."""
        return max(int(self.rotations), int(self.rotates()))

    def _synchronize(self) -> None:
        """Broadcasts rotation and counters of rank 0, so that all processes are bit-identical."""
        if is_distributed():
            for state in (self.rotation, self.rotations, self.last_epoch, self.air):
                torch.distributed.broadcast(state, src=0)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        if prefix + "rotation" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            self.effective()
        elif self._weights_loaded or not prefix:
            # The weights were trained without a rotation. A partial state dict of other layers does not change it.
            with torch.no_grad():
                self.rotation.copy_(torch.eye(self.rotation.shape[-1]))
                self.air.fill_(torch.nan)
                for counter in (self.rotations, self.epochs, self.last_epoch):
                    counter.zero_()
            self._reset_statistics()
        self._weights_loaded = False

    def _on_load(self, module, state_dict, prefix, *args: Any) -> None:
        """Load hook of the query projection: records whether the state dict contains its weights."""
        self._weights_loaded = any(name.startswith(prefix) for name in state_dict)

    def _reset_statistics(self) -> None:
        """Resets the statistics of the current epoch."""

    def _apply(self, fn, recurse=True):
        # Keep the precision of the rotation under model.half() or .bfloat16().
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _add_offset(query: Tensor, offset: Tensor) -> Tensor:
    """Returns q + q (R - I), for each head or for all heads together."""
    if query.shape[-1] == offset.shape[-1]:
        return query + query @ offset
    joint = query.transpose(1, 2).flatten(2)
    return (joint + joint @ offset[0]).unflatten(-1, query.shape[1::2]).transpose(1, 2)
