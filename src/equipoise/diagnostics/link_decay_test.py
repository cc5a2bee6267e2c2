"""Do links between modalities fade with depth, and what do they carry? (spec 5.6)"""

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
        gamma: factor from layer to layer; below 1 the link fades.
        intercept: natural logarithm of the line at layer 0.
        r2: part of the variance of log alpha that the line explains; NaN where alpha never changes.
    """

    gamma: float
    intercept: float
    r2: float


class DecayedError(NamedTuple):
    """The alignment errors of all layers in one number.

    Attributes:
        log_product: sum_l (l log gamma + log error_l), since the product itself is too small for a float; -inf where a
            layer has no error at all.
        weighted_sum: sum_l gamma^l error_l.
    """

    log_product: float
    weighted_sum: float


def link_decay(alpha: Float[Tensor, " layer"]) -> LinkDecay:
    """How fast a link between modalities fades with depth: least squares of log alpha^l = a + l log gamma.

    Args:
        alpha: (layer,) mean attention from one modality to another, in [0, 1], layers in their order.

    Returns:
        LinkDecay. All NaN where a layer has alpha = 0 or NaN: a link that is not there has no logarithm.

    Raises:
        ShapeError: fewer than two layers, or not one number for each. ConfigError: negative attention.

    A line through few layers always fits well; look at r2 and at the layers themselves before you believe in gamma.

    Reference: MODA (ICML 2025); spec 5.6.

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
    """How far apart the modalities lie in each layer: error^l = 1 - cos(mean token of m, mean token of n).

    Args:
        hidden: (batch, token, dim), or one for each layer.
        modality: labels (token,) or (batch, token), -1 = special or padding.
        num_modalities: by default the highest label + 1.
        mask: (batch, token), True = takes part.

    Returns:
        (layer,) in [0, 2] on the CPU, in float64: 0 where the means point the same way. The mean is over all tokens of
        the batch alike, and over the pairs of modalities that are there; NaN without any pair.

    Raises:
        ShapeError: hidden states, labels or mask that do not fit.

    One common direction of all tokens, which language models have, makes it small whatever the modalities do.

    Reference: MODA (ICML 2025); spec 5.6.
    Differs from the paper in: the paper leaves the error undefined.

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
    there = (tokens[first] > 0) & (tokens[second] > 0)
    errors = []
    for layer in layers:
        kept = layer.cpu().double().masked_fill(~member.any(dim=1)[..., None], 0.0)
        centroid = torch.einsum("bmt,btd->md", member.double(), kept) / tokens.clamp(min=1)[:, None]
        errors.append((1.0 - cosine(centroid[first], centroid[second]))[there].mean())
    return torch.stack(errors)


def e_dda(gamma: float, errors: Float[Tensor, " layer"]) -> DecayedError:
    """Decay and alignment errors of all layers together, as the logarithm of their product and as a weighted sum.

    ::

        log_product = sum_l (l log gamma + log error_l)      weighted_sum = sum_l gamma^l error_l       l = 1, 2, ...

    Args:
        gamma: of ``link_decay``.
        errors: (layer,) of ``alignment_error``.

    Returns:
        DecayedError; NaN in gives NaN, an error of 0 gives -inf and adds nothing to the sum.

    Raises:
        ShapeError: no layer, or not one number for each. ConfigError: a negative or infinite gamma or error.

    The product falls with every layer whose factor is below 1, so compare models of the same depth alone.

    Reference: MODA (ICML 2025); spec 5.6.
    Differs from the paper in: the product itself underflows; its logarithm is given.

    Example:
        >>> e_dda(0.5, torch.tensor([0.5, 1.0]))
        DecayedError(log_product=-2.772588722239781, weighted_sum=0.5)
    """
    if errors.ndim != 1 or len(errors) == 0:
        raise ShapeError("e_dda", expected="errors of shape (layer,)", got=f"shape {tuple(errors.shape)}")
    errors = errors.detach().cpu().double()
    for name, values in (("gamma", torch.tensor(gamma, dtype=torch.float64)), ("errors", errors)):
        if bool((values < 0).any() | values.isinf().any()):
            raise ConfigError("e_dda", expected=f"{name} of at least 0, finite", got=str(values.tolist()))
    layer = torch.arange(1, len(errors) + 1, dtype=torch.float64)
    log_gamma = torch.tensor(gamma, dtype=torch.float64).log()
    product = float((layer * log_gamma + errors.log()).sum())
    return DecayedError(product, float((gamma**layer * errors).sum()))
