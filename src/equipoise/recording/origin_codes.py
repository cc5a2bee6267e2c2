"""Codes of the inputs that elements of tensors come from, and how functions combine them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int8
from torch import Tensor

NEUTRAL, MIXED, QUERY, READER = 0, 127, 64, 126
"""Codes of elements: ``NEUTRAL`` for elements that depend on no input, such as parameters; ``MIXED`` for several inputs
at once; ``QUERY`` plus the code of an input for a learned query that has attended to this input only; ``READER`` for a
learned query that has attended to several inputs."""


def by_key(codes: Int8[Tensor, "batch head key width"]) -> Int8[Tensor, "batch key"]:
    """Reduces codes to one for each key, over heads and features."""
    return reduce_codes(reduce_codes(codes, -1), 1)[:, 0, :, 0]


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def full_codes(tensor: Tensor, code: int) -> Tensor:
    return torch.full((1,) * tensor.ndim, code, dtype=torch.int8, device=tensor.device).expand(tensor.shape)


def coded_arguments(value: Any, book: Any) -> Any:
    if isinstance(value, Tensor):
        return codes if (codes := book.get(value)) is not None else full_codes(value, NEUTRAL)
    return [coded_arguments(part, book) for part in value] if isinstance(value, (list, tuple)) else value


def resolve_queries(coded: list[Any], positions: Sequence[int]) -> list[Any]:
    """Replaces the code of learned queries by that of their input when they are joined with another input."""
    total = summarize_codes(*tensors_in([coded[p] for p in positions if p < len(coded)]))

    def resolve(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [resolve(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        queries = (value >= QUERY) & (value < READER) & (total == MIXED)
        return torch.where(
            without_expansion(queries), without_expansion(value) % QUERY, without_expansion(value)
        ).expand(value.shape)

    return [resolve(value) if p in positions else value for p, value in enumerate(coded)]


def without_expansion(codes: Tensor) -> Tensor:
    """Narrows expanded dimensions, along which all codes are equal, to size 1."""
    for dim, (size, stride) in enumerate(zip(codes.shape, codes.stride(), strict=True)):
        if stride == 0 and size > 1:
            codes = codes.narrow(dim, 0, 1)
    return codes


def merge_extremes(high: Tensor, low: Tensor) -> Tensor:
    """Merges the highest and the lowest non-neutral code (127 if there is none): the common code, or ``MIXED``."""
    low = torch.where(high == NEUTRAL, high, low)
    # Learned queries remain distinct from the positions that they attend to.
    other = torch.where((low >= QUERY) & (high != MIXED), READER, MIXED).to(torch.int8)
    return torch.where(high % QUERY == low % QUERY, low, other)


def codes_after_attention(rows: Tensor, keys: Tensor) -> Tensor:
    """Returns the codes of queries after attention: input positions keep theirs, learned queries get the keys'."""
    content = torch.where((keys == NEUTRAL) | (keys >= QUERY), keys, keys + QUERY).clamp(max=READER)
    other = torch.where((content == rows) | (content == NEUTRAL) | (rows == MIXED), rows, torch.full_like(rows, READER))
    return torch.where(rows == NEUTRAL, content, torch.where(rows < QUERY, rows, other))


def reduce_codes(codes: Tensor, dim: int) -> Tensor:
    """Reduces a dimension to one code, with ``keepdim``."""
    if codes.shape[dim] == 1:
        return codes
    if codes.stride(dim) == 0 and codes.shape[dim] > 0:
        return codes.narrow(dim, 0, 1)
    thin = without_expansion(codes)
    high = thin.amax(dim, keepdim=True)
    low = thin.masked_fill(thin == NEUTRAL, MIXED).amin(dim, keepdim=True)
    shape = [1 if d == dim % codes.ndim else size for d, size in enumerate(codes.shape)]
    return merge_extremes(high, low).expand(shape)


def summarize_codes(*codes: Tensor) -> Tensor:
    """Reduces tensors of codes to one code."""
    summary = torch.stack([merge_extremes(c.amax(), c.masked_fill(c == NEUTRAL, MIXED).amin()) if c.numel()
                         else c.new_zeros(()) for c in map(without_expansion, codes)])  # fmt: skip
    return merge_extremes(summary.amax(), summary.masked_fill(summary == NEUTRAL, MIXED).amin())


def align_codes(codes: Tensor, shape: Sequence[int]) -> Tensor:
    """Fits codes to a result of another shape; dimensions whose size differs are reduced to one code."""
    if codes.shape == tuple(shape):
        return codes
    if codes.ndim == len(shape):
        for dim, size in enumerate(shape):
            if codes.shape[dim] not in (1, size):
                codes = reduce_codes(codes, dim)
        return codes.expand(shape)
    if tuple(shape) == tuple(codes.shape[:-1]):
        return reduce_codes(codes, -1)[..., 0]
    try:
        return codes.expand(shape)
    except RuntimeError:
        return summarize_codes(codes).expand(shape)


def combine_codes(codes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    combined = without_expansion(align_codes(codes[0], shape))
    for more in codes[1:]:
        more = without_expansion(align_codes(more, shape))
        low, high = torch.minimum(combined, more), torch.maximum(combined, more)
        other = torch.where((low >= QUERY) & (high != MIXED), READER, MIXED).to(torch.int8)
        combined = torch.where(low == NEUTRAL, high, torch.where(low % QUERY == high % QUERY, low, other))
    return combined.expand(shape)


def explicit_equation(equation: str, *dims: int) -> str:
    """Replaces the ellipses of an einsum equation by letters."""
    inputs, output = equation.replace(" ", "").split("->")
    free = [letter for letter in "ZYXWVUTSRQ" if letter not in equation]
    names, most = [], 0
    for name, count in zip(inputs.split(","), dims, strict=True):
        if "..." in name:
            extra = count - len(name) + 3
            most = max(most, extra)
            name = name.replace("...", "".join(free[:extra][::-1]))
        names.append(name)
    return ",".join(names) + "->" + output.replace("...", "".join(free[:most][::-1]))


def codes_along_output(codes: Tensor, names: str, output: str) -> Tensor:
    """Returns the codes of an einsum operand along the dimensions of the result."""
    for dim, letter in enumerate(names):
        if letter not in output:
            codes = reduce_codes(codes, dim)
    remaining = [letter for letter in names if letter in output]
    for dim in reversed([d for d, letter in enumerate(names) if letter not in output]):
        codes = codes.squeeze(dim)
    codes = codes.permute([remaining.index(letter) for letter in output if letter in remaining])
    for dim, letter in enumerate(output):
        if letter not in remaining:
            codes = codes.unsqueeze(dim)
    return codes
