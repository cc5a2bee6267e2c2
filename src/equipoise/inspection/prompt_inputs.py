"""From a picture, a sound and a question to what a model reads, and from its tokens back to words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from ..data.media_files import load_image as load_image
from ..data.media_files import read_audio as read_audio
from ..errors import ConfigError

SPACES = ("\u2581", "\u0120")
"""How vocabularies write the space before a word."""


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A question as a model reads it.

    Attributes:
        text: with placeholders, before the processor repeats them.
        inputs: of the model, a batch of one, on its device.
        blank: name of a modality -> the same inputs with nothing in it: an even picture, silence.
    """

    text: str
    inputs: dict[str, Any]
    blank: dict[str, dict[str, Any]]

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


def prepare_prompt(model: Any, processor: Any, text: str, image: Any = None, audio: Any = None) -> PreparedPrompt:
    """The question as this model reads it: its chat template where it has one, else placeholder and text."""
    tokenizer = tokenizer_of(processor)
    media: dict[str, Any] = {}
    if image is not None:
        media["images"] = [image]
    if audio is not None:
        media["audio"] = [audio]
    written, special = _written(processor, tokenizer, text, image is not None, audio is not None)

    def made(media: dict[str, Any]) -> dict[str, Any]:
        options = {} if special else {"add_special_tokens": False}
        found = processor(text=[written], return_tensors="pt", **media, **options)
        place, kind = next(model.parameters()).device, model.dtype
        return {
            name: value.to(place, kind if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for name, value in found.items()
        }

    blank: dict[str, dict[str, Any]] = {}
    if image is not None:
        color = tuple(np.asarray(image).reshape(-1, 3).mean(axis=0).round().astype(int).tolist())
        blank["image"] = made({**media, "images": [Image.new("RGB", image.size, color)]})
    if audio is not None:
        blank["audio"] = made({**media, "audio": [np.zeros_like(audio)]})
    return PreparedPrompt(written, made(media), blank)


def _written(processor: Any, tokenizer: Any, text: str, image: bool, audio: bool) -> tuple[str, bool]:
    """The text with placeholders, and whether special tokens are still to be added."""
    marks = [
        str(getattr(mark, "content", mark))
        for name, given in (("image_token", image), ("audio_token", audio))
        if given and (mark := getattr(processor, name, None) or getattr(tokenizer, name, None))
    ]
    if marks and all(mark in text for mark in marks):
        return text, True
    if getattr(processor, "chat_template", None):
        return _templated(processor.apply_chat_template, _content(text, image, audio), tokenizer)
    if not (image or audio) and getattr(tokenizer, "chat_template", None):
        return _templated(tokenizer.apply_chat_template, text, tokenizer)
    # Some processors put the places of the picture in by themselves, by the number of their queries.
    marks = [] if getattr(processor, "num_query_tokens", None) else marks
    return "\n".join([*marks, text]), True


def _content(text: str, image: bool, audio: bool) -> list[dict[str, str]]:
    kinds = [kind for kind, given in (("image", image), ("audio", audio)) if given]
    return [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]


def _templated(apply: Callable[..., Any], content: Any, tokenizer: Any) -> tuple[str, bool]:
    written = apply([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    begin = getattr(tokenizer, "bos_token", None)
    return written, not (begin and written.startswith(begin))


def tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", None) or processor


def complete_inputs(inputs: dict[str, Any], answer: Int[Tensor, "1 token"], model_type: str) -> dict[str, Any]:
    """Inputs that go on with an answer; what stands beside the words goes on as ``generate`` lets it."""
    length, more = inputs["input_ids"].shape[1], answer.shape[1]
    found = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != (1, length):
            continue
        if name == "input_ids":
            new = answer.to(value)
        else:
            new = value[:, -1:].expand(-1, more, *value.shape[2:])
            # A type of 1 is a picture, but in PaliGemma what is written after the prompt.
            kind = int(name == "token_type_ids" and "paligemma" in model_type)
            new = torch.full_like(new, kind) if name.endswith("token_type_ids") else new
        found[name] = torch.cat([value, new], dim=1)
    return found


def placeholders(config: Any) -> list[int]:
    """Tokens that stand for pictures and sounds, which no answer may hold."""
    names = (f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index"))
    found = {getattr(config, name, None) for name in names}
    return sorted(token for token in found if isinstance(token, int) and token >= 0)


def token_words(tokenizer: Any, ids: Int[Tensor, " token"]) -> list[str]:
    """Every token as text, with the space before it."""
    found = []
    for number in ids.tolist():
        raw = tokenizer.convert_ids_to_tokens(number) or ""
        text = tokenizer.decode([number])
        text = raw if not text or "\N{REPLACEMENT CHARACTER}" in text else text
        found.append(f" {text}" if raw.startswith(SPACES) and not text.startswith((" ", *SPACES)) else text)
    return found


def check_given(model: Any, names: tuple[str, ...], text: str, image: Any, audio: Any) -> None:
    """Raises ConfigError where what is given is not what the model reads."""
    reads = " and ".join(names)
    for name, value in (("image", image), ("audio", audio)):
        if value is not None and name not in names:
            raise ConfigError(
                "look", expected=f"what {type(model).__name__} reads: {reads}", got=f"{name}",
                fix=f"Leave {name} out, or choose a model that reads it.",
            )  # fmt: skip
    others = [name for name in names if name in ("image", "audio")]
    if others and image is None and audio is None:
        raise ConfigError(
            "look", expected=f"something to look at beside the text, since {type(model).__name__} reads {reads}",
            got="text alone", fix=f"Give {others[0]}=..., or --{others[0]} FILE.",
        )  # fmt: skip
    if not text.strip():
        raise ConfigError("look", expected="a text, such as a question about the picture", got="none")
