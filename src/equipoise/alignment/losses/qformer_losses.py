"""The three losses that train a Q-Former: contrastive, matching, captioning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError, ShapeError
from ...tokens.masks import full_precision
from ...tokens.token_batch import Tokens
from ..connectors.cross_width_attention import Media
from ..connectors.qformer import QFormer
from .contrastive import check_options, row_losses
from .gather import all_gather_with_grad, global_mean, rank_slices, sync_parameter_grad
from .hard_negatives import same_ids
from .image_text_matching import MatchingHead, caption_labels, captioning_loss, matching_loss, matching_pairs
from .pair_loss import exact


def query_similarity(
    queries: Float[Tensor, "medium query dim"], text: Float[Tensor, "text dim"]
) -> Float[Tensor, "medium text"]:  # fmt: skip
    """The largest cosine of a text and any of a medium's queries; vectors are normalized.

    Example:
        >>> query_similarity(torch.eye(2)[None], torch.tensor([[0.6, 0.8]]))
        tensor([[0.8000]])
    """
    with full_precision(queries):
        return torch.einsum("iqd,jd->ijq", exact(queries), exact(text)).amax(dim=-1)


class QFormerLosses(nn.Module):
    """Heads on a Q-Former, and the three losses of its first stage; their sum trains it.

    * contrastive: cross entropy in both directions of ``max_q cos(query_q(i), text(j)) / temperature`` over all pairs
      of all processes;
    * matching: each query classifies whether image and text belong together, for the pairs and hard negatives of this
      process's batch;
    * captioning: predicts the text token by token from the queries alone.

    Args:
        qformer: one with a vocabulary.
        embed: width of the common embedding space.
        temperature: initial temperature, which divides the logits.
        smoothing: label smoothing of the contrastive loss; 0.1 in BLIP-2.
        caption_smoothing: label smoothing of the captioning loss.
        bos: id that replaces the first token in captioning; None keeps it.

    Raises:
        ConfigError: a Q-Former without text, options out of range. ShapeError: as ``QFormer``; ids of another length.

    Reference: Li et al., BLIP-2 (ICML 2023), section 3.2.
    Differs from the released code in: captioning recomputes the queries instead of caching their keys, with the same
    result; negatives come from this process; the temperature is clamped to [0.001, 0.5], as in ALBEF.

    Example:
        >>> losses = QFormerLosses(QFormer(5, dim=8, depth=1, heads=2, queries=3, vocabulary=11), embed=4)
        >>> list(losses(torch.randn(2, 7, 5), torch.tensor([[1, 4, 5], [1, 6, 7]])))
        ['contrastive', 'matching', 'captioning']
    """

    def __init__(
        self, qformer: QFormer, *, embed: int = 256, temperature: float = 0.07, smoothing: float = 0.1,
        caption_smoothing: float = 0.0, bos: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0.001 <= temperature <= 0.5:
            raise ConfigError("QFormerLosses", expected="temperature in [0.001, 0.5]", got=f"{temperature}")
        check_options("QFormerLosses", smoothing, 0.0, None)
        check_options("QFormerLosses", caption_smoothing, 0.0, None)
        dim, words = qformer.dim, len(qformer.word_vectors)
        self.qformer, self.smoothing, self.caption_smoothing, self.bos = qformer, smoothing, caption_smoothing, bos
        self.query_embedding, self.text_embedding = nn.Linear(dim, embed), nn.Linear(dim, embed)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.matching = MatchingHead(dim)
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=1e-12))
        self.word_bias = nn.Parameter(torch.zeros(words))

    def forward(
        self,
        media: Media,
        input_ids: Int[Tensor, "batch word"],
        *,
        mask: Bool[Tensor, "batch word"] | None = None,
        ids: Int[Tensor, " batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Computes the three losses by name, in float32 or higher precision.

        Without negatives, as in a batch of one sample or of one id, "contrastive" and "matching" are 0 with gradient 0.
        Every text needs at least its class token.

        Args:
            media: as in ``QFormer``.
            input_ids: (batch, word), starting with a class token.
            mask: (batch, word), False = padding.
            ids: (batch,) equal for samples that are positives of each other; all different by default.
            generator: random generator for sampling negatives.
        """
        queries, text = self.embed(media, input_ids, mask=mask)
        slices = rank_slices(len(queries), queries.device)
        rows = slices.start + torch.arange(len(queries), device=queries.device)
        if ids is not None and ids.shape != rows.shape:
            raise ShapeError("QFormerLosses ids", expected=f"(batch,) = ({len(rows)},)", got=f"{tuple(ids.shape)}")
        ids = rows if ids is None else ids.to(rows.device)
        positives = same_ids(ids, all_gather_with_grad(ids, slices))
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        # Clone: a second forward pass before the backward pass would modify the parameter in place.
        temperature = sync_parameter_grad(self.temperature, slices).clone()
        to_text = query_similarity(queries, all_gather_with_grad(text, slices)) / temperature
        to_media = query_similarity(all_gather_with_grad(queries, slices), text).T / temperature
        both = [row_losses(z, positives, smoothing=self.smoothing)[0] for z in (to_text, to_media)]
        total = torch.stack(both).sum()
        part = total * len(slices.sizes) / (2 * max(sum(slices.sizes), 1))
        local_scores = to_text[:, slices.start : slices.start + len(rows)]
        pairs = matching_pairs(local_scores, same_ids(ids), generator=generator)
        match_logits = self.match(
            _rows(media, pairs.a), input_ids[pairs.b], mask=None if mask is None else mask[pairs.b]
        )
        labels = caption_labels(input_ids, mask)
        words = self.caption(media, input_ids, mask=mask)
        return {
            "contrastive": global_mean(part, slices),
            "matching": matching_loss(match_logits, pairs.label),
            "captioning": captioning_loss(words, labels, smoothing=self.caption_smoothing),
        }

    def embed(
        self, media: Media, input_ids: Int[Tensor, "batch word"], *, mask: Bool[Tensor, "batch word"] | None = None
    ) -> tuple[Float[Tensor, "batch query embed"], Float[Tensor, "batch embed"]]:
        """Unit vectors of the queries and of the text's first token, encoded independently of each other."""
        output = self.qformer(media, input_ids, mask=mask, objective="contrastive")
        queries, text = self.query_embedding(output.queries), self.text_embedding(output.text[:, 0])
        return F.normalize(exact(queries), dim=-1), F.normalize(exact(text), dim=-1)

    def match(
        self, media: Media, input_ids: Int[Tensor, "pair word"], *, mask: Bool[Tensor, "pair word"] | None = None
    ) -> Float[Tensor, "pair 2"]:
        """Matching logits (negative, positive) of each pair."""
        return self.matching(self.qformer(media, input_ids, mask=mask, objective="matching").queries)

    def caption(
        self, media: Media, input_ids: Int[Tensor, "batch word"], *, mask: Bool[Tensor, "batch word"] | None = None
    ) -> Float[Tensor, "batch word vocabulary"]:
        """Next-word logits at each word."""
        if self.bos is not None:
            input_ids = torch.cat([torch.full_like(input_ids[:, :1], self.bos), input_ids[:, 1:]], dim=1)
        output = self.qformer(media, input_ids, mask=mask, objective="captioning")
        return F.linear(self.transform(output.text), self.qformer.word_vectors, self.word_bias)


def _rows(media: Media, index: Int[Tensor, " pair"]) -> Media:
    if isinstance(media, Mapping):
        return {name: _rows(part, index) for name, part in media.items()}  # type: ignore[misc]
    if isinstance(media, Tokens):
        return Tokens(media.values[index], mask=None if media.mask is None else media.mask[index])
    return media[index]
