"""Where a published model's words look, against the true places of what they name."""

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
    writer: GenerativeVLM, source: Scenes, split: str, samples: int, progress: Callable[[], None]
) -> dict[str, float]:
    """``pointing_mean/<kind>``, ``pointing/<kind>`` and ``chance/<kind>`` of words in questions.

    Of the attention that a word gives to the tokens of the picture, the part that falls on the thing it names; a token
    that covers a part of it counts with that part::

        mass = sum_j A_wj c_j / sum_j A_wj,    chance = mean_j c_j,    c_j = part of token j that the thing covers

    ``pointing_mean`` is the mean over layers and heads; ``pointing`` that of the layer and head which is best on
    another half of the words, so that nothing is chosen on what it is told of. Empty where the tokens of a picture have
    no known places, or where the words cannot be found again among the model's tokens.
    """
    metrics: dict[str, float] = {}
    for kind in KINDS:
        masses, chances = [], []
        for index, place, region in labeled_words(source, split, kind):
            for row in range(len(index)):
                sample = int(index[row])
                if sample >= samples or source.kinds(split)[sample] == "caption":
                    continue
                word = source.lexicon[int(source.split(split).inputs["text"][sample, place[row]])]
                found = attention_on_object(writer, source, split, sample, word, region[row])
                progress()
                if found is not None:
                    masses.append(found[0])
                    chances.append(found[1])
        if len(masses) > 1:
            mass = torch.stack(masses)
            chosen = mass[::2].mean(dim=0).flatten().argmax()
            metrics |= {
                f"pointing/{kind}": float(mass[1::2].mean(dim=0).flatten()[chosen]),
                f"pointing_mean/{kind}": float(mass.mean()), f"chance/{kind}": sum(chances) / len(chances),
            }  # fmt: skip
    return metrics


def attention_on_object(
    writer: GenerativeVLM, source: Scenes, split: str, sample: int, word: str, region: Bool[Tensor, " patch"]
) -> tuple[Float[Tensor, "layer head"], float] | None:
    """(mass, chance) of one word of a question; None where word or places are not known."""
    prompt = writer.prompt(benchmark_question(source, split, sample), to_pil_image(source, split, sample))
    ids = prompt.inputs["input_ids"][0]
    place = word_position(token_words(tokenizer_of(writer.processor), ids), word)
    if place is None:
        return None
    everyone = {"prompt": torch.ones(len(ids), dtype=torch.bool)}
    with torch.no_grad():
        _, seen, trace = trace_attention(
            writer.model,
            prompt.inputs,
            everyone,
            lambda names, labels: [TraceReader(word, "prompt", place, place)],
            None,
        )
    names = seen["prompt"].names
    if trace.labels is None or "image" not in names or not trace.rows:
        return None
    pictured = trace.labels == names.index("image")
    grid = patch_grid(int(pictured.sum()), prompt.inputs, writer.model.config)
    if not grid.known or grid.rows * grid.columns < 4:
        return None
    cover = patch_coverage(region, grid, frame_index(writer.processor, (SIDE, SIDE)))
    heads = [rows[:, 0, pictured] for rows in trace.rows.values()]
    if len({len(head) for head in heads}) > 1:
        heads = [head.mean(dim=0, keepdim=True) for head in heads]
    attention = torch.stack(heads)
    mass = (attention @ cover) / attention.sum(dim=-1).clamp(min=torch.finfo(attention.dtype).tiny)
    return mass, float(cover.mean())


def word_position(texts: Sequence[str], word: str) -> int | None:
    """The token that ends the last occurrence of a word; None where it is not there.

    Letters beside it in the same token make another word of it: there is no star in "<|im_start|>".

    Example:
        >>> place_of(["<image>", " is", " the", " tri", "angle", " red"], "triangle")
        4
    """
    whole, ends = "".join(texts).lower(), list(accumulate(map(len, texts)))
    for found in reversed(list(re.finditer(re.escape(word), whole))):
        start, end = found.span()
        before = start in (0, *ends) or not whole[start - 1].isalpha()
        if before and (end in ends or not whole[end].isalpha()):
            return next(place for place, until in enumerate(ends) if until >= end)
    return None


def patch_coverage(
    region: Bool[Tensor, " patch"], grid: PatchGrid, frame: tuple[float, float, float, float]
) -> Float[Tensor, " token"]:
    """The part of every token of a picture that a region covers.

    Args:
        region: of the scene's patches, row by row.
        grid: of the model's tokens.
        frame: left, upper, right and lower edge of what the model is shown of the picture, from 0 to 1.

    Example:
        >>> covered(torch.arange(ROWS * ROWS) < ROWS * ROWS // 2, Grid(2, 1, True, ""), (0.0, 0.0, 1.0, 1.0))
        tensor([1., 0.])
    """
    left, upper, right, lower = frame
    fine = F.interpolate(region.view(1, 1, ROWS, ROWS).float(), size=(SIDE, SIDE), mode="nearest")
    shown = fine[..., round(upper * SIDE) : round(lower * SIDE), round(left * SIDE) : round(right * SIDE)]
    return F.adaptive_avg_pool2d(shown, (grid.rows, grid.columns)).flatten()
