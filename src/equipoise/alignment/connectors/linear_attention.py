"""Linear attention, whose cost grows linearly with the number of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ...errors import ShapeError
from ...tokens.masks import at_least_float32, bool_mask, full_precision


def linear_attend(
    query: Float[Tensor, "batch head query width"],
    key: Float[Tensor, "batch head key width"],
    value: Float[Tensor, "batch head key dim"],
    *,
    mask: Bool[Tensor, "batch key"] | None = None,
) -> Float[Tensor, "batch head query dim"]:
    """Computes ``phi(q) (phi(K)^T V) / phi(q) sum_j phi(k_j)`` with ``phi(x) = elu(x) + 1``.

    The result differs from softmax attention; no other function of the library uses it by default.

    Args:
        query, key, value: (batch, head, token, width); value may have another width.
        mask: (batch, key), boolean, True = valid; the output of a sample without a valid key is 0.

    Returns:
        (batch, head, query, dim) in the dtype of the values; sums are computed in float32 or higher precision.

    Raises:
        ShapeError: sizes that do not match.

    Reference: Katharopoulos et al., Transformers are RNNs (ICML 2020), eq. 5.

    Example:
        >>> linear_attend(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0], [3.0]]]]))
        tensor([[[[2.]]]])
    """
    if query.ndim != 4 or key.shape[:2] != query.shape[:2] or key.shape[-1] != query.shape[-1]:
        raise ShapeError(
            "linear_attend key", expected="(batch, head, key, width) as the query has",
            got=f"{tuple(key.shape)} for {tuple(query.shape)}",
        )  # fmt: skip
    if value.shape[:3] != key.shape[:3]:
        raise ShapeError("linear_attend value", expected=f"{(*key.shape[:3], 'dim')}", got=f"{tuple(value.shape)}")
    hidden = None
    if mask is not None:
        shape = (key.shape[0], key.shape[2])
        if mask.shape != shape:
            raise ShapeError("linear_attend mask", expected=f"(batch, key) = {shape}", got=f"{tuple(mask.shape)}")
        hidden = ~bool_mask(mask, "linear_attend mask", "a boolean mask (batch, key)")[:, None, :, None]
        # Mask before the exponential: NaN would otherwise reach the gradient.
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    dtype = value.dtype
    query, key, value = (at_least_float32(x) for x in (query, key, value))
    query, key = F.elu(query) + 1, F.elu(key) + 1
    key = key if hidden is None else key.masked_fill(hidden, 0.0)
    with full_precision(value):
        total = query @ key.sum(dim=2)[..., None]
        return (query @ (key.mT @ value) / torch.where(total > 0, total, 1.0)).to(dtype)
