"""What several fusions do with token streams: join them, count them, find the last token, bring them to one length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..tokens.token_batch import Output, Tokens, pack, segment_labels


def concatenate_streams(parts: Sequence[Tokens]) -> Tokens:
    """One sequence out of several, without the labels that ``pack`` makes."""
    masked = any(part.mask is not None for part in parts)
    return Tokens(
        torch.cat([part.values for part in parts], dim=1),
        mask=torch.cat([part.valid() for part in parts], dim=1) if masked else None,
    )


def labels_of(parts: Sequence[Tokens], numbers: Sequence[int]) -> Int[Tensor, " token"]:
    """The label of every token of ``joined(parts)``, one number for each part; -1 for tokens of no modality.

    Example:
        >>> labels_of([Tokens(torch.zeros(1, 2, 5)), Tokens(torch.zeros(1, 3, 5))], [1, -1])
        tensor([ 1,  1, -1, -1, -1])
    """
    device, lengths = parts[0].values.device, [len(part) for part in parts]
    repeats = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(torch.tensor(numbers, device=device), repeats, output_size=sum(lengths))


def pooled_by_cls(
    tokens: dict[str, Tokens], cls: Tensor, blocks: Iterable[nn.Module], norm: nn.Module, *, rows: int | None
) -> Output:  # fmt: skip
    """One sequence of a class token and all tokens through a stack of blocks; the features are the class token's.

    Args:
        tokens: of every modality, in order.
        cls: the class token.
        blocks: each takes (values, mask, labels) as ``transformer.Block`` does.
        norm: of the features.
        rows: how many of the first tokens the last block computes; None for all.
    """
    packed = pack(tokens, cls=cls)
    values, (*first, last) = packed.values, blocks
    labels = {"modality": segment_labels(packed.lengths or (), values.device), "num_modalities": len(tokens)}
    # Only the block that pools is asked for shares.
    for block in first:
        values = block(values, mask=packed.mask, share=False, **labels).output
    read = last(values, rows=rows, mask=packed.mask, **labels)
    return Output(features=norm(read.output[:, 0]), share=read.share[:, :, 0], tokens=tokens, names=tuple(tokens))


def mean_over_present(vectors: Sequence[Tensor], parts: Sequence[Tokens]) -> list[Tensor]:
    """The terms of a mean over the modalities that each sample has: they add up to it, and the others' are zero.

    Args:
        vectors: one (batch, ...) for each modality.
        parts: their tokens, which know who is present.
    """
    present = torch.stack([part.present() for part in parts])
    shape = (-1, *[1] * (vectors[0].ndim - 1))
    # Divided by a whole number, and not multiplied by its inverse, which half precision would round.
    count = present.sum(dim=0).clamp(min=1).view(shape)
    return [v.masked_fill(~here.view(shape), 0.0) / count for v, here in zip(vectors, present, strict=True)]


def ranks(part: Tokens) -> Int[Tensor, "batch token"]:
    """The number of each token among the valid ones, from 1 on; padding does not count. (1, token) without a mask."""
    if part.mask is None:
        return torch.arange(1, len(part) + 1, device=part.values.device)[None]
    return part.mask.cumsum(dim=1)


def last_valid(part: Tokens) -> Float[Tensor, "batch dim"]:
    """The last valid token of every sample; zeros where it has none."""
    if len(part) == 0:
        return part.values.new_zeros(part.values.shape[0], part.dim)
    if part.mask is None:
        return part.values[:, -1]
    place = (part.mask * torch.arange(len(part), device=part.values.device)).argmax(dim=1)
    last = part.values.gather(1, place[:, None, None].expand(-1, 1, part.dim))[:, 0]
    return last.masked_fill(~part.present()[:, None], 0.0)


def equal_lengths(parts: Sequence[Tokens]) -> list[Tokens]:
    """Every sequence at the length of its sample's longest, by linear interpolation between valid tokens.

    First and last token stay what they are. A modality that a sample lacks is zeros with a mask of False.

    Example:
        >>> short, long = Tokens(torch.tensor([[[0.0], [4.0]]])), Tokens(torch.zeros(1, 5, 1))
        >>> equal_lengths([short, long])[0].values.flatten()
        tensor([0., 1., 2., 3., 4.])
    """
    length = max(len(part) for part in parts)
    if all(part.mask is None and len(part) == length for part in parts):
        return list(parts)
    counts = [part.valid().sum(dim=1) for part in parts]
    longest = torch.stack(counts).amax(dim=0)
    whole = all(part.mask is None and len(part) > 0 for part in parts)
    made = []
    for part, count in zip(parts, counts, strict=True):
        inside = torch.arange(length, device=longest.device) < longest[:, None]
        mask = None if whole else inside & (count > 0)[:, None]
        values = _interpolated(part, count, longest, length)
        made.append(Tokens(values if mask is None else values.masked_fill(~mask[..., None], 0.0), mask=mask))
    return made


def _interpolated(part: Tokens, count: Tensor, longest: Tensor, length: int) -> Tensor:
    """Place t of the longest sequence is place t (count - 1) / (longest - 1) of this one."""
    if len(part) == 0:
        return part.values.new_zeros(part.values.shape[0], length, part.dim)
    values = part.values
    if part.mask is not None:
        # A stable sort brings the valid tokens to the front and keeps their order.
        order = torch.argsort(~part.mask, dim=1, stable=True)
        values = values.gather(1, order[..., None].expand_as(values))
    last, steps = (count - 1).clamp(min=0)[:, None], (longest - 1).clamp(min=1)[:, None]
    # In whole numbers, so that a token which is not moved stays exactly what it is.
    place = torch.arange(length, device=values.device) * last
    low = (place // steps).minimum(last)
    high = (low + 1).minimum(last)
    weight = ((place % steps) / steps).to(values.dtype)[..., None]
    at_low, at_high = (values.gather(1, at[..., None].expand(-1, -1, part.dim)) for at in (low, high))
    return at_low + weight * (at_high - at_low)
