"""How sure a classifier is: one number for each sample, out of its logits (spec 8.7)."""

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
    """Generalised entropy, with its sign turned: 0 for a certain answer, least for a uniform one::

        s = -sum_{c in the top M} p_c^gamma (1 - p_c)^gamma,    p = softmax(logits)

    Args:
        logits: (sample, class).
        gamma: the smaller, the more small probabilities count.
        top: M, of how many of the most probable classes; all by default, 100 where there are many.

    Returns:
        (sample,) in float64; higher means more in-distribution. 1 - p of the first class is the sum of the others, so
        confident answers are told apart where p itself is rounded to 1.

    Raises:
        ConfigError: gamma that is not positive, a top beyond the classes. ShapeError: fewer than two classes, no
            samples. NonFiniteError: NaN or infinite logits; -inf for a class that is ruled out is fine.

    Reference: Liu et al., "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection" (CVPR 2023);
    spec 8.7.

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
    """The greatest probability, max softmax(logits). Rounding makes equals of all answers that are almost certain.

    Shapes and errors as ``gen_score``.

    Reference: Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples" (ICLR
    2017); spec 8.7.
    """
    return _checked(logits, "msp").softmax(dim=1).amax(dim=1)


def max_logit(logits: Float[Tensor, "sample class"]) -> Float[Tensor, " sample"]:
    """The greatest logit, which unlike ``msp`` knows how strong the evidence is. Shapes and errors as ``gen_score``.

    Reference: Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings" (ICML 2022); spec 8.7.
    """
    return _checked(logits, "max_logit").amax(dim=1)


def energy(logits: Float[Tensor, "sample class"]) -> Float[Tensor, " sample"]:
    """Minus the free energy, log sum exp(logits). Shapes and errors as ``gen_score``.

    Reference: Liu et al., "Energy-based Out-of-distribution Detection" (NeurIPS 2020); spec 8.7.
    """
    return _checked(logits, "energy").logsumexp(dim=1)


CONFIDENCES: dict[str, Confidence] = {"gen": gen_score, "msp": msp, "max_logit": max_logit, "energy": energy}


def _checked(logits: Tensor, who: str) -> Tensor:
    """Logits in float64, none of them NaN or infinite but for classes that are ruled out."""
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
            fix="Look for NaN in that sample's input, then in the model's weights.",
        )
    return logits
