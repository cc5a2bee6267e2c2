"""CLIP, SigLIP and BLIP-2 with the interface of ``DualEncoder``, and a data set preprocessed by their processors."""

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
"""Maximum number of tokens in a caption if the tokenizer has no limit."""


class PretrainedDualEncoder(nn.Module):
    """A two-tower model of Hugging Face with the interface of ``DualEncoder``.

    Args:
        model: CLIP, SigLIP or another model with ``get_image_features`` and ``get_text_features``; or BLIP-2 for
            retrieval, which returns one image vector per query.
        padding: id of the padding token.
        use_attention_mask: pass an attention mask to the text encoder; SigLIP was trained without one.
        pad_is_eos: the first padding token is the end-of-text token, as in CLIP, which uses one id for both.

    Raises:
        ConfigError: the model has no image encoder and text encoder.
    """

    names = ("image", "text")

    def __init__(
        self, model: Any, *, padding: int, use_attention_mask: bool = True, pad_is_eos: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        if not (
            hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
        ) and not uses_late_interaction(model):
            raise ConfigError(
                "evaluate", expected="a model with an image and a text encoder, such as CLIP, SigLIP or BLIP-2",
                got=type(model).__name__, fix="Evaluate generative models on scenes: --data scenes.",
            )  # fmt: skip
        self.model, self.padding = model, padding
        self.use_attention_mask, self.pad_is_eos = use_attention_mask, pad_is_eos

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "batch dim"]]:
        """Embeds a batch: name -> unit vectors (batch, dim); images of BLIP-2: (batch, query, dim).

        Args:
            batch: "image": pixel values; "text": (batch, token) ids; as loaded from ``ProcessedDataset``.
        """
        embeddings = {}
        if "image" in batch:
            embeddings["image"] = F.normalize(self._embed_images(batch["image"]).float(), dim=-1)
        if "text" in batch:
            ids = batch["text"]
            num_padding = (ids == self.padding).cumsum(dim=1)
            mask = {"attention_mask": (num_padding <= self.pad_is_eos).long()} if self.use_attention_mask else {}
            embeddings["text"] = F.normalize(self._embed_captions(ids, mask).float(), dim=-1)
        return embeddings

    def _embed_images(self, pixels: Tensor) -> Tensor:
        if not uses_late_interaction(self.model):
            return _pooled(self.model.get_image_features(pixel_values=pixels))
        model = self.model
        hidden = model.vision_model(pixel_values=pixels).last_hidden_state
        queries = model.query_tokens.expand(len(pixels), -1, -1)
        output = model.qformer(query_embeds=queries, encoder_hidden_states=hidden).last_hidden_state
        return model.vision_projection(output)

    def _embed_captions(self, ids: Tensor, mask: dict[str, Tensor]) -> Tensor:
        if not uses_late_interaction(self.model):
            return _pooled(self.model.get_text_features(input_ids=ids, **mask))
        model = self.model
        output = model.qformer(query_embeds=model.embeddings(input_ids=ids), query_length=0, **mask)
        return model.text_projection(output.last_hidden_state[:, 0])


def wrap_dual_encoder(model: Any, processor: Any) -> tuple[PretrainedDualEncoder, bool]:
    """Wraps a two-tower model; also returns whether it is a SigLIP, whose captions are padded to the limit."""
    siglip = "siglip" in str(getattr(model.config, "model_type", ""))
    tokenizer = getattr(processor, "tokenizer", processor)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else -1
    encoder = PretrainedDualEncoder(
        model, padding=padding, use_attention_mask=not siglip, pad_is_eos=padding == tokenizer.eos_token_id
    )
    return encoder, siglip


class CaptionTokenizer:
    """Tokenizes captions to ids (text, token), padded on the right and truncated to the tokenizer's limit.

    Args:
        processor: processor of the model.
        template: caption template; ``"{}"`` keeps captions unchanged.
        pad_to_limit: pad captions to the tokenizer's limit, as in SigLIP's training.

    Raises:
        ConfigError: a template without ``{}``.
    """

    def __init__(self, processor: Any, *, template: str = "{}", pad_to_limit: bool = False) -> None:
        if "{}" not in template:
            raise ConfigError(
                "evaluate template", expected="a text with {} in place of the caption", got=repr(template)
            )  # fmt: skip
        self._template, self._pad_to_limit = template, pad_to_limit
        self._tokenizer = getattr(processor, "tokenizer", processor)
        limit = int(getattr(self._tokenizer, "model_max_length", LONGEST))
        self._limit = limit if 0 < limit <= 512 else LONGEST

    def __call__(self, texts: Sequence[str]) -> Tensor:
        encoded = self._tokenizer(
            [self._template.replace("{}", text) for text in texts],
            padding="max_length" if self._pad_to_limit else True,
            truncation=True, max_length=self._limit, return_tensors="pt",
        )  # fmt: skip
        return encoded["input_ids"]


class ProcessedDataset:
    """The ``emoji`` data set preprocessed by a Hugging Face processor, for ``evaluate_dual_encoder``.

    Args:
        source: the ``emoji`` data set.
        processor: processor of the model.
        template, pad_to_limit: as in ``CaptionTokenizer``.

    Raises:
        ConfigError: a template without ``{}``.
    """

    def __init__(self, source: Emoji, processor: Any, *, template: str = "{}", pad_to_limit: bool = False) -> None:
        self._source, self._processor = source, processor
        self.tokenize = CaptionTokenizer(processor, template=template, pad_to_limit=pad_to_limit)
        self._index = {item: index for index, item in enumerate(source.items)}

    def split(self, name: str) -> SimpleNamespace:
        """Returns a namespace with the ``target`` of a split."""
        return SimpleNamespace(target=self._source.split(name).target)

    def batches(self, split: str, batch_size: int, **_: Any) -> Iterator[dict[str, Tensor]]:
        """Yields all samples of a split in order."""
        items = self._source.split_items(split)
        captions = self.tokenize([item.name for item in items])
        target = self.split(split).target
        for start in range(0, len(items), batch_size):
            rows = slice(start, start + batch_size)
            images = [
                Image.fromarray(self._source.pictures[self._index[item]].numpy()).convert("RGB") for item in items[rows]
            ]
            pixels = self._processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            yield {"image": pixels, "text": captions[rows], "target": target[rows]}

    def combinations(self, split: str) -> Combinations:
        """The combinations of ``emoji``, with parts tokenized by this tokenizer."""
        combinations = self._source.combinations(split)
        items = self._source.split_items(split)
        texts = [part for row in combinations.rows.tolist() for part in items[row].parts]
        ids = self.tokenize(texts) if texts else torch.zeros(0, 1, dtype=torch.long)
        parts = torch.zeros(*combinations.present.shape, ids.shape[1], dtype=torch.long)
        parts[combinations.present] = ids
        return Combinations(combinations.rows, "text", parts, combinations.present)


def evaluate_contrastive(encoder: PretrainedDualEncoder, dataset: ProcessedDataset, split: str) -> dict[str, float]:
    """Returns the metrics of ``evaluate_dual_encoder``.

    BLIP-2 has several vectors per image, and the score of an image is that of its best query; only retrieval metrics
    are defined for it.
    """
    if not uses_late_interaction(encoder.model):
        return evaluate_dual_encoder(encoder, dataset, split)
    device, names = next(encoder.parameters()).device, encoder.names
    parts = [encoder.embed({name: batch[name].to(device) for name in names}) for batch in dataset.batches(split, 64)]
    images, captions = (torch.cat([part[name].cpu() for part in parts]) for name in names)
    scores = similarities(images.flatten(0, 1), captions).unflatten(0, images.shape[:2]).amax(dim=1)
    target = dataset.split(split).target
    forward, backward = retrieval(scores, relevant=same_ids(target, target), k=(1, 5))
    metrics = {}
    for direction, result in (("image_to_text", forward), ("text_to_image", backward)):
        metrics |= {f"{direction}/recall@{k}": value for k, value in result.recall.items()}
        metrics[f"{direction}/median_rank"] = result.median_rank
    mean = {f"recall@{k}": (forward.recall[k] + backward.recall[k]) / 2 for k in forward.recall}
    chance = {f"chance/recall@{k}": (forward.chance[k] + backward.chance[k]) / 2 for k in forward.chance}
    return {**mean, **metrics, **chance}


def uses_late_interaction(model: Any) -> bool:
    """Whether the model has several vectors per image and the maximum score counts: BLIP-2 for retrieval."""
    return all(hasattr(model, part) for part in ("qformer", "query_tokens", "vision_projection", "text_projection"))


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
