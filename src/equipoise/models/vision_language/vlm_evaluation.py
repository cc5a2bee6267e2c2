"""Answers and captions against the truth: with the picture, with another one, and with none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...data.sets.scenes import IGNORED, Scenes
from ...data.sets.text_codes import decode_text
from .image_conditioned_lm import ImageConditionedLM

Picture = Literal["own", "shuffled", "blank"]
BATCH = 250
SHUFFLE_SEED = 0
"""Every model is shown the same wrong pictures."""


def evaluate_vlm(model: ImageConditionedLM, source: Scenes, split: str = "test") -> dict[str, Any]:
    """How good answers and captions are, and how good they are without the picture.

    Returns:
        "metrics": ``accuracy`` over all questions, ``accuracy/<type>`` over those of one type, ``accuracy_known`` and
        ``accuracy_new`` over those about combinations that were in the training pictures and about others,
        ``caption_exact`` and ``caption_f1``; all of them also with ``_shuffled`` and ``_blank``, where each question
        is asked of the picture of another sample and of a picture that is 0 everywhere, the mean of all. "examples":
        what was said to the first samples.
    """
    metrics: dict[str, float] = {}
    examples: list[dict[str, str]] = []
    for picture in get_args(Picture):
        said = dict(generate_answers(model, source, split, picture))
        metrics |= score_answers(said, source, split, picture)
        if picture == "own":
            examples = [_example(place, said[place], source, split) for place in range(min(len(said), 16))]
    return {"metrics": metrics, "examples": examples}


def generate_answers(
    model: ImageConditionedLM, source: Scenes, split: str, picture: Picture = "own"
) -> Iterator[tuple[int, str]]:
    """(position, what the model says) for every sample of a split."""
    device = next(model.parameters()).device
    other = derangement(len(source.split(split)))
    for whole in source.batches(split, BATCH, seed=0, epoch=0, train=False):
        index = whole["index"]
        if picture == "shuffled":
            whole["image"] = source.batch(split, other[index], seed=0, epoch=0, train=False)["image"]
        elif picture == "blank":
            whole["image"] = torch.zeros_like(whole["image"])
        asks = whole["target"] != IGNORED
        batch = {name: values.to(device) for name, values in whole.items()}
        if bool(asks.any()):
            answers = model.answer({name: values[asks] for name, values in batch.items()})
            yield from zip(index[asks].tolist(), (model.words[word] for word in answers.tolist()), strict=True)
        if not bool(asks.all()):
            captions = model.caption({"image": batch["image"][~asks]})
            yield from zip(index[~asks].tolist(), map(decode_text, captions.tolist()), strict=True)


def derangement(count: int) -> Tensor:
    """(count,) for every sample another one: a single cycle through all of them.

    Example:
        >>> bool((turned(5) == torch.arange(5)).any())
        False
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    return torch.empty_like(order).scatter(0, order, order.roll(1))


def word_f1(said: Sequence[str], truth: Sequence[str]) -> float:
    """F1 of the words, each as often as it occurs, whatever their order.

    Example:
        >>> word_f1("a red car".split(), "a red truck and a red car".split())
        0.6
    """
    shared = sum((Counter(said) & Counter(truth)).values())
    return 2 * shared / (len(said) + len(truth)) if said or truth else 1.0


def score_answers(said: Mapping[int, str], source: Scenes, split: str, picture: Picture = "own") -> dict[str, float]:
    """The metrics of ``judged`` for one kind of picture, of whatever was said: {position: reply}."""
    ending = "" if picture == "own" else f"_{picture}"
    scores = _scores(said, source, split)
    return {_ended(name, ending): sum(values) / len(values) for name, values in scores.items()}


def _scores(said: Mapping[int, str], source: Scenes, split: str) -> dict[str, list[float]]:
    kinds, new = source.kinds(split), source.new(split).tolist()
    found: dict[str, list[float]] = defaultdict(list)
    for place, reply in said.items():
        truth, kind = _truth(source, split, place), kinds[place]
        if kind == "caption":
            found["caption_exact"].append(float(reply == truth))
            found["caption_f1"].append(word_f1(reply.split(), truth.split()))
            continue
        right = float(reply == truth)
        for name in ("accuracy", f"accuracy/{kind}", "accuracy_new" if new[place] else "accuracy_known"):
            found[name].append(right)
    return found


def _ended(name: str, ending: str) -> str:
    first, slash, rest = name.partition("/")
    return f"{first}{ending}{slash}{rest}"


def _truth(source: Scenes, split: str, place: int) -> str:
    labels = source.split(split).inputs["labels"][place]
    return decode_text(labels[labels != IGNORED].tolist())


def _example(place: int, reply: str, source: Scenes, split: str) -> dict[str, str]:
    truth = _truth(source, split, place)
    text = decode_text(source.split(split).inputs["text"][place].tolist())
    return {"question": text.removesuffix(truth).strip(), "answer": truth, "said": reply}
