"""The rotation itself: how it is kept, applied, multiplied on and saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import orthogonalise
from .base import Balancer
from .rolling_query import RollingStep


class Rotation(Balancer):
    """Base of RollingQ: rotations of the queries of one layer, with their counters, as buffers.

    Args:
        groups: how many rotations there are: one for each head, or one for all heads together.
        width: width d of the space each one turns.
        names: the modalities.
        first_row_only: rotate the first query row alone.
        like: a weight of the layer, for device and type; the rotation is kept in float32 at least.

    Attributes:
        rotation: (group, d, d), for row vectors.
        rotations: how often the layer was rotated.
        epochs: epochs that have ended.
        last_epoch: the epoch of the last rotation.
        air: (group, modality) imbalance at the last look; NaN where a modality was not seen.
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
        self._turned = False

    def rotate(self, query: Float[Tensor, "batch head query dim"]) -> Float[Tensor, "batch head query dim"]:
        """Turns queries as the rotation says, in their own type."""
        if not self._turned:
            return query
        if self._first_row_only and query.shape[2] > 1:
            return torch.cat([self._turn(query[:, :, :1]), query[:, :, 1:]], dim=2)
        return self._turn(query)

    def _turn(self, query: Tensor) -> Tensor:
        rotation = self.rotation.to(query.dtype)
        if query.shape[-1] == rotation.shape[-1]:
            return query @ rotation
        merged = query.transpose(1, 2).flatten(2) @ rotation[0]
        return merged.unflatten(-1, query.shape[1::2]).transpose(1, 2)

    def _multiply(self, steps: Sequence[RollingStep | None]) -> None:
        """One rotation of the layer: each group's step, or None for a group that stays."""
        for group, step in enumerate(steps):
            if step is not None:
                # Off the device first: not every one has float64.
                product = self.rotation[group].cpu().double() @ step.rotation.cpu().double()
                self.rotation[group] = orthogonalise(product).to(self.rotation.device, self.rotation.dtype)
        self.rotations += 1
        self.last_epoch.copy_(self.epochs)
        self._turned = True

    def _synchronise(self) -> None:
        """Rank 0 decides; the others take its rotation bit by bit."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for state in (self.rotation, self.rotations, self.last_epoch, self.air):
                torch.distributed.broadcast(state, src=0)
        self._notice()

    def _notice(self) -> None:
        # Kept beside the buffer, so that no forward pass has to fetch it from the device.
        self._turned = bool(self.rotations > 0)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        if prefix + "rotation" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        else:
            # A checkpoint from before the rotation: start from the identity.
            with torch.no_grad():
                self.rotation.copy_(torch.eye(self.rotation.shape[-1]))
                self.air.fill_(torch.nan)
                for counter in (self.rotations, self.epochs, self.last_epoch):
                    counter.zero_()
            self._forget()
        self._notice()

    def _forget(self) -> None:
        """Drops what was observed since the last epoch."""

    def _apply(self, fn, recurse=True):
        # model.half() or .bfloat16() would round the rotation; it never becomes less exact than it is.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(moved.device)
        return self
