"""Operations on token streams shared by fusions: concatenation, labels, ranks, last tokens, resampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..tokens.token_batch import Output, Tokens, pack, segment_labels


def concatenate_streams(parts: Sequence[Tokens]) -> Tokens:
    """Concatenates several sequences, without the labels that ``pack`` adds."""
    masked = any(part.mask is not None for part in parts)
    return Tokens(
        torch.cat([part.values for part in parts], dim=1),
        mask=torch.cat([part.valid() for part in parts], dim=1) if masked else None,
    )


def labels_of(parts: Sequence[Tokens], numbers: Sequence[int]) -> Int[Tensor, " token"]:
    """Returns the label of every token of ``concatenate_streams(parts)``: one number per part, -1 for special tokens.

    Example:
        >>> labels_of([Tokens(torch.zeros(1, 2, 5)), Tokens(torch.zeros(1, 3, 5))], [1, -1])
        tensor([ 1,  1, -1, -1, -1])
    """
    device, lengths = parts[0].values.device, [len(part) for part in parts]
    repeats = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(torch.tensor(numbers, device=device), repeats, output_size=sum(lengths))


def pooled_by_cls(
    tokens: dict[str, Tokens], cls: Tensor, blocks: Iterable[nn.Module], norm: nn.Module, *, rows: int | None,
    biases: Sequence[Callable[[Tokens, Tokens], Tensor]] = (),
) -> Output:  # fmt: skip
    """Applies a stack of blocks to a class token and all tokens; the features are the output of the class token.

    Args:
        tokens: name -> Tokens, in order.
        cls: the class token.
        blocks: modules with the interface of ``Block``.
        norm: norm of the features.
        rows: number of rows that the last block computes, from the first token; None for all.
        biases: for each block but the last, what computes the bias of its attention from the packed tokens.
    """
    packed = pack(tokens, cls=cls)
    values, (*first, last) = packed.values, blocks
    labels = {"modality": segment_labels(packed.lengths or (), values.device), "num_modalities": len(tokens)}
    # Shares are computed for the pooling block only.
    for number, block in enumerate(first):
        bias = {"bias": biases[number](packed, packed)} if biases else {}
        values = block(values, mask=packed.mask, share=False, **labels, **bias).output
    attended = last(values, rows=rows, mask=packed.mask, **labels)
    share = attended.share[:, :, 0]
    return Output(features=norm(attended.output[:, 0]), share=share, tokens=tokens, names=tuple(tokens))


def mean_over_present(vectors: Sequence[Tensor], parts: Sequence[Tokens]) -> list[Tensor]:
    """Computes the terms of the mean over the modalities of each sample; the terms of missing modalities are zero.

    Args:
        vectors: one (batch, ...) per modality.
        parts: the tokens of each modality, which determine where it is present.
    """
    present = torch.stack([part.present() for part in parts])
    shape = (-1, *[1] * (vectors[0].ndim - 1))
    # Divide by the count; its inverse would be rounded in half precision.
    count = present.sum(dim=0).clamp(min=1).view(shape)
    return [v.masked_fill(~mask.view(shape), 0.0) / count for v, mask in zip(vectors, present, strict=True)]


def ranks(part: Tokens) -> Int[Tensor, "batch token"]:
    """Returns the rank of each token among the valid tokens, from 1; (1, token) without a mask."""
    if part.mask is None:
        return torch.arange(1, len(part) + 1, device=part.values.device)[None]
    return part.mask.cumsum(dim=1)


def last_valid(part: Tokens) -> Float[Tensor, "batch dim"]:
    """Returns the last valid token of each sample; zeros for samples without valid tokens."""
    if len(part) == 0:
        return part.values.new_zeros(part.values.shape[0], part.dim)
    if part.mask is None:
        return part.values[:, -1]
    position = (part.mask * torch.arange(len(part), device=part.values.device)).argmax(dim=1)
    last = part.values.gather(1, position[:, None, None].expand(-1, 1, part.dim))[:, 0]
    return last.masked_fill(~part.present()[:, None], 0.0)


def equal_lengths(parts: Sequence[Tokens]) -> list[Tokens]:
    """Resamples each sequence to the length of the longest one of its sample, by linear interpolation of valid tokens.

    The first and last token are unchanged. Missing modalities become zeros with a mask of False.

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
    unmasked = all(part.mask is None and len(part) > 0 for part in parts)
    resampled = []
    for part, count in zip(parts, counts, strict=True):
        inside = torch.arange(length, device=longest.device) < longest[:, None]
        mask = None if unmasked else inside & (count > 0)[:, None]
        values = _interpolated(part, count, longest, length)
        resampled.append(Tokens(values if mask is None else values.masked_fill(~mask[..., None], 0.0), mask=mask))
    return resampled


def _interpolated(part: Tokens, count: Tensor, longest: Tensor, length: int) -> Tensor:
    """Interpolates position t of the longest sequence at position t (count - 1) / (longest - 1) of this one."""
    if len(part) == 0:
        return part.values.new_zeros(part.values.shape[0], length, part.dim)
    values = part.values
    if part.mask is not None:
        # A stable sort brings the valid tokens to the front and keeps their order.
        order = torch.argsort(~part.mask, dim=1, stable=True)
        values = values.gather(1, order[..., None].expand_as(values))
    last, steps = (count - 1).clamp(min=0)[:, None], (longest - 1).clamp(min=1)[:, None]
    # Integer arithmetic, so that tokens at unchanged positions keep their exact values.
    position = torch.arange(length, device=values.device) * last
    low = (position // steps).minimum(last)
    high = (low + 1).minimum(last)
    weight = ((position % steps) / steps).to(values.dtype)[..., None]
    at_low, at_high = (values.gather(1, at[..., None].expand(-1, -1, part.dim)) for at in (low, high))
    return at_low + weight * (at_high - at_low)
