"""Which pairs attention computes at all: patterns of sparse attention, and how many pairs each leaves (spec 7.9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError, ShapeError


class Pattern(NamedTuple):
    """Pairs that may attend.

    Attributes:
        mask: (query, key), or (..., query, key) for patterns that depend on data; True = may. As ``mask[None, None]``
            it is what ``attend`` takes, whose dense softmax over it is what a sparse kernel must agree with.
        pairs: how many are True, over all matrices.
        density: that over all pairs; the cost of a kernel that skips the rest, relative to full attention.
    """

    mask: Bool[Tensor, "*batch query key"]
    pairs: int
    density: float

    def __or__(self, other: Pattern) -> Pattern:  # type: ignore[override]
        """Pairs of either."""
        if self.mask.shape[-2:] != other.mask.shape[-2:]:
            raise ShapeError(
                "Pattern", expected=f"(query, key) = {tuple(self.mask.shape[-2:])}",
                got=f"{tuple(other.mask.shape[-2:])}",
            )  # fmt: skip
        return pattern_of(self.mask | other.mask)

    def __and__(self, other: Pattern) -> Pattern:
        """Pairs of both."""
        return pattern_of((self | other).mask & self.mask & other.mask)


def pattern_of(mask: Bool[Tensor, "*batch query key"]) -> Pattern:
    """Counts the pairs of a mask.

    Example:
        >>> pattern_of(torch.tensor([[True, False], [True, True]]))[1:]
        (3, 0.75)
    """
    pairs = int(mask.sum())
    return Pattern(mask, pairs, pairs / max(mask.numel(), 1))


def local(queries: int, keys: int, *, width: int) -> Pattern:
    """``|i - j| <= width``.

    Example:
        >>> local(3, 3, width=1).pairs
        7
    """
    return dilated(queries, keys, width=width, step=1)


def dilated(queries: int, keys: int, *, width: int, step: int) -> Pattern:
    """Every ``step``-th neighbor: ``|i - j| <= width step`` and step divides i - j.

    Raises:
        ConfigError: width < 0 or step < 1.

    Example:
        >>> dilated(5, 5, width=1, step=2).mask[2].int()
        tensor([1, 0, 1, 0, 1], dtype=torch.int32)
    """
    _at_least("dilated", width=(width, 0), step=(step, 1))
    apart = _rows(queries) - _columns(keys)
    return pattern_of((apart.abs() <= width * step) & (apart % step == 0))


def strided(queries: int, keys: int, *, step: int) -> Pattern:
    """Keys 0, step, 2 step, ... for every query.

    Example:
        >>> strided(1, 5, step=2).mask.int()
        tensor([[1, 0, 1, 0, 1]], dtype=torch.int32)
    """
    _at_least("strided", step=(step, 1))
    return pattern_of((_columns(keys) % step == 0).expand(queries, keys))


def block_diagonal(queries: int, keys: int, *, block: int) -> Pattern:
    """``i // block = j // block``.

    Example:
        >>> block_diagonal(4, 4, block=2).density
        0.5
    """
    _at_least("block_diagonal", block=(block, 1))
    return pattern_of(_rows(queries) // block == _columns(keys) // block)


def global_tokens(queries: int, keys: int, *, count: int) -> Pattern:
    """The first ``count`` queries see all keys, and all queries see the first ``count`` keys.

    Example:
        >>> global_tokens(3, 3, count=1).pairs
        5
    """
    _at_least("global_tokens", count=(count, 0))
    return pattern_of((_rows(queries) < count) | (_columns(keys) < count))


def random_keys(queries: int, keys: int, *, count: int, seed: int = 0) -> Pattern:
    """``count`` different keys for each query, drawn evenly; the same seed draws the same ones.

    Example:
        >>> random_keys(3, 7, count=2).mask.sum(dim=1)
        tensor([2, 2, 2])
    """
    _at_least("random_keys", count=(count, 0))
    drawn = torch.rand(queries, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = drawn.argsort(dim=1)[:, :count]
    return pattern_of(torch.zeros(queries, keys, dtype=torch.bool).scatter(1, chosen, True))


def top_k(logits: Float[Tensor, "*batch query key"], *, k: int) -> Pattern:
    """The k keys of largest logit for each query; ties with the k-th are kept, so that nothing is chosen by place.

    Keys at minus infinity are never chosen. The logits must be computed to choose, so what is saved comes after them.

    Example:
        >>> top_k(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), k=2).mask.int()
        tensor([[1, 1, 1, 0]], dtype=torch.int32)
    """
    _at_least("top_k", k=(k, 1))
    if logits.ndim < 2 or not logits.is_floating_point():
        raise ShapeError("top_k", expected="floating logits (..., query, key)", got=f"{tuple(logits.shape)}")
    seen = logits.detach() > -torch.inf
    if k < logits.shape[-1]:
        seen &= logits.detach() >= logits.detach().topk(k, dim=-1).values[..., -1:]
    return pattern_of(seen)


def bottleneck(lengths: Sequence[int], *, count: int) -> Pattern:
    """Modalities that meet in ``count`` shared tokens alone, which stand behind all of them.

    Every token sees its own modality and the shared tokens; shared tokens see everything.

    Args:
        lengths: tokens of each modality.
        count: shared tokens.

    Reference: Nagrani et al., MBT (NeurIPS 2021); spec 7.9.

    Example:
        >>> bottleneck([2, 1], count=1).mask.int()
        tensor([[1, 1, 0, 1],
                [1, 1, 0, 1],
                [0, 0, 1, 1],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    _at_least("bottleneck", count=(count, 0))
    if not lengths or min(lengths) < 0:
        raise ConfigError("bottleneck", expected="the lengths of one or more modalities", got=f"{list(lengths)}")
    shared = len(lengths)
    repeats = torch.tensor([*lengths, count])
    labels = torch.repeat_interleave(torch.arange(shared + 1), repeats)
    is_shared = labels == shared
    return pattern_of((labels[:, None] == labels[None]) | is_shared[:, None] | is_shared[None])


def _rows(queries: int) -> Tensor:
    return torch.arange(queries)[:, None]


def _columns(keys: int) -> Tensor:
    return torch.arange(keys)[None]


def _at_least(who: str, **options: tuple[int, int]) -> None:
    for name, (value, least) in options.items():
        if value < least:
            raise ConfigError(who, expected=f"{name} >= {least}", got=f"{name} = {value}")
