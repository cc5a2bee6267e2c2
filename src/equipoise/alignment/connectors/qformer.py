"""Q-Former (BLIP-2): learned queries that attend to media, in one transformer with the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError, unknown_name
from ...nn.gradient_checkpointing import CheckpointedLayer
from ...nn.transformer import Attention, feed_forward
from ...tokens.masks import bool_mask
from ...tokens.token_batch import Tokens, pack
from .cross_width_attention import CrossWidthAttention, Media, named_media

Objective = Literal["contrastive", "matching", "captioning"]
OBJECTIVES = ("contrastive", "matching", "captioning")
JOINED = "all"
"""Name of the concatenation of all modalities."""


class QFormerOutput(NamedTuple):
    """Output of a Q-Former.

    Attributes:
        queries: (batch, query, dim) output of the queries.
        text: (batch, word, dim); None without text.
    """

    queries: Float[Tensor, "batch query dim"]
    text: Float[Tensor, "batch word dim"] | None


def objective_mask(
    objective: Objective, queries: int, words: Bool[Tensor, "batch word"]
) -> Bool[Tensor, "batch token token"]:
    """Attention mask over [queries ; words]; rows are queries of the attention, columns keys.

    ::

                      query->query  query->word  word->query  word->word
        contrastive   yes           no           no           yes
        matching      yes           yes          yes          yes
        captioning    yes           no           yes          causal

    Args:
        objective: "contrastive", "matching" or "captioning".
        queries: number of queries.
        words: (batch, word), False = padding, which is masked as a key.

    Raises:
        ConfigError: an unknown objective.

    Reference: BLIP-2 (ICML 2023), Figure 2.

    Example:
        >>> objective_mask("captioning", 1, torch.ones(1, 2, dtype=torch.bool)).int()
        tensor([[[1, 0, 0],
                 [1, 1, 0],
                 [1, 1, 1]]], dtype=torch.int32)
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective_mask", "objective", str(objective), OBJECTIVES)
    batch, length = words.shape
    mask = torch.ones(batch, queries + length, queries + length, dtype=torch.bool, device=words.device)
    mask[:, :, queries:] = words[:, None]
    if objective != "matching":
        mask[:, :queries, queries:] = False
    if objective == "contrastive":
        mask[:, queries:, :queries] = False
    if objective == "captioning":
        mask[:, queries:, queries:] &= torch.ones(length, length, dtype=torch.bool, device=words.device).tril()
    return mask


class QFormer(nn.Module):
    """Learned queries that attend to frozen media, in one transformer with the text (BLIP-2).

    Each layer: ``z <- LN(z + attention(z))`` over [queries ; words]; in every ``every``-th layer, starting with the
    first, ``q <- LN(q + attention(q, media))`` for the queries only; then ``z <- LN(z + FFN(z))`` with separate FFNs
    for queries and words. A LayerNorm is applied to the media first. With several modalities, either each has its own
    cross-attention and the results are added, or their tokens are projected to one width and concatenated, so that one
    attention distribution covers all modalities and ``watch`` measures their shares.

    Args:
        widths: width of the media's tokens, or name -> width.
        dim: width of queries and words; 768 in BLIP-2.
        depth: number of layers.
        heads: number of attention heads.
        queries: number of learned queries.
        every: layers 0, every, 2 every, ... have cross-attention to the media.
        ratio: hidden width of the FFNs divided by ``dim``.
        vocabulary: vocabulary size; None builds a Q-Former without text.
        positions: maximum number of words.
        combine: ``"sum"`` (one cross-attention per modality) or ``"concat"`` (one for all).
        dropout: dropout probability.

    Raises:
        ConfigError: options out of range, or text for a Q-Former without vocabulary. ShapeError: media or ids that do
            not match, a text that is too long.

    Reference: Li et al., BLIP-2 (ICML 2023), section 3.
    Differs from the released code in: any number of modalities; a missing modality contributes nothing; random
    initialization instead of BERT's weights.

    Example:
        >>> qformer = QFormer(5, dim=8, depth=2, heads=2, queries=3, vocabulary=11)
        >>> output = qformer(torch.zeros(2, 7, 5), torch.ones(2, 4, dtype=torch.long), objective="matching")
        >>> output.queries.shape, output.text.shape
        (torch.Size([2, 3, 8]), torch.Size([2, 4, 8]))
    """

    def __init__(
        self, widths: int | Mapping[str, int], *, dim: int = 768, depth: int = 12, heads: int = 12, queries: int = 32,
        every: int = 2, ratio: float = 4.0, vocabulary: int | None = 30522, positions: int = 512,
        combine: Literal["sum", "concat"] = "sum", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(depth, queries, every) < 1:
            raise ConfigError(
                "QFormer", expected="depth, queries and every >= 1", got=f"{depth}, {queries} and {every}"
            )  # fmt: skip
        if combine not in ("sum", "concat"):
            raise unknown_name("QFormer", "way to combine", str(combine), ("sum", "concat"))
        self.dim, self.widths = dim, {"image": widths} if isinstance(widths, int) else dict(widths)
        if not self.widths:
            raise ConfigError("QFormer", expected="at least one modality", got="none")
        self.names = tuple(self.widths)
        self.queries = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.media_norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in self.widths.items()})
        # Concatenated modalities need a common width.
        joined = combine == "concat"
        self.to_dim = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in self.widths.items() if joined})
        source_widths = {JOINED: dim} if joined else self.widths
        self.words = None if vocabulary is None else nn.Embedding(vocabulary, dim)
        self.positions = None if vocabulary is None else nn.Embedding(positions, dim)
        for table in (self.words, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(dim, heads, source_widths if i % every == 0 else {}, ratio, dropout, vocabulary is not None)
            for i in range(depth)
        )
        for part in self.modules():
            if isinstance(part, CrossWidthAttention) and joined:
                part.names = self.names

    def forward(
        self,
        media: Media,
        input_ids: Int[Tensor, "batch word"] | None = None,
        *,
        mask: Bool[Tensor, "batch word"] | None = None,
        objective: Objective = "contrastive",
    ) -> QFormerOutput:
        """Encodes media and, optionally, text.

        Args:
            media: (batch, token, width) or Tokens, or a dict of these for several modalities.
            input_ids: (batch, word).
            mask: (batch, word), False = padding.
            objective: selects the mask between queries and words, see ``objective_mask``; with "contrastive" the result
                equals that of two separate passes.
        """
        parts = named_media(media, self.widths, "QFormer")
        for name, part in parts.items():
            values = self.media_norms[name](part.values)
            parts[name] = Tokens(self.to_dim[name](values) if self.to_dim else values, mask=part.mask)
        if self.to_dim:
            parts = {JOINED: pack(parts)}
        batch = len(next(iter(parts.values())).values)
        count = self.queries.shape[1]
        hidden, attention_mask = self.queries.expand(batch, -1, -1), None
        if input_ids is not None:
            if mask is None:
                mask = torch.ones_like(input_ids, dtype=torch.bool)
            else:
                expected = f"a boolean mask (batch, word) = {tuple(input_ids.shape)}"
                bool_mask(mask, "QFormer mask", expected, shape=input_ids.shape)
                input_ids = input_ids.masked_fill(~mask, 0)
            words = self._embed_words(input_ids, batch)
            hidden, attention_mask = torch.cat([hidden, words], dim=1), objective_mask(objective, count, mask)
        hidden = self.dropout(self.norm(hidden))
        for layer in self.layers:
            hidden = layer(hidden, count, parts, attention_mask)
        return QFormerOutput(hidden[:, :count], None if input_ids is None else hidden[:, count:])

    @property
    def word_vectors(self) -> Float[Tensor, "vocabulary dim"]:
        """The word embeddings, also used as output weights for captioning."""
        if self.words is None:
            raise ConfigError("QFormer", expected="a vocabulary, for text", got="vocabulary=None")
        return self.words.weight

    def _embed_words(self, input_ids: Tensor, batch: int) -> Tensor:
        if self.words is None or self.positions is None:
            raise ConfigError("QFormer", expected="no text, since vocabulary=None", got="input_ids")
        if input_ids.ndim != 2 or len(input_ids) != batch or input_ids.shape[1] > self.positions.num_embeddings:
            raise ShapeError(
                "QFormer input_ids",
                expected=f"(batch, word) = ({batch}, at most {self.positions.num_embeddings})",
                got=f"{tuple(input_ids.shape)}", fix="Pass one row of media for each text: media[pairs.a].",
            )  # fmt: skip
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.words(input_ids) + self.positions(position)


class QFormerLayer(CheckpointedLayer):
    """A layer: self-attention over [queries ; words], cross-attention of the queries, separate FFNs.

    Args:
        dim: model width.
        heads: number of attention heads.
        widths: name -> width of the media; empty for layers without cross-attention.
        ratio: hidden width divided by ``dim``.
        dropout: dropout probability.
        text: whether there are words.
    """

    def __init__(
        self, dim: int, heads: int, widths: Mapping[str, int], ratio: float, dropout: float, text: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention, self.norm = Attention(dim, heads, dropout=dropout), nn.LayerNorm(dim, eps=1e-12)
        cross_attention = {
            name: CrossWidthAttention(dim, width, heads=heads, dropout=dropout) for name, width in widths.items()
        }
        self.reading, self.reading_norm = (
            nn.ModuleDict(cross_attention),
            nn.LayerNorm(dim, eps=1e-12) if widths else None,
        )
        self.query_ffn = FeedForward(dim, ratio, dropout)
        self.text_ffn = FeedForward(dim, ratio, dropout) if text else None
        if self.text_ffn is not None:
            self.query_ffn.load_state_dict(self.text_ffn.state_dict())

    def forward(
        self, hidden: Float[Tensor, "batch token dim"], count: int, media: Mapping[str, Tokens],
        mask: Bool[Tensor, "batch token token"] | None,
    ) -> Float[Tensor, "batch token dim"]:  # fmt: skip
        hidden = self.norm(hidden + self.attention(hidden, mask=mask, share=False).output)
        queries, words = hidden[:, :count], hidden[:, count:]
        if self.reading_norm is not None:
            updates = [self._attend(queries, layer, media[name]) for name, layer in self.reading.items()]
            queries = self.reading_norm(queries + torch.stack(updates).sum(dim=0))
        queries = self.query_ffn(queries)
        if self.text_ffn is None or words.shape[1] == 0:
            return queries
        return torch.cat([queries, self.text_ffn(words)], dim=1)

    def _attend(self, queries: Tensor, layer: nn.Module, part: Tokens) -> Tensor:
        output = layer(queries, part.values, mask=part.mask, modality=part.modality, share=False).output
        return output if part.mask is None else output.masked_fill(~part.present()[:, None, None], 0.0)


class FeedForward(nn.Module):
    """Residual MLP with post-normalization: norm(x + mlp(x)).

    Args:
        dim: model width.
        ratio: hidden width divided by ``dim``.
        dropout: dropout probability.
    """

    def __init__(self, dim: int, ratio: float, dropout: float) -> None:
        super().__init__()
        self.mlp = feed_forward(dim, ratio, dropout, nn.GELU)
        self.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        return self.norm(x + self.mlp(x))
