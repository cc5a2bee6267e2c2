"""Gathers tokens into one block per modality and scatters them back to their original positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...tokens.token_batch import SPECIAL
from .sdpa_kernels import HeadTensor


class Blocks(NamedTuple):
    """Positions of the tokens of each modality.

    Attributes:
        labels: labels of the blocks, -1 for special tokens and padding.
        lengths: sizes of the blocks, the maximum over samples.
        order: (place,) or (batch, place), token index of each position; None if tokens are already in blocks.
        back: (token,) or (batch, token), the inverse of ``order``; None with it.
        real: (batch, place), False at padding, if a sample has fewer tokens than others; None without padding.
    """

    labels: tuple[int, ...]
    lengths: tuple[int, ...]
    order: Int[Tensor, "... place"] | None = None
    back: Int[Tensor, "... token"] | None = None
    real: Bool[Tensor, "batch place"] | None = None

    def places(self, device: torch.device) -> Int[Tensor, "#batch place"]:
        """Returns the token index of each position, (batch, place) or (1, place)."""
        order = torch.arange(sum(self.lengths)) if self.order is None else self.order
        order = order.to(device)
        return order[None] if order.ndim == 1 else order


def blocks_of(
    modality: Int[Tensor, " token"] | Int[Tensor, "batch token"],
    valid: Bool[Tensor, "batch token"] | None = None,
    device: torch.device | None = None,
) -> Blocks:
    """Computes the blocks of a batch; tokens keep their order within each block.

    Args:
        modality: label of every token.
        valid: False for masked tokens; they may be in any block.
        device: device of the tokens.

    Example:
        >>> blocks_of(torch.tensor([1, 1, 0, 1]))[:2]
        ((0, 1), (1, 3))
    """
    rows = modality if modality.ndim == 2 else modality[None]
    device = rows.device if device is None else device
    shared = _shared(rows, None if valid is None else valid.to(rows.device))
    if shared is None:
        return _ragged(rows, device)
    labels, lengths = torch.unique_consecutive(shared, return_counts=True)
    if len(labels) == len(labels.unique()):
        return Blocks(tuple(labels.tolist()), tuple(lengths.tolist()))
    sorted_labels, order = torch.sort(shared, stable=True)
    labels, lengths = torch.unique_consecutive(sorted_labels, return_counts=True)
    back = torch.argsort(order)
    return Blocks(tuple(labels.tolist()), tuple(lengths.tolist()), order.to(device), back.to(device))


def _shared(rows: Int[Tensor, "batch token"], valid: Tensor | None) -> Int[Tensor, " token"] | None:
    """Returns the row of labels that matches the valid tokens of all samples, or None."""
    if len(rows) == 1 or bool((rows == rows[:1]).all()):
        return rows[0] if len(rows) else rows.new_full(rows.shape[1:], SPECIAL)
    if valid is None or valid.shape[0] != len(rows):
        return None
    layout = rows.masked_fill(~valid, SPECIAL).amax(0)
    return layout if bool(((rows == layout) | ~valid).all()) else None


def _ragged(rows: Int[Tensor, "batch token"], device: torch.device) -> Blocks:
    labels, lengths, order, real = rows.unique().tolist(), [], [], []
    back = torch.zeros_like(rows)
    for label in labels:
        member = rows == label
        counts = member.sum(dim=1, keepdim=True)
        longest = int(counts.max())
        # A stable sort brings the members to the front and keeps their order.
        order.append(torch.argsort(~member, dim=1, stable=True)[:, :longest])
        real.append(torch.arange(longest, device=rows.device) < counts)
        back = torch.where(member, sum(lengths) + member.cumsum(1) - 1, back)
        lengths.append(longest)
    filled = torch.cat(real, dim=1)
    return Blocks(
        tuple(labels), tuple(lengths), torch.cat(order, dim=1).to(device), back.to(device),
        None if bool(filled.all()) else filled.to(device),
    )  # fmt: skip


def into_blocks(x: HeadTensor, blocks: Blocks) -> tuple[HeadTensor, ...]:
    """Splits (batch, head, token, dim) into one tensor per block. Values at padding positions are arbitrary.

    The gradient at padding positions must be zero.
    """
    if blocks.order is not None:
        x = _Reordered.apply(x, blocks.order, blocks.back, None)  # type: ignore[assignment]
    return x.split(blocks.lengths, dim=2)


def out_of_blocks(parts: Sequence[HeadTensor], blocks: Blocks) -> HeadTensor:
    """Concatenates blocks and restores the order of the tokens: the inverse of ``into_blocks``."""
    x = torch.cat(list(parts), dim=2)
    if blocks.order is not None:
        x = _Reordered.apply(x, blocks.back, blocks.order, blocks.real)  # type: ignore[assignment]
    return x


class _Reordered(torch.autograd.Function):
    """Reorders tokens. The backward pass gathers with the inverse order, which is cheaper than scatter-add."""

    @staticmethod
    def forward(ctx, x, there, back, real):
        ctx.save_for_backward(there, back, real)
        return _taken(x, there)

    @staticmethod
    def backward(ctx, grad):
        _, back, real = ctx.saved_tensors
        gradient = _taken(grad, back)
        return gradient if real is None else gradient.masked_fill(~real[:, None, :, None], 0.0), None, None, None


def _taken(x: Float[Tensor, "batch head token dim"], places: Int[Tensor, "... place"]) -> HeadTensor:
    if places.ndim == 1:
        return x.index_select(2, places)
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
