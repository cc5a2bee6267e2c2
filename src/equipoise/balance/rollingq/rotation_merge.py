"""Merges rotations into the query weights, so that inference has no extra cost."""

from __future__ import annotations

from torch import nn

from .rollingq_balancer import RollingQ


def merge_rotations(model: nn.Module) -> nn.Module:
    """Merges every RollingQ in a model into the query weights, in place, for inference: W <- R^T W, b <- b R.

    The outputs stay the same up to rounding, and parameters and cost are exactly those of the model without RollingQ.
    Do not merge during training: Adam's second moments would not match the rotated weights.

    Args:
        model: any module that contains attention layers with a RollingQ.

    Returns:
        The same model.

    Raises:
        ConfigError: merging would change outputs, because only some of a layer's query rows are rotated.

    Example:
        >>> from equipoise.fusion import JointAttention
        >>> fusion = JointAttention(8).build(("audio", "image"))
        >>> _ = RollingQ(fusion.attention)
        >>> "attention.core.rolling.rotation" in merge_rotations(fusion).state_dict()
        False
    """
    for module in model.modules():
        # Update the pooling layers from their buffer, which may have changed since the last forward pass.
        if callable(read_active := getattr(module, "read_active", None)):
            read_active()
    attached = [module for module in model.modules() if isinstance(module, RollingQ)]
    for rolling in attached:
        rolling.check_foldable()
    for rolling in attached:
        rolling.fold()
    return model
