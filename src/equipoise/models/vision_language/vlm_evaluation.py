"""Scores answers and captions with the sample's own image, another sample's image, and a blank image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...data.sets.scenes import IGNORED, Scenes
from ...data.sets.text_codes import decode_text
from .image_conditioned_lm import ImageConditionedLM

ImageCondition = Literal["own", "shuffled", "blank"]
BATCH = 250
SHUFFLE_SEED = 0
"""Fixed, so that all models get the same mismatched images."""


def evaluate_vlm(model: ImageConditionedLM, source: Scenes, split: str = "test") -> dict[str, Any]:
    """Evaluates answers and captions with and without the matching image.

    Returns:
        "metrics": ``accuracy`` over all questions, ``accuracy/<type>`` over those of one type, ``accuracy_known`` and
        ``accuracy_new`` over questions about combinations seen and not seen in training, ``caption_exact`` and
        ``caption_f1``; each also with the suffix ``_shuffled`` (the image of another sample) and ``_blank`` (an image
        of zeros, the mean of the training images). "examples": replies to the first 16 samples.
    """
    metrics: dict[str, float] = {}
    examples: list[dict[str, str]] = []
    for condition in get_args(ImageCondition):
        replies = dict(generate_answers(model, source, split, condition))
        metrics |= score_answers(replies, source, split, condition)
        if condition == "own":
            examples = [_example(index, replies[index], source, split) for index in range(min(len(replies), 16))]
    return {"metrics": metrics, "examples": examples}


def generate_answers(
    model: ImageConditionedLM, source: Scenes, split: str, condition: ImageCondition = "own"
) -> Iterator[tuple[int, str]]:
    """Yields (index, generated reply) for every sample of a split."""
    device = next(model.parameters()).device
    other = derangement(len(source.split(split)))
    for batch in source.batches(split, BATCH, seed=0, epoch=0, train=False):
        index = batch["index"]
        if condition == "shuffled":
            batch["image"] = source.batch(split, other[index], seed=0, epoch=0, train=False)["image"]
        elif condition == "blank":
            batch["image"] = torch.zeros_like(batch["image"])
        is_question = batch["target"] != IGNORED
        batch = {name: values.to(device) for name, values in batch.items()}
        if bool(is_question.any()):
            answers = model.answer({name: values[is_question] for name, values in batch.items()})
            yield from zip(index[is_question].tolist(), (model.words[word] for word in answers.tolist()), strict=True)
        if not bool(is_question.all()):
            captions = model.caption({"image": batch["image"][~is_question]})
            yield from zip(index[~is_question].tolist(), map(decode_text, captions.tolist()), strict=True)


def derangement(count: int) -> Tensor:
    """A permutation (count,) without fixed points: a single cycle through all indices.

    Example:
        >>> bool((derangement(5) == torch.arange(5)).any())
        False
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    return torch.empty_like(order).scatter(0, order, order.roll(1))


def word_f1(reply: Sequence[str], truth: Sequence[str]) -> float:
    """F1 score of two multisets of words; their order does not matter.

    Example:
        >>> word_f1("a red car".split(), "a red truck and a red car".split())
        0.6
    """
    shared = sum((Counter(reply) & Counter(truth)).values())
    return 2 * shared / (len(reply) + len(truth)) if reply or truth else 1.0


def score_answers(
    replies: Mapping[int, str], source: Scenes, split: str, condition: ImageCondition = "own"
) -> dict[str, float]:
    """The metrics of ``evaluate_vlm`` for one image condition.

    Args:
        replies: sample index -> reply.
        source: the ``scenes`` data set.
        split: "val" or "test".
        condition: appended to the names of the metrics, except "own".
    """
    suffix = "" if condition == "own" else f"_{condition}"
    scores = _sample_scores(replies, source, split)
    return {_with_suffix(name, suffix): sum(values) / len(values) for name, values in scores.items()}


def _sample_scores(replies: Mapping[int, str], source: Scenes, split: str) -> dict[str, list[float]]:
    kinds, new = source.kinds(split), source.new(split).tolist()
    scores: dict[str, list[float]] = defaultdict(list)
    for index, reply in replies.items():
        truth, kind = _truth(source, split, index), kinds[index]
        if kind == "caption":
            scores["caption_exact"].append(float(reply == truth))
            scores["caption_f1"].append(word_f1(reply.split(), truth.split()))
            continue
        for name in ("accuracy", f"accuracy/{kind}", "accuracy_new" if new[index] else "accuracy_known"):
            scores[name].append(float(reply == truth))
    return scores


def _with_suffix(name: str, suffix: str) -> str:
    first, slash, rest = name.partition("/")
    return f"{first}{suffix}{slash}{rest}"


def _truth(source: Scenes, split: str, index: int) -> str:
    labels = source.split(split).inputs["labels"][index]
    return decode_text(labels[labels != IGNORED].tolist())


def _example(index: int, reply: str, source: Scenes, split: str) -> dict[str, str]:
    truth = _truth(source, split, index)
    text = decode_text(source.split(split).inputs["text"][index].tolist())
    return {"question": text.removesuffix(truth).strip(), "answer": truth, "said": reply}
