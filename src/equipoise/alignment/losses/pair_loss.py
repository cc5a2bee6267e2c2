"""Base class of losses over pairs of modalities: selects pairs and samples, and gathers batches across processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError, ShapeError, unknown_name
from ...tokens.masks import at_least_float32 as exact
from ...tokens.masks import bool_mask, full_precision, zero_loss
from ...tokens.token_batch import Output, Tokens
from .gather import RankSlices, all_gather_with_grad, global_mean, rank_slices


@dataclass(frozen=True, eq=False)
class Pair:
    """Unit vectors of two modalities, for samples that have both.

    Attributes:
        a, b: (here, dim) of this process.
        all_a, all_b: (all, dim) of all processes.
        ids, all_ids: samples with equal ids are positives.
        rows, all_rows: global sample indices, ascending.
        unique: True if all ids differ.
        place: slice of this process.
    """

    a: Float[Tensor, "here dim"]
    b: Float[Tensor, "here dim"]
    all_a: Float[Tensor, "all dim"]
    all_b: Float[Tensor, "all dim"]
    ids: Int[Tensor, " here"]
    all_ids: Int[Tensor, " all"]
    rows: Int[Tensor, " here"]
    all_rows: Int[Tensor, " all"]
    unique: bool
    place: RankSlices


Vectors = Mapping[str, Tensor | Tokens]


class PairLoss(nn.Module):
    """Base class of losses over pairs of modalities; subclasses implement ``_pair``.

    Args:
        anchor: use only pairs with this modality; None uses all.
        widths, dim: name -> width of vectors that are projected to ``dim`` first.
        gather: compare with the samples of all processes.
    """

    def __init__(
        self, *, anchor: str | None, widths: dict[str, int] | None, dim: int | None, gather: bool
    ) -> None:  # fmt: skip
        super().__init__()
        if (widths is None) != (dim is None):
            raise ConfigError(type(self).__name__, expected="widths and dim, or none", got=f"{widths} and {dim}")
        if anchor is not None and widths is not None and anchor not in widths:
            raise unknown_name(type(self).__name__, "anchor", anchor, widths)
        self.anchor, self.gather = anchor, gather
        self.heads = nn.ModuleDict()
        if widths is not None and dim is not None:
            self.heads.update({name: nn.Linear(width, dim, bias=False) for name, width in widths.items()})

    @abstractmethod
    def _pair(self, pair: Pair) -> Float[Tensor, ""]:
        """Contribution of this process's rows; the contributions of all processes sum to the loss."""

    def _prepare(self) -> None:
        """Called before each forward pass; does nothing by default."""

    def forward(
        self,
        a: Float[Tensor, "batch dim"] | Vectors,
        b: Float[Tensor, "batch dim"] | None = None,
        *,
        ids: Int[Tensor, " batch"] | None = None,
        present: Mapping[str, Bool[Tensor, " batch"]] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean loss over all pairs of modalities, in float32 or higher precision; 0 if no sample has a pair.

        Args:
            a: (batch, dim), or name -> (batch, dim) or Tokens, which are pooled.
            b: the second modality if ``a`` is a tensor.
            ids: (batch,) equal for samples that are positives of each other; all different by default.
            present: name -> (batch,), boolean or 0/1, False if a sample lacks the modality: its values, even NaN, have
                no influence. All processes must pass the same names; pass zeros and False for a modality that one
                process lacks.
        """
        terms = self.terms(a, b, ids=ids, present=present)
        if terms:
            return torch.stack(list(terms.values())).mean()
        parts = [part.values if isinstance(part, Tokens) else part for part in as_mapping(a, b, self._who).values()]
        return zero_loss([*parts, *self.parameters()])

    def terms(
        self,
        a: Float[Tensor, "batch dim"] | Vectors,
        b: Float[Tensor, "batch dim"] | None = None,
        *,
        ids: Int[Tensor, " batch"] | None = None,
        present: Mapping[str, Bool[Tensor, " batch"]] | None = None,
    ) -> dict[tuple[str, str], Float[Tensor, ""]]:
        """Losses by pair of modalities: (name, name) -> loss; pairs without samples are omitted."""
        self._prepare()
        vectors, masks = self._units(as_mapping(a, b, self._who), present)
        first = next(iter(vectors.values()))
        slices = rank_slices(len(first), first.device, alone=not self.gather)
        rows = slices.start + torch.arange(len(first), device=first.device)
        if ids is not None and ids.shape != rows.shape:
            raise ShapeError(f"{self._who} ids", expected=f"shape (batch,) = ({len(rows)},)", got=f"{tuple(ids.shape)}")
        unique = ids is None
        ids = rows if ids is None else ids.to(rows.device)
        numbers = torch.stack([ids, rows], dim=1)
        all_numbers = all_gather_with_grad(numbers, slices)
        all_vectors = {name: all_gather_with_grad(part, slices) for name, part in vectors.items()}
        if masks or len(slices.sizes) > 1:
            masks = {name: masks.get(name, torch.ones_like(rows, dtype=torch.bool)) for name in vectors}
        all_masks = {name: all_gather_with_grad(mask, slices) for name, mask in masks.items()}
        losses = {}
        for one, other in self._pairs(tuple(vectors)):
            local = gathered = slice(None)
            if masks:
                local, gathered = masks[one] & masks[other], all_masks[one] & all_masks[other]
            local_ids, all_ids = (part.T.contiguous() for part in (numbers[local], all_numbers[gathered]))
            pair = Pair(
                vectors[one][local], vectors[other][local], all_vectors[one][gathered], all_vectors[other][gathered],
                local_ids[0], all_ids[0], local_ids[1], all_ids[1], unique, slices,
            )  # fmt: skip
            if len(pair.all_a):
                losses[one, other] = global_mean(self._pair(pair) * len(slices.sizes), slices)
        return losses

    def penalty(self, output: Output, target: Tensor | None = None) -> Float[Tensor, ""]:
        """Loss of the pooled tokens of a model's output, as an additional loss in training loops."""
        return self(output.tokens)

    @property
    def _who(self) -> str:
        return type(self).__name__

    def _pairs(self, names: tuple[str, ...]) -> list[tuple[str, str]]:
        if len(names) < 2:
            raise ConfigError(self._who, expected="two or more modalities", got=f"{len(names)}")
        if self.anchor is None:
            return list(combinations(names, 2))
        if self.anchor not in names:
            raise unknown_name(self._who, "anchor", self.anchor, names)
        return [(self.anchor, name) for name in names if name != self.anchor]

    def _units(
        self, parts: Vectors, present: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        vectors, masks = {}, dict(present or {})
        for name in masks:
            if name not in parts:
                raise unknown_name(self._who, "modality in present", name, parts)
        for name, part in parts.items():
            if isinstance(part, Tokens):
                if name not in masks and (part.mask is not None or not len(part)):
                    masks[name] = part.present() if len(part) else part.values.new_zeros(len(part.values)).bool()
                part = part.pooled()
            self._check_vectors(name, part)
            if name in masks:
                masks[name] = self._checked_mask(name, masks[name], part)
                # Values of missing modalities, possibly NaN, must not reach the gradient.
                part = part.masked_fill(~masks[name][:, None], 0.0)
            if self.heads:
                part = self.heads[name](part.to(self.heads[name].weight.dtype))  # type: ignore[arg-type]
            vectors[name] = F.normalize(exact(part), dim=-1)
        first_name, first = next(iter(vectors.items()))
        for name, part in vectors.items():
            if part.shape != first.shape:
                raise ShapeError(
                    f"{self._who} '{name}'", expected=f"(batch, dim) = {tuple(first.shape)} as '{first_name}' has",
                    got=f"{tuple(part.shape)}", fix="widths={name: width} and dim bring vectors to a common width.",
                )  # fmt: skip
        return vectors, masks

    def _check_vectors(self, name: str, part: Tensor) -> None:
        if part.ndim != 2 or not part.is_floating_point():
            raise ShapeError(
                f"{self._who} '{name}'", expected="a floating tensor of shape (batch, dim)",
                got=f"shape {tuple(part.shape)}, {part.dtype}", fix="Pool tokens first: Tokens(values).pooled().",
            )  # fmt: skip
        if not self.heads:
            return
        if name not in self.heads:
            raise unknown_name(self._who, "modality", name, self.heads)
        width = self.heads[name].in_features
        if part.shape[1] != width:
            raise ShapeError(f"{self._who} '{name}'", expected=f"width = {width}", got=f"{part.shape[1]}")

    def _checked_mask(self, name: str, mask: Tensor, part: Tensor) -> Tensor:
        who, expected = f"{self._who} present['{name}']", f"shape (batch,) = ({len(part)},)"
        if isinstance(mask, Tensor) and mask.shape != part.shape[:1]:
            raise ShapeError(who, expected=expected, got=f"{tuple(mask.shape)}")
        return bool_mask(mask, who, f"a boolean or 0/1 mask of {expected}", numbers=True).to(part.device)


def as_mapping(a: Tensor | Vectors, b: Tensor | None, who: str) -> Vectors:
    """Converts two tensors to a mapping; returns a mapping unchanged."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return {"a": a, "b": b}
    if isinstance(a, Mapping) and b is None:
        if a:
            return a
        raise ConfigError(who, expected="two or more modalities", got="an empty mapping")
    raise ShapeError(
        who, expected="two tensors (batch, dim), or one mapping name -> (batch, dim)",
        got=f"{type(a).__name__} and {type(b).__name__}",
    )  # fmt: skip


def similarity_logits(a: Float[Tensor, "row dim"], b: Float[Tensor, "column dim"], scale: float | Tensor) -> Tensor:
    """Computes scale a b^T (row, column) in float32 or higher precision, also under autocast."""
    with full_precision(a):
        a, b = exact(a), exact(b)
        scale = exact(scale) if isinstance(scale, Tensor) else scale
        return (scale * a) @ b.T


def check_pair(a: Tensor, b: Tensor, who: str) -> None:
    """Checks that a and b are nonempty floating-point tensors (batch, dim) of equal shape."""
    for name, part in (("a", a), ("b", b)):
        if part.ndim != 2 or not part.is_floating_point() or len(part) == 0:
            raise ShapeError(
                f"{who} {name}", expected="a floating tensor of shape (batch, dim) with at least one row",
                got=f"shape {tuple(part.shape)}, {part.dtype}",
            )  # fmt: skip
    if a.shape != b.shape:
        raise ShapeError(f"{who} b", expected=f"(batch, dim) = {tuple(a.shape)} as a has", got=f"{tuple(b.shape)}")
