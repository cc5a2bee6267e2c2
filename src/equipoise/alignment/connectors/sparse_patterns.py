"""Sparse attention patterns as boolean masks, with the number of query-key pairs in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError, ShapeError


class Pattern(NamedTuple):
    """A sparse attention pattern.

    Attributes:
        mask: (query, key), or (..., query, key) for data-dependent patterns; True = attends. Pass ``mask[None, None]``
            to ``attend``, whose dense computation is the reference for a sparse kernel.
        pairs: number of True entries.
        density: fraction of True entries; the cost of an ideal sparse kernel relative to full attention.
    """

    mask: Bool[Tensor, "*batch query key"]
    pairs: int
    density: float

    def __or__(self, other: Pattern) -> Pattern:  # type: ignore[override]
        """Union of two patterns."""
        if self.mask.shape[-2:] != other.mask.shape[-2:]:
            raise ShapeError(
                "Pattern", expected=f"(query, key) = {tuple(self.mask.shape[-2:])}",
                got=f"{tuple(other.mask.shape[-2:])}",
            )  # fmt: skip
        return pattern_of(self.mask | other.mask)

    def __and__(self, other: Pattern) -> Pattern:
        """Intersection of two patterns."""
        return pattern_of((self | other).mask & self.mask & other.mask)


def pattern_of(mask: Bool[Tensor, "*batch query key"]) -> Pattern:
    """Builds a Pattern from a mask.

    Example:
        >>> pattern_of(torch.tensor([[True, False], [True, True]]))[1:]
        (3, 0.75)
    """
    pairs = int(mask.sum())
    return Pattern(mask, pairs, pairs / max(mask.numel(), 1))


def local(queries: int, keys: int, *, width: int) -> Pattern:
    """Local window: ``|i - j| <= width``.

    Example:
        >>> local(3, 3, width=1).pairs
        7
    """
    return dilated(queries, keys, width=width, step=1)


def dilated(queries: int, keys: int, *, width: int, step: int) -> Pattern:
    """Dilated window: ``|i - j| <= width step`` and step divides i - j.

    Raises:
        ConfigError: width < 0 or step < 1.

    Example:
        >>> dilated(5, 5, width=1, step=2).mask[2].int()
        tensor([1, 0, 1, 0, 1], dtype=torch.int32)
    """
    _at_least("dilated", width=(width, 0), step=(step, 1))
    distance = _rows(queries) - _columns(keys)
    return pattern_of((distance.abs() <= width * step) & (distance % step == 0))


def strided(queries: int, keys: int, *, step: int) -> Pattern:
    """Strided pattern: keys 0, step, 2 step, ... for every query.

    Example:
        >>> strided(1, 5, step=2).mask.int()
        tensor([[1, 0, 1, 0, 1]], dtype=torch.int32)
    """
    _at_least("strided", step=(step, 1))
    return pattern_of((_columns(keys) % step == 0).expand(queries, keys))


def block_diagonal(queries: int, keys: int, *, block: int) -> Pattern:
    """Block-diagonal pattern: ``i // block = j // block``.

    Example:
        >>> block_diagonal(4, 4, block=2).density
        0.5
    """
    _at_least("block_diagonal", block=(block, 1))
    return pattern_of(_rows(queries) // block == _columns(keys) // block)


def global_tokens(queries: int, keys: int, *, count: int) -> Pattern:
    """Global tokens: the first ``count`` queries attend to all keys, and all queries to the first ``count`` keys.

    Example:
        >>> global_tokens(3, 3, count=1).pairs
        5
    """
    _at_least("global_tokens", count=(count, 0))
    return pattern_of((_rows(queries) < count) | (_columns(keys) < count))


def random_keys(queries: int, keys: int, *, count: int, seed: int = 0) -> Pattern:
    """``count`` distinct keys per query, sampled uniformly; deterministic given the seed.

    Example:
        >>> random_keys(3, 7, count=2).mask.sum(dim=1)
        tensor([2, 2, 2])
    """
    _at_least("random_keys", count=(count, 0))
    drawn = torch.rand(queries, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = drawn.argsort(dim=1)[:, :count]
    return pattern_of(torch.zeros(queries, keys, dtype=torch.bool).scatter(1, chosen, True))


def top_k(logits: Float[Tensor, "*batch query key"], *, k: int) -> Pattern:
    """The k keys with the largest logits of each query; keys that tie with the k-th are included.

    Keys with a logit of minus infinity are never selected. All logits must be computed first, so only the softmax and
    the weighted sum become cheaper.

    Example:
        >>> top_k(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), k=2).mask.int()
        tensor([[1, 1, 1, 0]], dtype=torch.int32)
    """
    _at_least("top_k", k=(k, 1))
    if logits.ndim < 2 or not logits.is_floating_point():
        raise ShapeError("top_k", expected="floating logits (..., query, key)", got=f"{tuple(logits.shape)}")
    mask = logits.detach() > -torch.inf
    if k < logits.shape[-1]:
        mask &= logits.detach() >= logits.detach().topk(k, dim=-1).values[..., -1:]
    return pattern_of(mask)


def bottleneck(lengths: Sequence[int], *, count: int) -> Pattern:
    """Bottleneck pattern: modalities exchange information only through ``count`` shared tokens at the end.

    Every token attends to its own modality and to the shared tokens; shared tokens attend to all tokens.

    Args:
        lengths: number of tokens of each modality.
        count: number of shared tokens.

    Reference: Nagrani et al., MBT (NeurIPS 2021).

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
