"""Generative vision-language models on the questions and captions of ``scenes``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image

from ..data import Dataset
from ..data.sets.scene_questions import NUMBERS
from ..data.sets.scenes import IGNORED, Scenes
from ..inspection.prompt_inputs import PreparedPrompt, prepare_prompt, tokenizer_of
from ..models.vision_language.vlm_evaluation import ImageCondition, derangement

ASK = "{}? Answer with one word."
DESCRIBE = "Describe the picture in the form 'a red car and a blue truck', with the color of every thing."
MAX_NEW_TOKENS = {"answer": 8, "caption": 32}
"""Maximum number of generated tokens."""
SIDE = 192
"""Side of the enlarged images in pixels: these models were trained on larger images than those of ``scenes``."""


class GenerativeVLM:
    """A Hugging Face model that answers questions about images.

    Args:
        model: model loaded by ``equipoise.inspection.load_pretrained``.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def prompt(self, text: str, image: Image.Image) -> PreparedPrompt:
        """Prepares the inputs of a question with the model's chat template."""
        return prepare_prompt(self.model, self.processor, text, image)

    def reply(self, inputs: dict[str, Any], max_new_tokens: int) -> str:
        """Generates a reply by greedy decoding."""
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **greedy)
        reply = output[0, inputs["input_ids"].shape[1] :]
        return tokenizer_of(self.processor).decode(reply, skip_special_tokens=True).strip()


def pretrained_answers(
    vlm: GenerativeVLM, source: Scenes, split: str, samples: int, condition: ImageCondition,
    progress: Callable[[], None],
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yields (index, reply in the vocabulary of ``scenes``) of the first samples of a split."""
    other = derangement(len(source.split(split)))
    # Blank images have the mean of all training images, as for our own models; the mean of the sample's own image
    # would reveal its colors.
    level = round(source.train.inputs["image"].float().mean().item())
    blank = Image.new("RGB", (SIDE, SIDE), (level, level, level))
    kinds = source.kinds(split)
    for index in range(samples):
        image = to_pil_image(source, split, int(other[index]) if condition == "shuffled" else index)
        inputs = vlm.prompt(benchmark_question(source, split, index), blank if condition == "blank" else image).inputs
        kind = "caption" if kinds[index] == "caption" else "answer"
        with torch.no_grad():
            reply = vlm.reply(inputs, MAX_NEW_TOKENS[kind])
        yield index, normalize_answer(reply, source, first=kind == "answer")
        progress()


def to_pil_image(source: Dataset, split: str, index: int) -> Image.Image:
    """Returns the enlarged image of a sample, without the data set's noise."""
    pixels = source.split(split).inputs["image"][index].permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def benchmark_question(source: Scenes, split: str, index: int) -> str:
    """Returns the prompt of a sample as a sentence."""
    inputs = source.split(split).inputs
    question = inputs["text"][index][inputs["labels"][index] == IGNORED]
    words = [source.lexicon[number] for number in question.tolist()]
    words = [word for word in words if not word.startswith("<")]
    return DESCRIBE if words == ["describe"] else ASK.format(" ".join(words).capitalize())


def normalize_answer(reply: str, source: Scenes, *, first: bool) -> str:
    """Reduces a reply to the vocabulary of ``scenes``: other words are removed, digits are spelled out.

    Args:
        reply: generated text.
        source: data set that defines the vocabulary.
        first: keep only the first word that is an answer.

    Example:
        >>> scenes = Scenes(samples=128)
        >>> normalize_answer("It is Red.", scenes, first=True), normalize_answer("2 cars", scenes, first=True)
        ('red', 'two')
    """
    words = [NUMBERS[int(word)] if word in "0123" else word for word in re.findall(r"[a-z]+|\b[0-3]\b", reply.lower())]
    if first:
        answers = {source.lexicon[number] for number in source.train.target.tolist() if number >= 0}
        return next((word for word in words if word in answers), "")
    return " ".join(word for word in words if word in source.lexicon)
