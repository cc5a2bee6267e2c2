"""Metrics of embedding spaces: modality gap, alignment, uniformity, CKA, mutual nearest neighbors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError, ShapeError
from ...tokens.masks import at_least_float32 as _exact
from ...tokens.masks import full_precision

Vectors = Float[Tensor, "sample dim"]


def modality_gap(a: Vectors, b: Vectors) -> Float[Tensor, ""]:
    """Distance between the means of two modalities, ``|mean a - mean b|``; 0 to 2 for unit vectors.

    Reference: Liang et al., Mind the Gap (NeurIPS 2022).

    Example:
        >>> modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(1.4142)
    """
    _checked("modality_gap", a, b, paired=False)
    return (_exact(a).mean(dim=0) - _exact(b).mean(dim=0)).norm()


def alignment(a: Vectors, b: Vectors) -> Float[Tensor, ""]:
    """Mean squared distance of positive pairs, ``mean |a_i - b_i|^2``; 0 is best.

    Reference: Wang and Isola, Alignment and Uniformity on the Hypersphere (ICML 2020), eq. 3.

    Example:
        >>> alignment(torch.eye(2), torch.eye(2).flip(0))
        tensor(2.)
    """
    _checked("alignment", a, b)
    return (_exact(a) - _exact(b)).square().sum(dim=1).mean()


def uniformity(a: Vectors) -> Float[Tensor, ""]:
    """Computes ``log mean exp(-2 |a_i - a_j|^2)`` over pairs i < j; lower is more uniform, 0 is collapse to a point.

    Reference: Wang and Isola (ICML 2020), eq. 4.

    Example:
        >>> uniformity(torch.eye(2))
        tensor(-4.0000)
    """
    _checked("uniformity", a, a, least=2)
    squares = F.pdist(_exact(a)).square()
    return (-2 * squares).logsumexp(dim=0) - torch.tensor(float(len(squares)), dtype=squares.dtype).log().item()


def linear_cka(a: Float[Tensor, "sample one"], b: Float[Tensor, "sample other"]) -> Float[Tensor, ""]:
    """Linear CKA ``|A^T B|_F^2 / (|A^T A|_F |B^T B|_F)`` of centered vectors.

    It is invariant to rotation and scale: 1 for equal representations, 0 for uncorrelated ones. Widths may differ. With
    fewer samples than dimensions it is high for any representations. NaN if one side is constant.

    Reference: Kornblith et al. (ICML 2019), section 3.

    Example:
        >>> linear_cka(torch.eye(3), 5 * torch.eye(3).flip(1))
        tensor(1.)
    """
    _checked("linear_cka", a, b, same_width=False, least=2)
    a, b = (_exact(x) - _exact(x).mean(dim=0) for x in (a, b))
    with full_precision(a):
        return (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())


def mutual_knn(a: Float[Tensor, "sample one"], b: Float[Tensor, "sample other"], *, k: int = 10) -> float:
    """Mean overlap of the k nearest neighbors of each sample in two spaces; chance is k / (n - 1).

    Neighbors have the largest cosines. Ties for the last neighbors are averaged over all choices, independently in the
    two spaces, so that constant vectors are at chance.

    Raises:
        ConfigError: k < 1 or k >= samples.

    Reference: Huh et al., The Platonic Representation Hypothesis (ICML 2024).

    Example:
        >>> mutual_knn(torch.eye(3) + 0.1, torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), k=2)
        1.0
    """
    _checked("mutual_knn", a, b, same_width=False)
    if not 1 <= k < len(a):
        raise ConfigError("mutual_knn", expected=f"1 <= k < samples = {len(a)}", got=f"k = {k}")
    near = []
    for x in (a, b):
        unit = F.normalize(_exact(x), dim=1)
        with full_precision(unit):
            cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
        last = cosines.topk(k, dim=1).values[:, -1:]
        above, tied = cosines > last, cosines == last
        tie_probability = (k - above.sum(dim=1, keepdim=True)).double() / tied.sum(dim=1, keepdim=True)
        near.append(above + tied * tie_probability)
    return float((near[0] * near[1]).sum(dim=1).mean() / k)


def _checked(who: str, a: Tensor, b: Tensor, *, paired: bool = True, same_width: bool = True, least: int = 1) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < least or not x.is_floating_point():
            raise ShapeError(
                f"{who} {name}", expected=f"a floating tensor (sample, dim) with {least} or more samples",
                got=f"{tuple(x.shape)}, {x.dtype}",
            )  # fmt: skip
    if (paired and len(a) != len(b)) or (same_width and a.shape[1] != b.shape[1]):
        raise ShapeError(f"{who} b", expected=f"a's size {tuple(a.shape)}", got=f"{tuple(b.shape)}")
