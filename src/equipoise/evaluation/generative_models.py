"""Models that read a picture and write, at the questions and captions of the scenes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image

from ..data.sets.scene_questions import NUMBERS
from ..data.sets.scenes import IGNORED, Scenes
from ..inspection.prompt_inputs import PreparedPrompt, prepare_prompt, tokenizer_of
from ..models.vision_language.vlm_evaluation import Picture, derangement

ASK = "{}? Answer with one word."
DESCRIBE = "Describe the picture in the form 'a red car and a blue truck', with the color of every thing."
MOST_WORDS = {"answer": 8, "caption": 32}
"""Tokens that a reply may have."""
SIDE = 192
"""Pixels of the side of a picture as it is shown: these models were trained on pictures that are larger than ours."""


class GenerativeVLM:
    """A model of Hugging Face that answers questions about pictures.

    Args:
        model: as ``equipoise.inspection.load_pretrained`` gives it.
        processor: its own.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def prompt(self, text: str, picture: Image.Image) -> PreparedPrompt:
        """The question as the model reads it, its chat template around it."""
        return prepare_prompt(self.model, self.processor, text, picture)

    def reply(self, inputs: dict[str, Any], most: int) -> str:
        """What it writes, greedily."""
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        found = self.model.generate(**inputs, max_new_tokens=most, **greedy)
        written = found[0, inputs["input_ids"].shape[1] :]
        return tokenizer_of(self.processor).decode(written, skip_special_tokens=True).strip()


def pretrained_answers(
    writer: GenerativeVLM, source: Scenes, split: str, samples: int, picture: Picture, progress: Callable[[], None]
) -> Iterator[tuple[int, str]]:
    """(position, reply in the words of the scenes) of the first samples of a split."""
    other = derangement(len(source.split(split)))
    # The mean of all training pictures, as ours are asked; that of the picture itself would tell of its colors.
    level = round(source.train.inputs["image"].float().mean().item())
    empty = Image.new("RGB", (SIDE, SIDE), (level, level, level))
    kinds = source.kinds(split)
    for place in range(samples):
        shown = to_pil_image(source, split, int(other[place]) if picture == "shuffled" else place)
        inputs = writer.prompt(benchmark_question(source, split, place), empty if picture == "blank" else shown).inputs
        kind = "caption" if kinds[place] == "caption" else "answer"
        with torch.no_grad():
            said = writer.reply(inputs, MOST_WORDS[kind])
        yield place, normalize_answer(said, source, first=kind == "answer")
        progress()


def to_pil_image(source: Scenes, split: str, place: int) -> Image.Image:
    """The picture of a sample, enlarged, without the noise that belongs to the data set."""
    pixels = source.split(split).inputs["image"][place].permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def benchmark_question(source: Scenes, split: str, place: int) -> str:
    """What is asked of a sample, in a sentence."""
    held = source.split(split).inputs
    read = held["text"][place][held["labels"][place] == IGNORED]
    words = [source.lexicon[number] for number in read.tolist()]
    words = [word for word in words if not word.startswith("<")]
    return DESCRIBE if words == ["describe"] else ASK.format(" ".join(words).capitalize())


def normalize_answer(said: str, source: Scenes, *, first: bool) -> str:
    """A reply in the words of the scenes: what they do not have is left out, digits are written out.

    Args:
        said: anything.
        source: whose words count.
        first: the first of them alone, as an answer is.

    Example:
        >>> scenes = Scenes(samples=128)
        >>> in_our_words("It is Red.", scenes, first=True), in_our_words("2 cars", scenes, first=True)
        ('red', 'two')
    """
    words = [NUMBERS[int(word)] if word in "0123" else word for word in re.findall(r"[a-z]+|\b[0-3]\b", said.lower())]
    if first:
        answers = {source.lexicon[number] for number in source.train.target.tolist() if number >= 0}
        return next((word for word in words if word in answers), "")
    return " ".join(word for word in words if word in source.lexicon)
