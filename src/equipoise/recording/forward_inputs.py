"""Token information in the inputs of one forward pass of a Hugging Face model."""

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

MEDIA_MASK = re.compile(r"(image|video|audio)s?_(embeds_|input_|seq_|position_)*mask")
"""Names of boolean inputs that mark the tokens of a modality other than text."""


class ForwardInputs(NamedTuple):
    """Attributes:
    shape: (batch, token) of the new tokens of this pass; None if unknown.
    ids: (batch, token) token ids; None if only embeddings are passed.
    past: number of tokens in the cache.
    static: whether the cache has a fixed size, with empty slots.
    types: (batch, token) ``mm_token_type_ids``.
    media_masks: modality -> (batch, token) True for its tokens.
    valid: (batch, token) False for padding.
    answer: (batch, token) True for the queries whose next token has a label.
    text: number of tokens at the end that ``generate`` added to the prompt.
    generates: whether it is a pass of ``generate``, which may repeat samples.
    partial: whether ``generate`` processes a chunk of the prompt.
    """

    shape: tuple[int, int] | None = None
    ids: Int[Tensor, "batch token"] | None = None
    past: int = 0
    static: bool = False
    types: Int[Tensor, "batch token"] | None = None
    media_masks: Mapping[str, Bool[Tensor, "batch token"]] = {}
    valid: Bool[Tensor, "batch token"] | None = None
    answer: Bool[Tensor, "batch token"] | None = None
    text: int = 0
    generates: bool = False
    partial: bool = False


def bind_arguments(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``forward`` by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(part).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def read_forward_inputs(arguments: dict[str, Any], *, embedded: Tensor | None = None) -> ForwardInputs:
    """Reads the inputs of a decoder, or of an encoder.

    Args:
        arguments: arguments by name.
        embedded: the token ids that were embedded last, for a pass with embeddings only.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if ids is None and isinstance(embeddings, Tensor) and embedded is not None:
        beams, rest = divmod(len(embeddings), max(len(embedded), 1))
        if beams and not rest and embedded.shape[1] == embeddings.shape[1]:
            ids = embedded.repeat_interleave(beams, dim=0)
    return _read_inputs(arguments, ids, embeddings, "attention_mask", shifted=True)


def read_decoder_inputs(arguments: dict[str, Any]) -> ForwardInputs:
    """Reads the inputs of the decoder of an encoder-decoder model."""
    ids, embeddings = arguments.get("decoder_input_ids"), arguments.get("decoder_inputs_embeds")
    if ids is None and embeddings is None:
        # The decoder then takes the shifted labels or, in some models, the encoder's token ids.
        ids = arguments.get("labels") if arguments.get("labels") is not None else arguments.get("input_ids")
    return _read_inputs(arguments, ids, embeddings, "decoder_attention_mask", shifted=False)


def _read_inputs(arguments: dict[str, Any], ids: Any, embeddings: Any, mask: str, *, shifted: bool) -> ForwardInputs:
    tokens = ids if ids is not None else embeddings
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return ForwardInputs()
    shape = (tokens.shape[0], tokens.shape[1])
    cache = arguments.get("cache", arguments.get("past_key_values"))
    past = _cache_length(cache)
    types = arguments.get("mm_token_type_ids")
    return ForwardInputs(
        shape, ids if ids is not None and ids.ndim == 2 else None, past, _is_static(cache),
        types if isinstance(types, Tensor) and types.shape == shape else None, _media_masks(arguments, shape),
        _valid_tokens(arguments.get(mask), shape, past), _answer_queries(arguments.get("labels"), shape, shifted),
    )  # fmt: skip


def _media_masks(arguments: dict[str, Any], shape: tuple[int, int]) -> dict[str, Tensor]:
    matches = ((MEDIA_MASK.fullmatch(name), value) for name, value in arguments.items())
    return {
        match[1]: value.bool()
        for match, value in matches
        if match and isinstance(value, Tensor) and value.shape == shape
    }


def _cache_length(cache: Any) -> int:
    """Returns the number of tokens in a cache."""
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


def _valid_tokens(mask: Any, shape: tuple[int, int], past: int) -> Tensor | None:
    """Returns (batch, token) False for padding.

    The mask is (batch, key), or (batch, 1, query, key), in which a token is valid if it attends to itself.
    """
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
    positions = torch.arange(rows, device=mask.device)
    diagonal = mask[:, 0, positions, past + positions]
    return (diagonal if diagonal.dtype == torch.bool else diagonal > MASKED).expand(batch, -1)


def _answer_queries(labels: Any, shape: tuple[int, int], shifted: bool) -> Tensor | None:
    """Returns (batch, token) True for the queries whose prediction has a label."""
    if not isinstance(labels, Tensor) or labels.shape != shape:
        return None
    labeled = labels != -100
    if not shifted:
        return labeled
    return F.pad(labeled[:, 1:], (0, 1), value=False) if shape[1] > 1 else None
