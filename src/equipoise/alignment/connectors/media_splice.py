"""Media among words: embeddings put where the text has placeholders, with labels that know whose token is whose."""

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
    """What a language model is given.

    Attributes:
        embeddings: (batch, token, dim); padding is 0.
        labels: (batch, token) ids to be predicted; -100 on media and padding.
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
        """The same as Tokens."""
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
    """Puts media at their placeholders.

    A placeholder stands for one whole medium, and the text grows; or there are as many placeholders as media tokens,
    and each is replaced, as processors of Hugging Face write them. Media are taken in reading order: all of the first
    row, then those of the second. Rows without placeholder are plain text.

    Args:
        text_embeddings: (batch, word, dim); what stands at placeholders is not read.
        input_ids: (batch, word).
        placeholder: the id, or name -> id for several kinds of media.
        tokens: (medium, token, dim) already of the language model's width, with a mask where they have different
            lengths; name -> these for several kinds. A single kind is called "image".
        labels: (batch, word) to be predicted, -100 = not; the ids by default.
        mask: (batch, word), False = padding, which is dropped here and made anew.
        side: where padding goes; ``"left"`` for generation.

    Returns:
        Spliced.

    Raises:
        ShapeError: sizes that do not fit; placeholders without media, or media without placeholder.
        ConfigError: names of placeholders and tokens that differ, an unknown side.

    Reference: LLaVA (NeurIPS 2023), section 4.1; spec 7.6.

    Example:
        >>> text, image = torch.zeros(1, 3, 2), torch.ones(1, 2, 2)
        >>> splice(text, torch.tensor([[7, 99, 8]]), 99, image).labels
        tensor([[   7, -100, -100,    8]])
    """
    ids, media = _named(placeholder, tokens)
    _check(text_embeddings, input_ids, labels, mask, side)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    lengths, places = valid.long(), {}
    for name, part in media.items():
        if part.dim != text_embeddings.shape[-1]:
            raise ShapeError(
                f"splice '{name}'", expected=f"the text's width, dim = {text_embeddings.shape[-1]}", got=f"{part.dim}",
                fix="Projector(in_dim, out_dim).splice projects them first.",
            )  # fmt: skip
        at = (input_ids == ids[name]) & valid
        counts = part.valid().sum(dim=1)
        places[name] = at, _runs(at, counts, name)
        lengths = lengths.masked_scatter(at, places[name][1])
    ends = lengths.cumsum(dim=1)
    longest = int(ends[:, -1].max()) if ends.numel() else 0
    shift = longest - ends[:, -1:] if side == "left" else 0
    starts = ends - lengths + shift
    is_text = valid & ~torch.stack([at for at, _ in places.values()]).any(dim=0)
    size = (len(input_ids), longest)
    embeddings = text_embeddings.new_zeros(*size, text_embeddings.shape[-1])
    made_labels = input_ids.new_full(size, IGNORED)
    modality = input_ids.new_full(size, SPECIAL)
    rows, words = is_text.nonzero(as_tuple=True)
    put = (rows, starts[rows, words])
    embeddings = embeddings.index_put(put, text_embeddings[rows, words])
    made_labels[put] = (input_ids if labels is None else labels)[rows, words]
    modality[put] = 0
    for number, (name, (at, run)) in enumerate(places.items(), start=1):
        rows = at.nonzero(as_tuple=True)[0].repeat_interleave(run)
        # The place inside its run: the number among all tokens of the kind, less those of earlier runs.
        inside = torch.arange(len(rows), device=rows.device) - (run.cumsum(0) - run).repeat_interleave(run)
        put = (rows, starts[at].repeat_interleave(run) + inside)
        embeddings = embeddings.index_put(put, media[name].values[media[name].valid()].to(embeddings.dtype))
        modality[put] = number
    return Spliced(embeddings, made_labels, modality, modality != SPECIAL, ("text", *media))


def _runs(at: Tensor, counts: Tensor, name: str) -> Int[Tensor, " placeholder"]:
    """How many tokens each placeholder becomes."""
    found, total = int(at.sum()), int(counts.sum())
    if found == len(counts):
        return counts
    if found == total:
        return counts.new_ones(found)
    raise ShapeError(
        f"splice '{name}'",
        expected=f"one placeholder for each of {len(counts)} media, or for each of their {total} tokens",
        got=f"{found} (in the rows: {at.sum(dim=1).tolist()})",
        fix="A text without its medium, or a medium that no text mentions, must be taken out of the batch.",
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
