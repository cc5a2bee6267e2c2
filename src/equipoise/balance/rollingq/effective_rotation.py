"""The rotation that a layer applies, computed from the buffer that stores it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from ...geometry import nearest_rotation
from ...tokens.token_batch import has_values


class EffectiveRotation:
    """Computes the rotation that a buffer stands for, and remembers the result until the buffer's values change.

    The buffer alone decides: a copy of the weights, an average of them, or a state dict put in place for one call
    (``torch.func.functional_call``) is applied in the next forward pass. An average of rotations is not orthogonal, so
    its nearest rotation is applied. Whether the values have changed is read from the values themselves, since a write
    through ``.data`` leaves no other trace. On a GPU that comparison waits for the device, so a training step does
    without it: the comparison stays on the device, and chooses between the remembered rotation and the buffer as it is.

    Copied or pickled, it starts empty.
    """

    def __init__(self) -> None:
        self._stored: Tensor | None = None
        self._offset: Tensor | None = None

    def __reduce__(self):
        return type(self), ()

    def offset(self, buffer: Float[Tensor, "group d d"], wait: bool = True) -> Float[Tensor, "group d d"]:
        """Returns R - I for the rotation R nearest to ``buffer``; in float32 or float64.

        Args:
            buffer: the rotations as they are stored.
            wait: False to avoid a GPU sync; a buffer that was averaged in place since the last call is then applied as
                it is, without being made orthogonal.

        Raises:
            ConfigError: a buffer from which no rotation can be recovered.
        """
        if not has_values(buffer):
            return _minus_identity(nearest_rotation(buffer))
        stored, offset = self._stored, self._offset
        if stored is None or offset is None or stored.device != buffer.device or stored.shape != buffer.shape:
            return self._refresh(buffer)
        if buffer.device.type != "cpu" and not wait:
            return remembered_or_raw(buffer, stored, offset)
        return offset if torch.equal(buffer, stored) else self._refresh(buffer)

    def _refresh(self, buffer: Tensor) -> Tensor:
        # The SVD of small matrices is faster on the CPU, and some devices have no float64.
        rotation = nearest_rotation(buffer.detach().cpu())
        if not bool(rotation.isfinite().all()):
            raise ConfigError(
                "RollingQ",
                expected="a rotation, or an average of rotations from which one can be recovered",
                got="a buffer that is singular, a reflection or not finite",
                fix="Averages of two rotations half a turn apart cancel: load the rotation of one of the models.",
            )
        with torch.inference_mode(False):
            self._stored = buffer.detach().clone()
            self._offset = _minus_identity(rotation).to(buffer.device)
        return self._offset


def remembered_or_raw(buffer: Tensor, stored: Tensor, offset: Tensor) -> Tensor:
    """Chooses, on the device, between the remembered offset and that of the buffer as it is."""
    return torch.where((buffer == stored).all(), offset, _minus_identity(buffer.to(offset.dtype)))


def _minus_identity(rotation: Tensor) -> Tensor:
    return rotation - torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
