"""An image encoder, a connector and a small causal language model that generates text about images."""

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
    """Inputs of the language model.

    Attributes:
        embeddings: (batch, token, dim).
        labels: (batch, token) targets, -100 = ignored.
        modality: (batch, token) 0 = text, 1 = image, -1 = padding.
        media: (batch, patch, width) keys of the gated cross-attention; None without gates.
        media_at: (batch, token) True at "<image>"; None without gates.
    """

    embeddings: Float[Tensor, "batch token dim"]
    labels: Int[Tensor, "batch token"]
    modality: Int[Tensor, "batch token"]
    media: Float[Tensor, "batch patch width"] | None = None
    media_at: Bool[Tensor, "batch token"] | None = None


class ImageConditionedLM(nn.Module):
    """A causal language model conditioned on an image.

    The image's patches, without the encoder's class token, pass through the connector and replace ``<image>`` in the
    text (LLaVA), or gated cross-attention in front of every block attends to them (Flamingo).

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
        """Encodes images; returns the tokens without the class token."""
        tokens = as_tokens(self.encoder(image), "VisionLanguageModel image")
        return tokens.values[:, 1:] if tokens.cls else tokens.values

    def stream(
        self, patches: Float[Tensor, "batch patch width"], text: Int[Tensor, "batch word"],
        labels: Int[Tensor, "batch word"] | None = None,
    ) -> InputSequence:  # fmt: skip
        """Builds the input of the language model from patches and token ids.

        Args:
            patches: output of ``patches``.
            text: (batch, word) token ids with exactly one "<image>" each.
            labels: (batch, word) targets aligned with ``text``; all ignored by default.
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
        """Next-token logits at every token. No padding mask is needed: padding is at the end and attention causal."""
        gated = nullcontext()
        if stream.media is not None and stream.media_at is not None:
            gated = cross_attending_blocks(self.language.model.layers, list(self.gates), stream.media, stream.media_at)  # type: ignore[arg-type]
        with gated:
            return self.language(inputs_embeds=stream.embeddings).logits

    def answer(self, batch: Mapping[str, Tensor]) -> Int[Tensor, " batch"]:
        """Predicts the one-word answer to each question.

        Args:
            batch: "image", "text" and, if the text continues after the question, "labels".
        """
        text, patches = select_samples(batch, "text"), self.patches(select_samples(batch, "image"))
        labels = batch.get("labels")
        self._check(patches, text)
        if labels is None:
            last = (text != self.ids["<pad>"]).sum(dim=1) - 1
        else:
            last = (labels != IGNORED).int().argmax(dim=1) - 1
        # Splicing shifts positions: mark the question's last word with a label to find it again afterward.
        marked = torch.full_like(text, IGNORED).scatter(1, last[:, None], 0)
        stream = self.stream(patches, text, marked)
        position = (stream.labels != IGNORED).int().argmax(dim=1)
        return self.logits(stream)[torch.arange(len(text)), position].argmax(dim=-1)

    def caption(self, batch: Mapping[str, Tensor], *, longest: int = 12) -> Int[Tensor, "batch word"]:
        """Generates a caption for each image by greedy decoding; padded after "<end>"."""
        patches = self.patches(select_samples(batch, "image"))
        prompt = torch.tensor([self.ids["<image>"], self.ids["describe"]], device=patches.device)
        text = prompt.expand(len(patches), -1)
        finished = torch.zeros(len(patches), dtype=torch.bool, device=patches.device)
        for _ in range(longest):
            logits = self.logits(self.stream(patches, text))[:, -1]
            # Every text has exactly one image: never generate a second "<image>".
            logits[:, self.ids["<image>"]] = -torch.inf
            word = logits.argmax(dim=-1).masked_fill(finished, self.ids["<pad>"])
            text, finished = torch.cat([text, word[:, None]], dim=1), finished | (word == self.ids["<end>"])
            if bool(finished.all()):
                break
        return text[:, 2:]

    def _check(self, patches: Tensor, text: Tensor) -> None:
        if text.ndim != 2 or len(text) != len(patches):
            raise ShapeError(
                "VisionLanguageModel text", expected=f"ids (batch, word), batch = {len(patches)}",
                got=f"shape {tuple(text.shape)}",
            )  # fmt: skip
        if text.shape[1] > self.context:
            raise self._too_long(text.shape[1])
        if not bool(((text == self.ids["<image>"]).sum(dim=1) == 1).all()):
            raise ShapeError(
                "VisionLanguageModel text", expected="one <image> in every text",
                got=f"{(text == self.ids['<image>']).sum(dim=1).tolist()}",
                fix="Put <image> at the position of the image; remove texts without an image from the batch.",
            )  # fmt: skip
        if not bool(((text != self.ids["<pad>"]).sum(dim=1) > 1).all()):
            raise ShapeError(
                "VisionLanguageModel text", expected="at least one word besides <image>",
                got=f"texts of {(text != self.ids['<pad>']).sum(dim=1).tolist()} ids",
            )  # fmt: skip

    def _too_long(self, length: int) -> ShapeError:
        return ShapeError(
            "VisionLanguageModel text", expected=f"at most context = {self.context} tokens, including the image's",
            got=f"{length}", fix="Shorten the text, or build the model with a longer context.",
        )  # fmt: skip


def select_samples(batch: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns an entry of a batch.

    Raises:
        ConfigError: the batch has no such entry.
    """
    if batch.get(name) is None:
        raise ConfigError("VisionLanguageModel", expected=f"'{name}' in the batch", got=f"{sorted(batch)}")
    return batch[name]
