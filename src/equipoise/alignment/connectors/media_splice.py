"""Inserts media embeddings at the placeholders of a text, with modality labels for all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError, ShapeError, unknown_name
from ...tokens.masks import bool_mask
from ...tokens.token_batch import SPECIAL, Tokens
from ..losses.image_text_matching import IGNORED

Side = Literal["right", "left"]


@dataclass(frozen=True, eq=False)
class Spliced:
    """Inputs of a language model after inserting media.

    Attributes:
        embeddings: (batch, token, dim); padding is 0.
        labels: (batch, token) target ids; -100 on media and padding.
        modality: (batch, token) 0 = text, 1, 2, ... = the media, -1 = padding; index into ``names``.
        mask: (batch, token) False = padding.
        names: ``("text", ...)``.
    """

    embeddings: Float[Tensor, "batch token dim"]
    labels: Int[Tensor, "batch token"]
    modality: Int[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]
    names: tuple[str, ...]

    @property
    def tokens(self) -> Tokens:
        """The embeddings with mask and labels as Tokens."""
        return Tokens(self.embeddings, mask=self.mask, modality=self.modality, names=self.names)


def splice(
    text_embeddings: Float[Tensor, "batch word dim"],
    input_ids: Int[Tensor, "batch word"],
    placeholder: int | Mapping[str, int],
    tokens: Tensor | Tokens | Mapping[str, Tensor | Tokens],
    *,
    labels: Int[Tensor, "batch word"] | None = None,
    mask: Bool[Tensor, "batch word"] | None = None,
    side: Side = "right",
) -> Spliced:
    """Inserts media at their placeholders.

    Either each placeholder is replaced by all tokens of one medium, which lengthens the text, or there is one
    placeholder per media token, as in the output of Hugging Face processors. Media are assigned in row-major order of
    the placeholders. Rows without a placeholder are plain text.

    Args:
        text_embeddings: (batch, word, dim); embeddings at placeholders are ignored.
        input_ids: (batch, word).
        placeholder: placeholder id, or name -> id for several kinds of media.
        tokens: (medium, token, dim) of the language model's width, Tokens with a mask for different lengths, or a
            dict of these for several kinds. A single kind is named "image".
        labels: (batch, word) targets, -100 = ignored; ``input_ids`` by default.
        mask: (batch, word), False = padding, which is removed and added again.
        side: side of the padding; ``"left"`` for generation.

    Returns:
        Spliced.

    Raises:
        ShapeError: sizes that do not match; placeholders without media, or media without placeholders.
        ConfigError: names of placeholders and tokens that differ, an unknown side.

    Reference: LLaVA (NeurIPS 2023), section 4.1.

    Example:
        >>> text, image = torch.zeros(1, 3, 2), torch.ones(1, 2, 2)
        >>> splice(text, torch.tensor([[7, 99, 8]]), 99, image).labels
        tensor([[   7, -100, -100,    8]])
    """
    ids, media = _named(placeholder, tokens)
    _check(text_embeddings, input_ids, labels, mask, side)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    lengths, placeholders = valid.long(), {}
    for name, part in media.items():
        if part.dim != text_embeddings.shape[-1]:
            raise ShapeError(
                f"splice '{name}'", expected=f"the text's width, dim = {text_embeddings.shape[-1]}", got=f"{part.dim}",
                fix="Use Projector(in_dim, out_dim).splice, which projects them first.",
            )  # fmt: skip
        at = (input_ids == ids[name]) & valid
        counts = part.valid().sum(dim=1)
        placeholders[name] = at, _run_lengths(at, counts, name)
        lengths = lengths.masked_scatter(at, placeholders[name][1])
    ends = lengths.cumsum(dim=1)
    longest = int(ends[:, -1].max()) if ends.numel() else 0
    shift = longest - ends[:, -1:] if side == "left" else 0
    starts = ends - lengths + shift
    is_text = valid & ~torch.stack([at for at, _ in placeholders.values()]).any(dim=0)
    size = (len(input_ids), longest)
    embeddings = text_embeddings.new_zeros(*size, text_embeddings.shape[-1])
    new_labels = input_ids.new_full(size, IGNORED)
    modality = input_ids.new_full(size, SPECIAL)
    rows, words = is_text.nonzero(as_tuple=True)
    target = (rows, starts[rows, words])
    embeddings = embeddings.index_put(target, text_embeddings[rows, words])
    new_labels[target] = (input_ids if labels is None else labels)[rows, words]
    modality[target] = 0
    for number, (name, (at, run)) in enumerate(placeholders.items(), start=1):
        rows = at.nonzero(as_tuple=True)[0].repeat_interleave(run)
        # Offset of each token in its medium: its index among all tokens of the kind minus those of earlier media.
        offset = torch.arange(len(rows), device=rows.device) - (run.cumsum(0) - run).repeat_interleave(run)
        target = (rows, starts[at].repeat_interleave(run) + offset)
        embeddings = embeddings.index_put(target, media[name].values[media[name].valid()].to(embeddings.dtype))
        modality[target] = number
    return Spliced(embeddings, new_labels, modality, modality != SPECIAL, ("text", *media))


def _run_lengths(at: Tensor, counts: Tensor, name: str) -> Int[Tensor, " placeholder"]:
    """Number of tokens that replace each placeholder."""
    num_placeholders, total = int(at.sum()), int(counts.sum())
    if num_placeholders == len(counts):
        return counts
    if num_placeholders == total:
        return counts.new_ones(num_placeholders)
    raise ShapeError(
        f"splice '{name}'",
        expected=f"one placeholder for each of {len(counts)} media, or for each of their {total} tokens",
        got=f"{num_placeholders} (per row: {at.sum(dim=1).tolist()})",
        fix="Remove texts without their medium, and media without a placeholder, from the batch.",
    )


def _named(
    placeholder: int | Mapping[str, int], tokens: Tensor | Tokens | Mapping[str, Tensor | Tokens]
) -> tuple[dict[str, int], dict[str, Tokens]]:
    if isinstance(tokens, Mapping) != isinstance(placeholder, Mapping):
        raise ConfigError(
            "splice", expected="placeholder and tokens both by name, or neither",
            got=f"{type(placeholder).__name__} and {type(tokens).__name__}",
        )  # fmt: skip
    ids: Mapping[str, int] = placeholder if isinstance(placeholder, Mapping) else {"image": placeholder}
    parts: Mapping[str, Tensor | Tokens] = tokens if isinstance(tokens, Mapping) else {"image": tokens}
    if not parts or "text" in parts:
        raise ConfigError("splice", expected="at least one kind of media, none called 'text'", got=f"{list(parts)}")
    for name in {*ids, *parts}:
        if name not in ids or name not in parts:
            raise unknown_name(
                "splice", "placeholder" if name in parts else "medium", name, ids if name in parts else parts
            )
    return dict(ids), {name: part if isinstance(part, Tokens) else Tokens(part) for name, part in parts.items()}


def _check(text: Tensor, input_ids: Tensor, labels: Tensor | None, mask: Tensor | None, side: str) -> None:
    if text.ndim != 3:
        raise ShapeError("splice text", expected="embeddings (batch, word, dim)", got=f"shape {tuple(text.shape)}")
    for name, part in (("input_ids", input_ids), ("labels", labels), ("mask", mask)):
        if part is not None and part.shape != text.shape[:2]:
            raise ShapeError(
                f"splice {name}", expected=f"(batch, word) = {tuple(text.shape[:2])}", got=f"{tuple(part.shape)}"
            )  # fmt: skip
    if mask is not None:
        bool_mask(mask, "splice mask", "dtype torch.bool", fix="Use mask.bool(), or mask == 0 of an additive one.")
    if side not in ("right", "left"):
        raise unknown_name("splice", "side", str(side), ("right", "left"))
