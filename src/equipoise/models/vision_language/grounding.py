"""Where words look: how much of a word's attention to the picture falls on what the word speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...data.sets.scene_questions import PLURALS
from ...data.sets.scene_rendering import COLOURS
from ...data.sets.scenes import IGNORED, Scenes
from ...errors import ConfigError, unknown_name
from ...recording import AttentionRecord, watch
from .image_conditioned_lm import ImageConditionedLM, InputSequence

KINDS = {"color": tuple(COLOURS), "shape": (*PLURALS, *PLURALS.values())}
OBJECT, OTHER, GROUND, TEXT = range(4)
NAMES = ("object", "other", "ground", "text")
"""Labels of the keys, as ``watch`` is given them: what the word speaks of, other things, what is behind, words."""
WITHOUT_GRID = ("qformer", "resampler")
BATCH = 250


@dataclass(frozen=True, eq=False)
class PointingResult:
    """Attention of words of one kind.

    Attributes:
        mass: (layer, head) part of the attention to the picture that falls on the true patches, mean over the words.
        choice: (layer, head) the same among the patches of things alone, over words with another thing beside theirs.
        picture: (layer, head) part of all attention that falls on the picture.
        chance: what attention without aim would give as ``mass``: part of the picture that the true patches are.
        chance_choice: the same for ``choice``: their part of the patches of all things.
        count: words.
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
    """How well the words of a kind point, in every layer and head.

    Words of questions and captions count, each where it stands; answers do not, since nothing is read from them. A word
    whose thing is not in the picture has no true patches and is left out::

        mass   = sum_{j in true patches} A_wj / sum_{j in patches} A_wj,             chance = true patches / patches
        choice = sum_{j in true patches} A_wj / sum_{j in patches of things} A_wj

    Attention comes from ``equipoise.recording``: exact, while the model runs as it always does.

    Args:
        model: whose connector keeps the picture's patches: "linear", "mlp" or "gated".
        source: the scenes.
        split: "val" or "test".
        kind: "color" or "shape".

    Raises:
        ConfigError: a connector whose tokens are no patches, an unknown kind.

    High values say where a word looks, not that the answer comes from there: what stands in a patch's token may have
    been moved there by the encoder. ``mass`` is above chance already where attention prefers things to the ground
    behind them; ``choice`` is not.
    """
    if model.kind in WITHOUT_GRID:
        raise ConfigError(
            "pointing", expected="a connector that keeps the picture's patches", got=f"'{model.kind}'",
            fix="Its tokens are mixtures of all patches: no part of the attention belongs to one of them.",
        )  # fmt: skip
    if kind not in KINDS:
        raise unknown_name("pointing", "kind of words", kind, KINDS)
    shares, sizes = [], []
    for index, place, region in labeled_words(source, split, kind):
        batch = source.batch(split, index, seed=0, epoch=0, train=False)
        others = source.covered(split, index) & ~region
        shares.append(region_attention(model, batch["image"], batch["text"], place, region, others))
        sizes.append(torch.stack([region.sum(dim=1), others.sum(dim=1)], dim=1) / region.shape[1])
    share, size = torch.cat(shares), torch.cat(sizes)
    picture = share[..., :TEXT].sum(dim=-1)
    beside = size[:, 1] > 0
    mass, choice = share[..., OBJECT] / picture, share[..., OBJECT] / share[..., : OTHER + 1].sum(dim=-1)
    return PointingResult(
        mass.mean(dim=0), choice[beside].mean(dim=0), picture.mean(dim=0), float(size[:, 0].mean()),
        float((size[beside, 0] / size[beside].sum(dim=1)).mean()), len(size),
    )  # fmt: skip


def region_attention(
    model: ImageConditionedLM,
    image: Float[Tensor, "batch channel height width"],
    text: Int[Tensor, "batch word"],
    place: Int[Tensor, " batch"],
    region: Bool[Tensor, "batch patch"],
    others: Bool[Tensor, "batch patch"],
) -> Float[Tensor, "batch layer head label"]:
    """What one word of each text gives to a region, to others, to the rest of the picture, and to words.

    Args:
        model: see ``pointing``.
        image: as the data set gives it.
        text: ids with "<image>".
        place: of the word, counted in ``text``.
        region: patches, row by row.
        others: patches of other things.
    """
    device = next(model.parameters()).device
    on_patches = torch.where(region, OBJECT, torch.where(others, OTHER, GROUND)).to(device)
    stream = model.stream(model.patches(image.to(device)), text.to(device))
    if stream.media is None:
        labels = torch.full_like(stream.modality, TEXT)
        labels[stream.modality == 1] = on_patches.flatten()
    else:
        labels = on_patches
    return stack_maps(_watched(model, stream, place, labels, names=NAMES))


def attention_map(
    model: ImageConditionedLM,
    image: Float[Tensor, "batch channel height width"],
    text: Int[Tensor, "batch word"],
    place: Int[Tensor, " batch"],
) -> Float[Tensor, "batch layer head patch"]:
    """The attention of one word of each text on every patch, as part of its attention to the picture.

    Args:
        model: see ``pointing``.
        image: as the data set gives it.
        text: ids with "<image>".
        place: of the word, counted in ``text``.
    """
    device = next(model.parameters()).device
    stream = model.stream(model.patches(image.to(device)), text.to(device))
    labels = torch.zeros_like(stream.modality) if stream.media is None else torch.zeros(stream.media.shape[:2]).long()
    seen = _watched(model, stream, place, labels, tokens=True)
    maps = torch.stack([seen.tokens(site) for site in seen.layers], dim=1)
    if stream.media is None:
        maps = maps[..., (stream.modality[0] == 1).to(maps.device)]
    return maps / maps.sum(dim=-1, keepdim=True)


def _watched(
    model: ImageConditionedLM, stream: InputSequence, place: Tensor, labels: Tensor, **options: Any
) -> AttentionRecord:
    """What the word at a place of each text looks at."""
    pictured = int((stream.modality[0] == 1).sum())
    # The picture stands where one word stood.
    at = place + pictured - 1 if pictured else place
    queries = torch.zeros(stream.labels.shape, dtype=torch.bool)
    queries[torch.arange(len(place)), at] = True
    part = model.language if stream.media is None else model.gates
    with watch(part, modality=labels, queries=queries, **options) as seen:
        model.logits(stream)
    return seen


def stack_maps(seen: AttentionRecord) -> Float[Tensor, "sample layer head label"]:
    """The shares of all sites, in calling order."""
    return torch.stack([seen.share(site) for site in seen.layers], dim=1)


def labeled_words(
    source: Scenes, split: str, kind: str
) -> Iterator[tuple[Int[Tensor, " word"], Int[Tensor, " word"], Bool[Tensor, "word patch"]]]:
    """(sample, place in its text, true patches) of all words of a kind that speak of something in the picture."""
    held = source.split(split).inputs
    ids = torch.tensor([source.lexicon.index(word) for word in KINDS[kind]])
    captions = torch.tensor([name == "caption" for name in source.kinds(split)])
    regions = source.regions(split, torch.arange(len(captions)))
    read = (held["labels"] == IGNORED) | captions[:, None]
    samples, places = (torch.isin(held["text"], ids) & regions.any(dim=2) & read).nonzero(as_tuple=True)
    for index, place in zip(samples.split(BATCH), places.split(BATCH), strict=True):
        yield index, place, regions[index, place]


def pointing_metrics(model: ImageConditionedLM, source: Scenes) -> dict[str, float]:
    """Pointing on the test split, as ``results.json`` holds it; nothing for connectors without patches.

    ``pointing/<kind>`` and ``pointing_choice/<kind>`` are those of the layer and head with the largest mass on the
    validation split, with ``chance/<kind>`` and ``chance_choice/<kind>`` beside them; ``pointing_mean/<kind>`` is the
    mass of all layers and heads, ``share_picture/<kind>`` what that head gives to the picture.
    """
    metrics: dict[str, float] = {}
    for kind in KINDS if model.kind not in WITHOUT_GRID else ():
        best = pointing(model, source, "val", kind).best
        found = pointing(model, source, "test", kind)
        metrics |= {
            f"pointing/{kind}": float(found.mass[best]), f"chance/{kind}": found.chance,
            f"pointing_mean/{kind}": float(found.mass.mean()),
            f"pointing_choice/{kind}": float(found.choice[best]), f"chance_choice/{kind}": found.chance_choice,
            f"share_picture/{kind}": float(found.picture[best]),
        }  # fmt: skip
    return metrics
