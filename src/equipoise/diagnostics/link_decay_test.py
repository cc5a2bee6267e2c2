"""Decay of the attention between modalities with depth, and alignment error of their mean tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..geometry import cosine, membership
from .model_inputs import Layers, hidden_of, labels_of, token_mask


class LinkDecay(NamedTuple):
    """log alpha^l = intercept + l log gamma, over the layers l = 1, 2, ...

    Attributes:
        gamma: decay factor per layer; the attention decreases with depth if it is below 1.
        intercept: natural logarithm of the fit at layer 0.
        r2: coefficient of determination; NaN if alpha is constant.
    """

    gamma: float
    intercept: float
    r2: float


class DecayedError(NamedTuple):
    """Summary of the alignment errors of all layers.

    Attributes:
        log_product: sum_l (l log gamma + log error_l), since the product itself underflows; -inf if the error of a
            layer is 0.
        weighted_sum: sum_l gamma^l error_l.
    """

    log_product: float
    weighted_sum: float


def link_decay(alpha: Float[Tensor, " layer"]) -> LinkDecay:
    """Fits log alpha^l = a + l log gamma by least squares.

    Args:
        alpha: (layer,) mean attention from one modality to another, in [0, 1], in the order of the layers.

    Returns:
        LinkDecay; all values are NaN if alpha of a layer is 0 or NaN.

    Raises:
        ShapeError: alpha is not a vector of two or more layers. ConfigError: negative attention.

    A line through few layers always fits well; check r2 and the values of the layers before interpreting gamma.

    Reference: MODA (ICML 2025).

    Example:
        >>> decay = link_decay(torch.tensor([0.4, 0.2, 0.1]))
        >>> round(decay.gamma, 4), round(decay.intercept, 4), round(decay.r2, 4)
        (0.5, -0.2231, 1.0)
    """
    if alpha.ndim != 1 or len(alpha) < 2:
        raise ShapeError(
            "link_decay", expected="alpha of shape (layer,) with layer >= 2", got=f"shape {tuple(alpha.shape)}"
        )
    if bool((alpha < 0).any()):
        raise ConfigError("link_decay", expected="attention alpha >= 0", got=f"{float(alpha.min()):g}")
    logs = alpha.detach().cpu().double().log()
    if not bool(logs.isfinite().all()):
        return LinkDecay(math.nan, math.nan, math.nan)
    layer = torch.arange(1, len(logs) + 1, dtype=torch.float64)
    from_mean, total = layer - layer.mean(), logs - logs.mean()
    slope = float(from_mean @ total / (from_mean @ from_mean))
    intercept = float(logs.mean() - slope * layer.mean())
    rest = logs - intercept - slope * layer
    constant = bool(logs.max() == logs.min())
    return LinkDecay(math.exp(slope), intercept, math.nan if constant else 1.0 - float(rest @ rest / (total @ total)))


def alignment_error(
    hidden: Layers,
    modality: Int[Tensor, "... token"],
    num_modalities: int | None = None,
    mask: Bool[Tensor, "batch token"] | None = None,
) -> Float[Tensor, " layer"]:
    """Computes error^l = 1 - cos(mean token of m, mean token of n) for each layer, averaged over pairs of modalities.

    Args:
        hidden: (batch, token, dim), or one for each layer.
        modality: labels (token,) or (batch, token), -1 = special or padding.
        num_modalities: by default the highest label + 1.
        mask: (batch, token), True = valid.

    Returns:
        (layer,) in [0, 2] on the CPU, in float64; 0 if the means have the same direction. The mean tokens are computed
        over the whole batch; NaN without any pair of modalities.

    Raises:
        ShapeError: hidden states, labels or mask do not fit.

    A common direction of all tokens, as in many language models, makes the error small regardless of the modalities.

    Reference: MODA (ICML 2025).
    Differs from the paper in: the paper does not define the error.

    Example:
        >>> hidden = torch.tensor([[[2.0, 0.0], [4.0, 0.0], [0.0, 1.0]]])
        >>> alignment_error(hidden, torch.tensor([0, 0, 1]))
        tensor([1.], dtype=torch.float64)
    """
    layers = hidden_of(hidden, "alignment_error")
    valid = token_mask(mask, layers[0], "alignment_error").cpu()
    labels, count = labels_of(modality, num_modalities, *valid.shape, who="alignment_error")
    member = membership(labels.cpu(), count, len(valid), valid)
    tokens = member.sum(dim=(0, 2))
    first, second = torch.triu_indices(count, count, offset=1)
    present = (tokens[first] > 0) & (tokens[second] > 0)
    errors = []
    for layer in layers:
        masked = layer.cpu().double().masked_fill(~member.any(dim=1)[..., None], 0.0)
        centroid = torch.einsum("bmt,btd->md", member.double(), masked) / tokens.clamp(min=1)[:, None]
        errors.append((1.0 - cosine(centroid[first], centroid[second]))[present].mean())
    return torch.stack(errors)


def e_dda(gamma: float, errors: Float[Tensor, " layer"]) -> DecayedError:
    """Combines decay and alignment errors of all layers as the logarithm of their product and as a weighted sum.

    ::

        log_product = sum_l (l log gamma + log error_l)      weighted_sum = sum_l gamma^l error_l       l = 1, 2, ...

    Args:
        gamma: result of ``link_decay``.
        errors: (layer,) result of ``alignment_error``.

    Returns:
        DecayedError; NaN propagates, and an error of 0 gives a log_product of -inf.

    Raises:
        ShapeError: errors is not a vector of one or more layers. ConfigError: a negative or infinite gamma or error.

    The product decreases with every layer whose factor is below 1, so compare only models of the same depth.

    Reference: MODA (ICML 2025).
    Differs from the paper in: the logarithm of the product is returned, since the product underflows.

    Example:
        >>> e_dda(0.5, torch.tensor([0.5, 1.0]))
        DecayedError(log_product=-2.772588722239781, weighted_sum=0.5)
    """
    if errors.ndim != 1 or len(errors) == 0:
        raise ShapeError("e_dda", expected="errors of shape (layer,)", got=f"shape {tuple(errors.shape)}")
    errors = errors.detach().cpu().double()
    for name, values in (("gamma", torch.tensor(gamma, dtype=torch.float64)), ("errors", errors)):
        if bool((values < 0).any() | values.isinf().any()):
            raise ConfigError("e_dda", expected=f"finite {name} >= 0", got=str(values.tolist()))
    layer = torch.arange(1, len(errors) + 1, dtype=torch.float64)
    log_gamma = torch.tensor(gamma, dtype=torch.float64).log()
    product = float((layer * log_gamma + errors.log()).sum())
    return DecayedError(product, float((gamma**layer * errors).sum()))
