"""Visual grounding: the fraction of a word's attention to the image that falls on the object that the word names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...data.sets.scene_questions import PLURALS
from ...data.sets.scene_rendering import COLORS
from ...data.sets.scenes import IGNORED, Scenes
from ...errors import ConfigError, unknown_name
from ...recording import AttentionRecord, watch
from .image_conditioned_lm import ImageConditionedLM, InputSequence

KINDS = {"color": tuple(COLORS), "shape": (*PLURALS, *PLURALS.values())}
OBJECT, OTHER, GROUND, TEXT = range(4)
NAMES = ("object", "other", "ground", "text")
"""Labels of the keys passed to ``watch``: the named object, other objects, background, and text."""
WITHOUT_GRID = ("qformer", "resampler")
BATCH = 250


@dataclass(frozen=True, eq=False)
class PointingResult:
    """Attention of the words of one kind (colors or shapes) to the image.

    Attributes:
        mass: (layer, head) fraction of the attention to the image that falls on the true patches, mean over words.
        choice: (layer, head) the same fraction among patches of objects only, over words whose image contains another
            object.
        picture: (layer, head) fraction of all attention that falls on the image.
        chance: ``mass`` of uniform attention: the fraction of all patches that are true patches.
        chance_choice: ``choice`` of uniform attention: the fraction of all object patches that are true patches.
        count: number of words.
    """

    mass: Float[Tensor, "layer head"]
    choice: Float[Tensor, "layer head"]
    picture: Float[Tensor, "layer head"]
    chance: float
    chance_choice: float
    count: int

    @property
    def best(self) -> tuple[int, int]:
        """(layer, head) with the largest mass."""
        layer, head = divmod(int(self.mass.argmax()), self.mass.shape[1])
        return layer, head


def pointing(model: ImageConditionedLM, source: Scenes, split: str, kind: str) -> PointingResult:
    """Measures in every layer and head how much words of a kind attend to the object they name.

    Words of questions and captions count, at their position in the text; answer words do not, because no later token
    attends from them. A word whose object is not in the image has no true patches and is skipped::

        mass   = sum_{j in true patches} A_wj / sum_{j in patches} A_wj,              chance = true patches / patches
        choice = sum_{j in true patches} A_wj / sum_{j in patches of objects} A_wj

    The attention is exact and recorded with ``equipoise.watch`` during an ordinary forward pass.

    Args:
        model: model whose connector keeps the patches of the image: "linear", "mlp" or "gated".
        source: the ``scenes`` data set.
        split: "val" or "test".
        kind: "color" or "shape".

    Raises:
        ConfigError: a connector that mixes patches, or an unknown kind.

    High values do not prove that the answer depends on these patches: the encoder may have moved information between
    patches. ``mass`` exceeds chance even if attention merely prefers objects to the background; ``choice`` does not.
    """
    if model.kind in WITHOUT_GRID:
        raise ConfigError(
            "pointing", expected="a connector that keeps the image's patches", got=f"'{model.kind}'",
            fix="Its tokens mix all patches, so attention cannot be assigned to single patches.",
        )  # fmt: skip
    if kind not in KINDS:
        raise unknown_name("pointing", "kind of words", kind, KINDS)
    shares, sizes = [], []
    for index, position, region in labeled_words(source, split, kind):
        batch = source.batch(split, index, seed=0, epoch=0, train=False)
        others = source.covered(split, index) & ~region
        shares.append(region_attention(model, batch["image"], batch["text"], position, region, others))
        sizes.append(torch.stack([region.sum(dim=1), others.sum(dim=1)], dim=1) / region.shape[1])
    share, size = torch.cat(shares), torch.cat(sizes)
    picture = share[..., :TEXT].sum(dim=-1)
    has_other = size[:, 1] > 0
    mass, choice = share[..., OBJECT] / picture, share[..., OBJECT] / share[..., : OTHER + 1].sum(dim=-1)
    return PointingResult(
        mass.mean(dim=0), choice[has_other].mean(dim=0), picture.mean(dim=0), float(size[:, 0].mean()),
        float((size[has_other, 0] / size[has_other].sum(dim=1)).mean()), len(size),
    )  # fmt: skip


def region_attention(
    model: ImageConditionedLM,
    image: Float[Tensor, "batch channel height width"],
    text: Int[Tensor, "batch word"],
    position: Int[Tensor, " batch"],
    region: Bool[Tensor, "batch patch"],
    others: Bool[Tensor, "batch patch"],
) -> Float[Tensor, "batch layer head label"]:
    """Attention shares of one word of each text on a region, on other objects, on the background and on text.

    Args:
        model: see ``pointing``.
        image: images as loaded from the data set.
        text: token ids including "<image>".
        position: index of the word in ``text``.
        region: True for patches of the region, row by row.
        others: True for patches of other objects.
    """
    device = next(model.parameters()).device
    on_patches = torch.where(region, OBJECT, torch.where(others, OTHER, GROUND)).to(device)
    stream = model.stream(model.patches(image.to(device)), text.to(device))
    if stream.media is None:
        labels = torch.full_like(stream.modality, TEXT)
        labels[stream.modality == 1] = on_patches.flatten()
    else:
        labels = on_patches
    return stack_maps(_record_word_attention(model, stream, position, labels, names=NAMES))


def attention_map(
    model: ImageConditionedLM,
    image: Float[Tensor, "batch channel height width"],
    text: Int[Tensor, "batch word"],
    position: Int[Tensor, " batch"],
) -> Float[Tensor, "batch layer head patch"]:
    """Attention of one word of each text on every patch, normalized to sum to 1 over the image.

    Args:
        model: see ``pointing``.
        image: images as loaded from the data set.
        text: token ids including "<image>".
        position: index of the word in ``text``.
    """
    device = next(model.parameters()).device
    stream = model.stream(model.patches(image.to(device)), text.to(device))
    labels = torch.zeros_like(stream.modality) if stream.media is None else torch.zeros(stream.media.shape[:2]).long()
    record = _record_word_attention(model, stream, position, labels, tokens=True)
    maps = torch.stack([record.tokens(layer) for layer in record.layers], dim=1)
    if stream.media is None:
        maps = maps[..., (stream.modality[0] == 1).to(maps.device)]
    return maps / maps.sum(dim=-1, keepdim=True)


def _record_word_attention(
    model: ImageConditionedLM, stream: InputSequence, position: Tensor, labels: Tensor, **options: Any
) -> AttentionRecord:
    """Records the attention of the word at ``position`` of each text."""
    num_image_tokens = int((stream.modality[0] == 1).sum())
    # The image's tokens replace the single token "<image>" in front of the word.
    column = position + num_image_tokens - 1 if num_image_tokens else position
    queries = torch.zeros(stream.labels.shape, dtype=torch.bool)
    queries[torch.arange(len(position)), column] = True
    part = model.language if stream.media is None else model.gates
    with watch(part, modality=labels, queries=queries, **options) as record:
        model.logits(stream)
    return record


def stack_maps(record: AttentionRecord) -> Float[Tensor, "sample layer head label"]:
    """Stacks the shares of all layers, in calling order."""
    return torch.stack([record.share(layer) for layer in record.layers], dim=1)


def labeled_words(
    source: Scenes, split: str, kind: str
) -> Iterator[tuple[Int[Tensor, " word"], Int[Tensor, " word"], Bool[Tensor, "word patch"]]]:
    """Yields (sample, position in its text, true patches) of all words of a kind that name an object in the image."""
    inputs = source.split(split).inputs
    ids = torch.tensor([source.lexicon.index(word) for word in KINDS[kind]])
    captions = torch.tensor([name == "caption" for name in source.kinds(split)])
    regions = source.regions(split, torch.arange(len(captions)))
    is_input = (inputs["labels"] == IGNORED) | captions[:, None]
    samples, positions = (torch.isin(inputs["text"], ids) & regions.any(dim=2) & is_input).nonzero(as_tuple=True)
    for index, position in zip(samples.split(BATCH), positions.split(BATCH), strict=True):
        yield index, position, regions[index, position]


def pointing_metrics(model: ImageConditionedLM, source: Scenes) -> dict[str, float]:
    """Pointing metrics on the test split under their names in ``results.json``; {} for connectors that mix patches.

    ``pointing/<kind>`` and ``pointing_choice/<kind>`` belong to the layer and head with the largest mass on the
    validation split; ``chance/<kind>`` and ``chance_choice/<kind>`` are the values of uniform attention.
    ``pointing_mean/<kind>`` is the mean mass of all layers and heads, and ``share_picture/<kind>`` the fraction of all
    attention that the selected head gives to the image.
    """
    metrics: dict[str, float] = {}
    for kind in KINDS if model.kind not in WITHOUT_GRID else ():
        best = pointing(model, source, "val", kind).best
        result = pointing(model, source, "test", kind)
        metrics |= {
            f"pointing/{kind}": float(result.mass[best]), f"chance/{kind}": result.chance,
            f"pointing_mean/{kind}": float(result.mass.mean()),
            f"pointing_choice/{kind}": float(result.choice[best]), f"chance_choice/{kind}": result.chance_choice,
            f"share_picture/{kind}": float(result.picture[best]),
        }  # fmt: skip
    return metrics
