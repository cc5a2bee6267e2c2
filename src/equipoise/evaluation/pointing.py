"""Pointing metrics of pretrained models: attention of words to the objects that they name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..data.sets.scenes import PATCH, SIZE, Scenes
from ..inspection.attention_trace import TraceReader, trace_attention
from ..inspection.patch_layout import PatchGrid, frame_index, patch_grid
from ..inspection.prompt_inputs import token_words, tokenizer_of
from ..models.vision_language.grounding import KINDS, labeled_words
from .generative_models import SIDE, GenerativeVLM, benchmark_question, to_pil_image

ROWS = SIZE // PATCH


def evaluate_pointing(
    vlm: GenerativeVLM, source: Scenes, split: str, samples: int, progress: Callable[[], None]
) -> dict[str, float]:
    """Computes ``pointing_mean/<kind>``, ``pointing/<kind>`` and ``chance/<kind>`` of words in questions.

    The mass is the fraction of a word's attention to image tokens that falls on the object it names; a token counts
    with the fraction of its area that the object covers::

        mass = sum_j A_wj c_j / sum_j A_wj,    chance = mean_j c_j,    c_j = fraction of token j covered by the object

    ``pointing_mean`` is the mean over layers and heads; ``pointing`` is the mass of one layer and head, selected on one
    half of the words and measured on the other. Empty if the positions of the image tokens are unknown, or if the words
    cannot be located among the model's tokens.
    """
    metrics: dict[str, float] = {}
    for kind in KINDS:
        masses, chances = [], []
        for index, position, region in labeled_words(source, split, kind):
            for row in range(len(index)):
                sample = int(index[row])
                if sample >= samples or source.kinds(split)[sample] == "caption":
                    continue
                word = source.lexicon[int(source.split(split).inputs["text"][sample, position[row]])]
                result = attention_on_object(vlm, source, split, sample, word, region[row])
                progress()
                if result is not None:
                    masses.append(result[0])
                    chances.append(result[1])
        if len(masses) > 1:
            mass = torch.stack(masses)
            best = mass[::2].mean(dim=0).flatten().argmax()
            metrics |= {
                f"pointing/{kind}": float(mass[1::2].mean(dim=0).flatten()[best]),
                f"pointing_mean/{kind}": float(mass.mean()), f"chance/{kind}": sum(chances) / len(chances),
            }  # fmt: skip
    return metrics


def attention_on_object(
    vlm: GenerativeVLM, source: Scenes, split: str, sample: int, word: str, region: Bool[Tensor, " patch"]
) -> tuple[Float[Tensor, "layer head"], float] | None:
    """(mass, chance) of one word of a question; None if the word or the image tokens cannot be located."""
    prompt = vlm.prompt(benchmark_question(source, split, sample), to_pil_image(source, split, sample))
    ids = prompt.inputs["input_ids"][0]
    position = word_position(token_words(tokenizer_of(vlm.processor), ids), word)
    if position is None:
        return None
    queries = {"prompt": torch.ones(len(ids), dtype=torch.bool)}
    with torch.no_grad():
        _, record, trace = trace_attention(
            vlm.model,
            prompt.inputs,
            queries,
            lambda names, labels: [TraceReader(word, "prompt", position, position)],
            None,
        )
    names = record["prompt"].names
    if trace.labels is None or "image" not in names or not trace.rows:
        return None
    is_image = trace.labels == names.index("image")
    grid = patch_grid(int(is_image.sum()), prompt.inputs, vlm.model.config)
    if not grid.known or grid.rows * grid.columns < 4:
        return None
    cover = patch_coverage(region, grid, frame_index(vlm.processor, (SIDE, SIDE)))
    heads = [rows[:, 0, is_image] for rows in trace.rows.values()]
    if len({len(head) for head in heads}) > 1:
        heads = [head.mean(dim=0, keepdim=True) for head in heads]
    attention = torch.stack(heads)
    mass = (attention @ cover) / attention.sum(dim=-1).clamp(min=torch.finfo(attention.dtype).tiny)
    return mass, float(cover.mean())


def word_position(texts: Sequence[str], word: str) -> int | None:
    """Index of the token that ends the last occurrence of a word; None if there is none.

    The word must not be part of a longer word: "<|im_start|>" does not contain "star".

    Example:
        >>> word_position(["<image>", " is", " the", " tri", "angle", " red"], "triangle")
        4
    """
    joined, ends = "".join(texts).lower(), list(accumulate(map(len, texts)))
    for match in reversed(list(re.finditer(re.escape(word), joined))):
        start, end = match.span()
        starts_word = start in (0, *ends) or not joined[start - 1].isalpha()
        if starts_word and (end in ends or not joined[end].isalpha()):
            return next(index for index, token_end in enumerate(ends) if token_end >= end)
    return None


def patch_coverage(
    region: Bool[Tensor, " patch"], grid: PatchGrid, frame: tuple[float, float, float, float]
) -> Float[Tensor, " token"]:
    """The fraction of every image token that a region covers.

    Args:
        region: True for patches of the scene in the region, row by row.
        grid: grid of the model's image tokens.
        frame: left, upper, right and lower edge of the model's crop of the image, from 0 to 1.

    Example:
        >>> upper_half = torch.arange(ROWS * ROWS) < ROWS * ROWS // 2
        >>> patch_coverage(upper_half, PatchGrid(2, 1, True, ""), (0.0, 0.0, 1.0, 1.0))
        tensor([1., 0.])
    """
    left, upper, right, lower = frame
    fine = F.interpolate(region.view(1, 1, ROWS, ROWS).float(), size=(SIDE, SIDE), mode="nearest")
    crop = fine[..., round(upper * SIDE) : round(lower * SIDE), round(left * SIDE) : round(right * SIDE)]
    return F.adaptive_avg_pool2d(crop, (grid.rows, grid.columns)).flatten()
