"""What the inputs of one pass of a Hugging Face model say of its tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from .attention_call import MASKED

PLACES = re.compile(r"(image|video|audio)s?_(embeds_|input_|seq_|position_)*mask")
"""Inputs that are true where a token stands for something other than text."""


class ForwardInputs(NamedTuple):
    """Attributes:
    shape: (batch, token) of what is new in this pass; None where nothing tells it.
    ids: (batch, token) words; None where they were replaced by their vectors.
    past: tokens that the cache holds already.
    static: whether the cache has room for more tokens than it holds.
    types: (batch, token) numbers as ``mm_token_type_ids`` has them.
    places: modality -> (batch, token) True where a token is of it.
    valid: (batch, token) False for padding.
    answer: (batch, token) True for the queries whose next token is to be learned.
    text: tokens at the end that ``generate`` added to the prompt.
    generates: whether it is a pass of ``generate``, which may repeat samples.
    partial: whether ``generate`` reads a part of the prompt.
    """

    shape: tuple[int, int] | None = None
    ids: Int[Tensor, "batch token"] | None = None
    past: int = 0
    static: bool = False
    types: Int[Tensor, "batch token"] | None = None
    places: Mapping[str, Bool[Tensor, "batch token"]] = {}
    valid: Bool[Tensor, "batch token"] | None = None
    answer: Bool[Tensor, "batch token"] | None = None
    text: int = 0
    generates: bool = False
    partial: bool = False


def bind_arguments(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(part).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def read_forward_inputs(given: dict[str, Any], *, embedded: Tensor | None = None) -> ForwardInputs:
    """What a decoder, or an encoder alone, is given.

    Args:
        given: its arguments by name.
        embedded: the words that were turned into vectors last, for a pass that is given vectors alone.
    """
    ids, vectors = given.get("input_ids"), given.get("inputs_embeds")
    if ids is None and isinstance(vectors, Tensor) and embedded is not None:
        beams, rest = divmod(len(vectors), max(len(embedded), 1))
        if beams and not rest and embedded.shape[1] == vectors.shape[1]:
            ids = embedded.repeat_interleave(beams, dim=0)
    return _of(given, ids, vectors, "attention_mask", shifted=True)


def read_decoder_inputs(given: dict[str, Any]) -> ForwardInputs:
    """What the decoder of an encoder-decoder is given."""
    ids, vectors = given.get("decoder_input_ids"), given.get("decoder_inputs_embeds")
    if ids is None and vectors is None:
        # Shifted labels, or for some models the encoder's own words, are what the decoder reads.
        ids = given.get("labels") if given.get("labels") is not None else given.get("input_ids")
    return _of(given, ids, vectors, "decoder_attention_mask", shifted=False)


def _of(given: dict[str, Any], ids: Any, vectors: Any, mask: str, *, shifted: bool) -> ForwardInputs:
    seen = ids if ids is not None else vectors
    if not isinstance(seen, Tensor) or seen.ndim < 2:
        return ForwardInputs()
    shape = (seen.shape[0], seen.shape[1])
    cache = given.get("cache", given.get("past_key_values"))
    past = _past(cache)
    types = given.get("mm_token_type_ids")
    return ForwardInputs(
        shape, ids if ids is not None and ids.ndim == 2 else None, past, _is_static(cache),
        types if isinstance(types, Tensor) and types.shape == shape else None, _places(given, shape),
        _valid(given.get(mask), shape, past), _answer(given.get("labels"), shape, shifted),
    )  # fmt: skip


def _places(given: dict[str, Any], shape: tuple[int, int]) -> dict[str, Tensor]:
    found = ((PLACES.fullmatch(name), value) for name, value in given.items())
    return {
        name[1]: value.bool() for name, value in found if name and isinstance(value, Tensor) and value.shape == shape
    }


def _past(cache: Any) -> int:
    """Tokens that a cache holds already."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):
        return int(cache[0][0].shape[-2]) if len(cache) and cache[0] is not None else 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, IndexError):
        return 0


def _is_static(cache: Any) -> bool:
    return bool(getattr(cache, "is_compileable", False)) or "Static" in type(cache).__name__


def _valid(mask: Any, shape: tuple[int, int], past: int) -> Tensor | None:
    """By a mask (batch, key), or by whether a token sees itself in one written out: (batch, 1, query, key)."""
    batch, rows = shape
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if type(mask).__name__ == "BlockMask":
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, batch, 1, rows, past + rows, device=mask.kv_num_blocks.device)
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, batch):
        return None
    if mask.ndim == 2:
        return mask[:, -rows:].bool().expand(batch, -1) if mask.shape[1] >= rows else None
    if mask.ndim != 4 or mask.shape[2] != rows or mask.shape[3] < past + rows:
        return None
    own = torch.arange(rows, device=mask.device)
    own = mask[:, 0, own, past + own]
    return (own if own.dtype == torch.bool else own > MASKED).expand(batch, -1)


def _answer(labels: Any, shape: tuple[int, int], shifted: bool) -> Tensor | None:
    if not isinstance(labels, Tensor) or labels.shape != shape:
        return None
    learned = labels != -100
    if not shifted:
        return learned
    return F.pad(learned[:, 1:], (0, 1), value=False) if shape[1] > 1 else None
