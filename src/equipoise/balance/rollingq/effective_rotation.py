"""Computes the rotation to apply from the buffer that stores it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from ...geometry import nearest_rotation
from ...tokens.token_batch import has_values


class EffectiveRotation:
    """Computes the nearest rotation of a buffer, and caches the result until the buffer's values change.

    The result depends on the buffer only: a copy or an average of weights, or a state dict used for one call
    (``torch.func.functional_call``), takes effect in the next forward pass. An average of rotations is not orthogonal,
    so the nearest rotation is applied. Changes are detected by comparing values, because writes through ``.data`` do
    not change the version counter. On a GPU this comparison would force a sync, so in a training step it stays on the
    device and selects between the cached rotation and the unmodified buffer.

    A copied or unpickled object starts with an empty cache.
    """

    def __init__(self) -> None:
        self._stored: Tensor | None = None
        self._offset: Tensor | None = None

    def __reduce__(self):
        return type(self), ()

    def offset(self, buffer: Float[Tensor, "group d d"], wait: bool = True) -> Float[Tensor, "group d d"]:
        """Returns R - I for the rotation R nearest to ``buffer``; in float32 or float64.

        Args:
            buffer: the stored rotations.
            wait: False to avoid a GPU sync; a buffer that was averaged in place since the last call is then used
                without being orthogonalized.

        Raises:
            ConfigError: a buffer from which no rotation can be recovered.
        """
        if not has_values(buffer):
            return _minus_identity(nearest_rotation(buffer))
        stored, offset = self._stored, self._offset
        if stored is None or offset is None or stored.device != buffer.device or stored.shape != buffer.shape:
            return self._refresh(buffer)
        if buffer.device.type != "cpu" and not wait:
            return cached_or_raw(buffer, stored, offset)
        return offset if torch.equal(buffer, stored) else self._refresh(buffer)

    def _refresh(self, buffer: Tensor) -> Tensor:
        # The SVD of small matrices is faster on the CPU, and some devices have no float64.
        rotation = nearest_rotation(buffer.detach().cpu())
        if not bool(rotation.isfinite().all()):
            raise ConfigError(
                "RollingQ",
                expected="a rotation, or an average of rotations from which one can be recovered",
                got="a buffer that is singular, a reflection or not finite",
                fix="An average of two rotations that differ by 180 degrees cancels: load the rotation of one model.",
            )
        with torch.inference_mode(False):
            self._stored = buffer.detach().clone()
            self._offset = _minus_identity(rotation).to(buffer.device)
        return self._offset


def cached_or_raw(buffer: Tensor, stored: Tensor, offset: Tensor) -> Tensor:
    """Selects, without a sync, between the cached offset and the offset of the unmodified buffer."""
    return torch.where((buffer == stored).all(), offset, _minus_identity(buffer.to(offset.dtype)))


def _minus_identity(rotation: Tensor) -> Tensor:
    return rotation - torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
