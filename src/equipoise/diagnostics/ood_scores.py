"""Confidence scores of a classifier, computed from its logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, ShapeError

Confidence = Callable[[Tensor], Tensor]


def gen_score(
    logits: Float[Tensor, "sample class"], *, gamma: float = 0.1, top: int | None = None
) -> Float[Tensor, " sample"]:
    """Computes the negative generalized entropy: 0 for a certain prediction, lowest for a uniform one::

        s = -sum_{c in the top M} p_c^gamma (1 - p_c)^gamma,    p = softmax(logits)

    Args:
        logits: (sample, class).
        gamma: lower values increase the weight of small probabilities.
        top: M, number of the most probable classes; all by default; use 100 for many classes.

    Returns:
        (sample,) in float64; higher means more in-distribution. 1 - p of the first class is computed as the sum
        of the others, so that confident predictions differ even if p is rounded to 1.

    Raises:
        ConfigError: gamma <= 0, or top larger than the number of classes. ShapeError: fewer than two classes, or no
            samples. NonFiniteError: NaN or infinite logits; -inf for excluded classes is allowed.

    Reference: Liu et al., "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection" (CVPR 2023).

    Example:
        >>> round(gen_score(torch.zeros(1, 4)).item(), 6)
        -3.383453
    """
    logits = _checked(logits, "gen_score")
    top = logits.shape[1] if top is None else top
    if not gamma > 0 or not 1 <= top <= logits.shape[1]:
        raise ConfigError(
            "gen_score",
            expected=f"gamma > 0 and 1 <= top <= classes = {logits.shape[1]}",
            got=f"gamma = {gamma}, top = {top}",
        )
    inside = logits.log_softmax(dim=1).sort(dim=1, descending=True).values
    outside = torch.log1p(-inside.exp())
    outside[:, 0] = inside[:, 1:].logsumexp(dim=1)
    return -(gamma * (inside + outside)[:, :top]).exp().sum(dim=1)


def msp(logits: Float[Tensor, "sample class"]) -> Float[Tensor, " sample"]:
    """Computes the maximum softmax probability. In finite precision, near-certain predictions tie.

    Shapes and errors as in ``gen_score``.

    Reference: Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples" (ICLR
    2017).
    """
    return _checked(logits, "msp").softmax(dim=1).amax(dim=1)


def max_logit(logits: Float[Tensor, "sample class"]) -> Float[Tensor, " sample"]:
    """Computes the maximum logit, which unlike ``msp`` depends on its magnitude. Shapes and errors as in ``gen_score``.

    Reference: Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings" (ICML 2022).
    """
    return _checked(logits, "max_logit").amax(dim=1)


def energy(logits: Float[Tensor, "sample class"]) -> Float[Tensor, " sample"]:
    """Computes the negative free energy, log sum exp(logits). Shapes and errors as in ``gen_score``.

    Reference: Liu et al., "Energy-based Out-of-distribution Detection" (NeurIPS 2020).
    """
    return _checked(logits, "energy").logsumexp(dim=1)


CONFIDENCES: dict[str, Confidence] = {"gen": gen_score, "msp": msp, "max_logit": max_logit, "energy": energy}


def _checked(logits: Tensor, who: str) -> Tensor:
    """Returns the logits in float64; -inf is allowed for excluded classes."""
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise ShapeError(
            who,
            expected="logits (sample, class) of one or more samples and two or more classes",
            got=f"shape {tuple(logits.shape)}",
        )
    logits = logits.double()
    bad = (~logits.logsumexp(dim=1).isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteError(
            who,
            expected="finite logits",
            got=f"NaN or infinity for {len(bad)} of {len(logits)} samples, the first is number {bad[0]}",
            fix="Check the input of that sample and the weights of the model for NaN.",
        )
    return logits
