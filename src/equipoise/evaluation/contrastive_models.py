"""CLIP, SigLIP and BLIP-2 as a space of pictures and captions, and a data set as their processors give it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..alignment import retrieval, same_ids, similarities
from ..data.sets.emoji import Combinations, Emoji
from ..errors import ConfigError
from ..models.dual_encoder.dual_encoder_metrics import evaluate_dual_encoder

LONGEST = 64
"""Tokens of the longest caption, where a tokenizer names no limit of its own."""


class PretrainedDualEncoder(nn.Module):
    """A model of Hugging Face with two towers, asked as a ``DualEncoder`` is.

    Args:
        model: CLIP, SigLIP or another with ``get_image_features`` and ``get_text_features``; or BLIP-2 for retrieval,
            whose pictures have one vector for each query.
        padding: id that fills short captions up.
        attends: whether the text tower is told which tokens are padding; SigLIP was trained without.
        closes: whether the first padding is the end of the caption, as where CLIP has one token for both.

    Raises:
        ConfigError: a model without two towers.
    """

    names = ("image", "text")

    def __init__(self, model: Any, *, padding: int, attends: bool = True, closes: bool = False) -> None:
        super().__init__()
        if not (
            hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
        ) and not uses_late_interaction(model):
            raise ConfigError(
                "judge", expected="a model with a tower for pictures and one for words, such as CLIP, SigLIP or BLIP-2",
                got=type(model).__name__, fix="A model that writes is judged at the scenes: --data scenes.",
            )  # fmt: skip
        self.model, self.padding, self.attends, self.closes = model, padding, attends, closes

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "batch dim"]]:
        """name -> unit vectors (batch, dim) of the modalities that are there; BLIP-2's pictures: (batch, query, dim).

        Args:
            batch: "image": pixel values, "text": (batch, token) ids, as ``Shown`` has them.
        """
        found = {}
        if "image" in batch:
            found["image"] = F.normalize(self._pictures(batch["image"]).float(), dim=-1)
        if "text" in batch:
            ids = batch["text"]
            filled = (ids == self.padding).cumsum(dim=1)
            mask = {"attention_mask": (filled <= self.closes).long()} if self.attends else {}
            found["text"] = F.normalize(self._captions(ids, mask).float(), dim=-1)
        return found

    def _pictures(self, pixels: Tensor) -> Tensor:
        if not uses_late_interaction(self.model):
            return _pooled(self.model.get_image_features(pixel_values=pixels))
        model = self.model
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        queries = model.query_tokens.expand(len(pixels), -1, -1)
        read = model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        return model.vision_projection(read)

    def _captions(self, ids: Tensor, mask: dict[str, Tensor]) -> Tensor:
        if not uses_late_interaction(self.model):
            return _pooled(self.model.get_text_features(input_ids=ids, **mask))
        model = self.model
        read = model.qformer(query_embeds=model.embeddings(input_ids=ids), query_length=0, **mask)
        return model.text_projection(read.last_hidden_state[:, 0])


class ProcessedDataset:
    """The emoji as a processor gives them, in batches that ``space.figures`` reads.

    Args:
        source: the emoji.
        processor: of the model.
        template: what a caption is put into; ``"{}"`` leaves it as it is.
        fixed: captions are filled up to the tokenizer's limit, as SigLIP was trained.

    Raises:
        ConfigError: a template without ``{}``.
    """

    def __init__(self, source: Emoji, processor: Any, *, template: str = "{}", fixed: bool = False) -> None:
        if "{}" not in template:
            raise ConfigError("judge template", expected="a text with {}, where the caption stands", got=repr(template))
        self._source, self._processor, self._template = source, processor, template
        self._tokenizer = getattr(processor, "tokenizer", processor)
        limit = int(getattr(self._tokenizer, "model_max_length", LONGEST))
        self._limit = limit if 0 < limit <= 512 else LONGEST
        self._fixed = fixed
        self._place = {item: place for place, item in enumerate(source.items)}

    def split(self, name: str) -> SimpleNamespace:
        """With the targets of a split."""
        return SimpleNamespace(target=self._source.split(name).target)

    def batches(self, split: str, batch_size: int, **_: Any) -> Iterator[dict[str, Tensor]]:
        """All samples of a split, in order."""
        items = self._source.split_items(split)
        captions = self.encoded([item.name for item in items])
        target = self.split(split).target
        for start in range(0, len(items), batch_size):
            rows = slice(start, start + batch_size)
            pictures = [
                Image.fromarray(self._source.pictures[self._place[item]].numpy()).convert("RGB") for item in items[rows]
            ]
            pixels = self._processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            yield {"image": pixels, "text": captions[rows], "target": target[rows]}

    def encoded(self, texts: Sequence[str]) -> Tensor:
        """(text, token) ids, padded on the right and cut at the tokenizer's limit."""
        found = self._tokenizer(
            [self._template.replace("{}", text) for text in texts], padding="max_length" if self._fixed else True,
            truncation=True, max_length=self._limit, return_tensors="pt",
        )  # fmt: skip
        return found["input_ids"]

    def combinations(self, split: str) -> Combinations:
        """Those of the emoji, with their parts as ids of this tokenizer."""
        own = self._source.combinations(split)
        items = self._source.split_items(split)
        texts = [part for place in own.rows.tolist() for part in items[place].parts]
        ids = self.encoded(texts) if texts else torch.zeros(0, 1, dtype=torch.long)
        parts = torch.zeros(*own.present.shape, ids.shape[1], dtype=torch.long)
        parts[own.present] = ids
        return Combinations(own.rows, "text", parts, own.present)


def evaluate_contrastive(space: PretrainedDualEncoder, shown: ProcessedDataset, split: str) -> dict[str, float]:
    """The figures of ``space.figures.judged``; of BLIP-2, where a picture is as near as its nearest query, those of
    finding alone."""
    if not uses_late_interaction(space.model):
        return evaluate_dual_encoder(space, shown, split)
    place = next(space.parameters()).device
    parts = [space.embed({name: batch[name].to(place) for name in space.names}) for batch in shown.batches(split, 64)]
    pictures, captions = (torch.cat([part[name].cpu() for part in parts]) for name in space.names)
    scores = similarities(pictures.flatten(0, 1), captions).unflatten(0, pictures.shape[:2]).amax(dim=1)
    target = shown.split(split).target
    there, back = retrieval(scores, relevant=same_ids(target, target), k=(1, 5))
    figures = {}
    for way, found in (("image_to_text", there), ("text_to_image", back)):
        figures |= {f"{way}/recall@{k}": value for k, value in found.recall.items()}
        figures[f"{way}/median_rank"] = found.median_rank
    mean = {f"recall@{k}": (there.recall[k] + back.recall[k]) / 2 for k in there.recall}
    chance = {f"chance/recall@{k}": (there.chance[k] + back.chance[k]) / 2 for k in there.chance}
    return {**mean, **figures, **chance}


def uses_late_interaction(model: Any) -> bool:
    """Whether pictures have several vectors, of which the nearest counts: BLIP-2 for retrieval."""
    return all(hasattr(model, part) for part in ("qformer", "query_tokens", "vision_projection", "text_projection"))


def _pooled(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output
