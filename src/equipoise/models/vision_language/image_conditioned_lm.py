"""A picture encoder, a connector and a small causal language model: pictures and words in, words out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...alignment import GatedCrossAttention
from ...alignment.connectors.media_splice import splice
from ...alignment.losses.image_text_matching import IGNORED
from ...errors import ConfigError, ShapeError
from ...tokens.token_batch import as_tokens
from . import vlm_connectors
from .llama_blocks import cross_attending_blocks, small_llama


@dataclass(frozen=True, eq=False)
class InputSequence:
    """What the language model reads.

    Attributes:
        embeddings: (batch, token, dim).
        labels: (batch, token) what is to be predicted, -100 = nothing.
        modality: (batch, token) 0 = text, 1 = picture, -1 = padding.
        media, media_at: for gates: (batch, patch, width), and where the text names them; None without gates.
    """

    embeddings: Float[Tensor, "batch token dim"]
    labels: Int[Tensor, "batch token"]
    modality: Int[Tensor, "batch token"]
    media: Float[Tensor, "batch patch width"] | None = None
    media_at: Bool[Tensor, "batch token"] | None = None


class ImageConditionedLM(nn.Module):
    """Reads pictures and words, and writes words.

    The picture's patches, without the encoder's class token, go through the connector and stand in the text where it
    has ``<image>`` (LLaVA), or are read by gated cross-attention in front of every block (Flamingo).

    Arguments and errors are those of ``VisionLanguageModel``, which adds the losses.
    """

    def __init__(
        self, encoder: nn.Module, words: Sequence[str], *, connector: str = "mlp", dim: int = 64, depth: int = 3,
        heads: int = 4, latents: int = 16, context: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        self.names, self.words, self.context, self.kind = ("image", "text"), tuple(words), context, connector
        self.ids = {word: number for number, word in enumerate(self.words)}
        self.encoder = encoder
        width: int = encoder.dim  # type: ignore[assignment]
        self.connector = vlm_connectors.build_connector(connector, width, dim, latents=latents, heads=heads)
        self.language = small_llama(len(self.words), dim=dim, depth=depth, heads=heads, context=context)
        gates = depth if connector == "gated" else 0
        self.gates = nn.ModuleList(GatedCrossAttention(dim, width, heads=heads) for _ in range(gates))

    def patches(self, image: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch patch width"]:
        """The picture's tokens, without the class token."""
        tokens = as_tokens(self.encoder(image), "language image")
        return tokens.values[:, 1:] if tokens.cls else tokens.values

    def stream(
        self, patches: Float[Tensor, "batch patch width"], text: Int[Tensor, "batch word"],
        labels: Int[Tensor, "batch word"] | None = None,
    ) -> InputSequence:  # fmt: skip
        """Words and picture in one sequence, or words beside what they read.

        Args:
            patches: as the method of that name gives them.
            text: (batch, word) ids with one "<image>" each.
            labels: (batch, word) aligned with the text; by default nothing is predicted.
        """
        self._check(patches, text)
        labels = torch.full_like(text, IGNORED) if labels is None else labels
        embedded = self.language.get_input_embeddings()(text)
        if len(self.gates):
            modality = torch.zeros_like(text)
            return InputSequence(embedded, labels, modality, patches, text == self.ids["<image>"])
        joined = splice(embedded, text, self.ids["<image>"], self.connector(patches), labels=labels)
        if joined.embeddings.shape[1] > self.context:
            raise self._too_long(joined.embeddings.shape[1])
        return InputSequence(joined.embeddings, joined.labels, joined.modality)

    def logits(self, stream: InputSequence) -> Float[Tensor, "batch token word"]:
        """What comes next, at every token. Padding follows the words, so that causality alone keeps it unread."""
        reads = nullcontext()
        if stream.media is not None and stream.media_at is not None:
            reads = cross_attending_blocks(self.language.model.layers, list(self.gates), stream.media, stream.media_at)  # type: ignore[arg-type]
        with reads:
            return self.language(inputs_embeds=stream.embeddings).logits

    def answer(self, batch: Mapping[str, Tensor]) -> Int[Tensor, " batch"]:
        """The word that the model says behind each question.

        Args:
            batch: "image", "text" and, where the text goes on behind the question, "labels".
        """
        text, patches = select_samples(batch, "text"), self.patches(select_samples(batch, "image"))
        labels = batch.get("labels")
        self._check(patches, text)
        if labels is None:
            last = (text != self.ids["<pad>"]).sum(dim=1) - 1
        else:
            last = (labels != IGNORED).int().argmax(dim=1) - 1
        # The picture may stand for several tokens: the question's last word is found again by a label of its own.
        marked = torch.full_like(text, IGNORED).scatter(1, last[:, None], 0)
        stream = self.stream(patches, text, marked)
        place = (stream.labels != IGNORED).int().argmax(dim=1)
        return self.logits(stream)[torch.arange(len(text)), place].argmax(dim=-1)

    def caption(self, batch: Mapping[str, Tensor], *, longest: int = 12) -> Int[Tensor, "batch word"]:
        """What the model says about each picture, word by word, always the likeliest; padding behind the end."""
        patches = self.patches(select_samples(batch, "image"))
        prompt = torch.tensor([self.ids["<image>"], self.ids["describe"]], device=patches.device)
        text = prompt.expand(len(patches), -1)
        over = torch.zeros(len(patches), dtype=torch.bool, device=patches.device)
        for _ in range(longest):
            likely = self.logits(self.stream(patches, text))[:, -1]
            # A second picture there is none to stand for.
            likely[:, self.ids["<image>"]] = -torch.inf
            word = likely.argmax(dim=-1).masked_fill(over, self.ids["<pad>"])
            text, over = torch.cat([text, word[:, None]], dim=1), over | (word == self.ids["<end>"])
            if bool(over.all()):
                break
        return text[:, 2:]

    def _check(self, patches: Tensor, text: Tensor) -> None:
        if text.ndim != 2 or len(text) != len(patches):
            raise ShapeError(
                "language text", expected=f"ids (batch, word), batch = {len(patches)}", got=f"shape {tuple(text.shape)}"
            )
        if text.shape[1] > self.context:
            raise self._too_long(text.shape[1])
        if not bool(((text == self.ids["<image>"]).sum(dim=1) == 1).all()):
            raise ShapeError(
                "language text", expected="one <image> in every text",
                got=f"{(text == self.ids['<image>']).sum(dim=1).tolist()}",
                fix="Put <image> where the picture stands; a text without picture has to be taken out of the batch.",
            )  # fmt: skip

        if not bool(((text != self.ids["<pad>"]).sum(dim=1) > 1).all()):
            raise ShapeError(
                "language text", expected="at least one word beside <image>",
                got=f"texts of {(text != self.ids['<pad>']).sum(dim=1).tolist()} ids",
            )  # fmt: skip

    def _too_long(self, length: int) -> ShapeError:
        return ShapeError(
            "language text", expected=f"at most context = {self.context} tokens, those of the picture included",
            got=f"{length}", fix="Shorten the text, or build the model with a longer context.",
        )  # fmt: skip


def select_samples(batch: Mapping[str, Tensor], name: str) -> Tensor:
    """What a batch has under a name.

    Raises:
        ConfigError: nothing.
    """
    if batch.get(name) is None:
        raise ConfigError("VisionLanguageModel", expected=f"'{name}' in the batch", got=f"{sorted(batch)}")
    return batch[name]
