"""Compositionality: Winoground scores and additive compositionality of embeddings."""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ...errors import NonFiniteError, ShapeError, unknown_name
from ...tokens.masks import at_least_float32, full_precision
from .tie_ranking import TIES, Ties

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
"""Expected values for random scores and for constant scores."""


class Winoground(NamedTuple):
    """Fractions of solved examples, as expectations over the orders of tied scores.

    Attributes:
        text: the correct caption is selected for both images; chance 1/4.
        image: the correct image is selected for both captions; chance 1/4.
        group: both; chance 1/6.
    """

    text: float
    image: float
    group: float


def winoground(scores: Float[Tensor, "example 2 2"], *, ties: Ties = "average") -> Winoground:
    """Winoground scores for examples of two images and two captions with the same words in another order.

    text: ``S(I0, T0) > S(I0, T1)`` and ``S(I1, T1) > S(I1, T0)``; image: ``S(I0, T0) > S(I1, T0)`` and
    ``S(I1, T1) > S(I0, T1)``; group: both.

    Args:
        scores: (example, image, caption).
        ties: ``"average"`` over all orders of tied scores, so that constant scores are at chance; ``"pessimistic"``
            counts ties as not solved, as in the paper, ``"optimistic"`` as solved.

    Raises:
        ShapeError: another shape, or no example. NonFiniteError: NaN. ConfigError: an unknown treatment of ties.

    Reference: Thrush et al., Winoground (CVPR 2022), eq. 1 to 3.
    Differs from the paper in: ties are averaged; ``ties="pessimistic"`` is the paper's rule.

    Example:
        >>> winoground(torch.tensor([[[2.0, 1.0], [2.5, 3.0]]]))
        Winoground(text=1.0, image=0.0, group=0.0)
        >>> winoground(torch.zeros(1, 2, 2)).text
        0.25
    """
    if ties not in TIES:
        raise unknown_name("winoground", "treatment of ties", str(ties), TIES)
    if scores.ndim != 3 or scores.shape[1:] != (2, 2) or not len(scores):
        raise ShapeError(
            "winoground", expected="(example, image, caption) = (1 or more, 2, 2)", got=f"{tuple(scores.shape)}"
        )
    if bool(scores.isnan().any()):
        raise NonFiniteError("winoground", expected="scores", got="NaN")
    # Ties are decided by these priorities (order, image, caption).
    priorities = {
        "average": torch.tensor(list(permutations(range(4)))).view(-1, 2, 2),
        "optimistic": torch.eye(2)[None],
        "pessimistic": -torch.eye(2)[None],
    }[ties].to(scores.device)

    def greater(one: tuple[int, int], other: tuple[int, int]) -> Bool[Tensor, "example order"]:
        first, second = (scores[:, index[0], index[1], None] for index in (one, other))
        wins_tie = priorities[:, one[0], one[1]] > priorities[:, other[0], other[1]]
        return (first > second) | ((first == second) & wins_tie)

    text = greater((0, 0), (0, 1)) & greater((1, 1), (1, 0))
    image = greater((0, 0), (1, 0)) & greater((1, 1), (0, 1))
    return Winoground(*(float(solved.double().mean()) for solved in (text, image, text & image)))


def additive_compositionality(
    parts: Float[Tensor, "sample part dim"],
    whole: Float[Tensor, "sample dim"],
    distractors: Float[Tensor, "sample other dim"] | None = None,
) -> Float[Tensor, " sample"]:
    """Computes ``cos(sum of parts, whole)`` minus the mean cosine with distractors.

    For example, emb("red") + emb("car") is compared with the embedding of a red car and with those of other objects.
    Positive values mean that the sum is closer to the whole than to the average distractor, which does not imply that
    the whole is retrieved: use ``recall_at_k`` of the cosines for that.

    Args:
        parts: (sample, part, dim).
        whole: (sample, dim).
        distractors: (sample, other, dim); by default the wholes of the other samples.

    Raises:
        ShapeError: sizes that do not match, or no distractor.

    Example:
        >>> red_car, blue_car = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> additive_compositionality(torch.stack([red_car, blue_car]), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
        tensor([0.2828, 0.2000])
    """
    if parts.ndim != 3 or whole.shape != (parts.shape[0], parts.shape[2]):
        raise ShapeError(
            "additive_compositionality", expected="parts (sample, part, dim) and whole (sample, dim)",
            got=f"{tuple(parts.shape)} and {tuple(whole.shape)}",
        )  # fmt: skip
    parts, whole = at_least_float32(parts), at_least_float32(whole)
    added = F.normalize(parts.sum(dim=1), dim=-1)
    matched = (added * F.normalize(whole, dim=-1)).sum(dim=-1)
    if distractors is None:
        if len(whole) < 2:
            raise ShapeError("additive_compositionality", expected="two or more samples, or distractors", got="neither")
        with full_precision(whole):
            cosines = added @ F.normalize(whole, dim=-1).T
        return matched - (cosines.sum(dim=1) - matched) / (len(whole) - 1)
    if distractors.ndim != 3 or 0 in distractors.shape[:2] or distractors.shape[::2] != whole.shape:
        raise ShapeError(
            "additive_compositionality distractors", expected=f"(sample, other, dim) for {tuple(whole.shape)}",
            got=f"{tuple(distractors.shape)}",
        )  # fmt: skip
    with full_precision(whole):
        return matched - (F.normalize(at_least_float32(distractors), dim=-1) @ added[..., None])[..., 0].mean(dim=1)
