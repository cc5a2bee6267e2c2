"""Converts an image, audio and a question to model inputs, and tokens back to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
"""Characters that stand for a leading space in vocabularies."""

Inputs = dict[str, Any]
"""Inputs of a model by name."""


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """Model inputs of a question.

    Attributes:
        text: prompt with placeholders, before the processor repeats them.
        inputs: model inputs, a batch of one, on the model's device.
        blank: modality name -> the same inputs with blank content: an image of one color, or silence.
        process: function from media, such as other images of the same sizes, to the inputs of this prompt.
    """

    text: str
    inputs: dict[str, Any]
    blank: dict[str, dict[str, Any]]
    process: Callable[[Mapping[str, Sequence[Any]]], Inputs]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.inputs["input_ids"].shape[1]


def prepare_prompt(model: Any, processor: Any, text: str, image: Any = None, audio: Any = None) -> PreparedPrompt:
    """Prepares the inputs of a question, with the chat template if there is one, else with placeholders and text.

    ``image`` is a Pillow image, or a list of several.
    """
    media: dict[str, Any] = {}
    pictures = image if isinstance(image, list) else [] if image is None else [image]
    if pictures:
        media["images"] = pictures
    if audio is not None:
        media["audio"] = [audio]
    prompt, process = prompt_encoder(model, processor, text, media)
    blank: dict[str, dict[str, Any]] = {}
    if pictures:
        blank["image"] = process({**media, "images": [uniform_image(one) for one in pictures]})
    if audio is not None:
        blank["audio"] = process({**media, "audio": [np.zeros_like(audio)]})
    return PreparedPrompt(prompt, process(media), blank, process)


def uniform_image(picture: Image.Image) -> Image.Image:
    """Returns an image of the same size in the mean color of an image."""
    color = tuple(np.asarray(picture).reshape(-1, 3).mean(axis=0).round().astype(int).tolist())
    return Image.new("RGB", picture.size, color)


def prompt_encoder(
    model: Any, processor: Any, text: str, media: Mapping[str, Sequence[Any]]
) -> tuple[str, Callable[[Mapping[str, Sequence[Any]]], Inputs]]:
    """Returns the prompt of a question about some media, and a function from such media to the model's inputs.

    Args:
        model, processor: as in ``look``.
        text: the question.
        media: "images" and "audio" -> their content; empty for a question alone.
    """
    tokenizer = tokenizer_of(processor)
    counts = (len(media.get("images", ())), len(media.get("audio", ())))
    prompt, add_special = _prompt_text(processor, tokenizer, text, *counts)

    def process(media: Mapping[str, Sequence[Any]]) -> Inputs:
        options = {} if add_special else {"add_special_tokens": False}
        encoded = processor(text=[prompt], return_tensors="pt", **media, **options)
        device, dtype = next(model.parameters()).device, model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for name, value in encoded.items()
        }

    return prompt, process


def _prompt_text(processor: Any, tokenizer: Any, text: str, images: int, sounds: int) -> tuple[str, bool]:
    """Returns the text with placeholders, and whether special tokens must still be added."""
    tokens = [
        str(getattr(token, "content", token))
        for name, count in (("image_token", images), ("audio_token", sounds))
        for _ in range(count)
        if (token := getattr(processor, name, None) or getattr(tokenizer, name, None))
    ]
    if tokens and all(token in text for token in tokens):
        return text, True
    if getattr(processor, "chat_template", None):
        return _apply_template(processor.apply_chat_template, _content(text, images, sounds), tokenizer)
    if not (images or sounds) and getattr(tokenizer, "chat_template", None):
        return _apply_template(tokenizer.apply_chat_template, text, tokenizer)
    # Processors with `num_query_tokens`, and that of Florence-2, insert the image placeholders themselves.
    inserts = getattr(processor, "num_query_tokens", None) or hasattr(processor, "task_prompts_with_input")
    tokens = [] if inserts else tokens
    return "\n".join([*tokens, text]), True


def _content(text: str, images: int, sounds: int) -> list[dict[str, str]]:
    kinds = ["image"] * images + ["audio"] * sounds
    return [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]


def _apply_template(apply: Callable[..., Any], content: Any, tokenizer: Any) -> tuple[str, bool]:
    prompt = apply([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    bos = getattr(tokenizer, "bos_token", None)
    return prompt, not (bos and prompt.startswith(bos))


def tokenizer_of(processor: Any) -> Any:
    """Returns the tokenizer of a processor; a tokenizer is returned as it is."""
    return getattr(processor, "tokenizer", None) or processor


def sampling_rate(processor: Any) -> int:
    """Returns the rate in Hz of the sounds that a processor takes.

    Raises:
        ConfigError: a processor without feature extractor, such as a tokenizer.
    """
    reader = getattr(processor, "feature_extractor", None)
    if reader is None:
        raise ConfigError(
            "look", expected="a processor with a feature extractor for audio", got=type(processor).__name__,
            fix="Pass AutoProcessor.from_pretrained(...).",
        )  # fmt: skip
    return int(reader.sampling_rate)


def complete_inputs(inputs: dict[str, Any], answer: Int[Tensor, "1 token"], model_type: str) -> dict[str, Any]:
    """Appends an answer to the inputs; masks and token types are extended as ``generate`` does."""
    length, added = inputs["input_ids"].shape[1], answer.shape[1]
    complete = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != (1, length):
            continue
        if name == "input_ids":
            new = answer.to(value)
        else:
            new = value[:, -1:].expand(-1, added, *value.shape[2:])
            # token_type_ids == 1 marks image tokens, except in PaliGemma, where it marks the suffix.
            token_type = int(name == "token_type_ids" and "paligemma" in model_type)
            new = torch.full_like(new, token_type) if name.endswith("token_type_ids") else new
        complete[name] = torch.cat([value, new], dim=1)
    return complete


def placeholders(config: Any) -> list[int]:
    """Returns the placeholder token ids of images, videos and audio, which must not occur in an answer."""
    names = (f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index"))
    tokens = {getattr(config, name, None) for name in names}
    return sorted(token for token in tokens if isinstance(token, int) and token >= 0)


def token_words(tokenizer: Any, ids: Int[Tensor, " token"]) -> list[str]:
    """Decodes each token to text, with its leading space."""
    texts = []
    for number in ids.tolist():
        raw = tokenizer.convert_ids_to_tokens(number) or ""
        text = tokenizer.decode([number])
        text = raw if not text or "\N{REPLACEMENT CHARACTER}" in text else text
        texts.append(f" {text}" if raw.startswith(SPACES) and not text.startswith((" ", *SPACES)) else text)
    return texts


def check_given(model: Any, names: tuple[str, ...], text: str, image: Any, audio: Any) -> None:
    """Checks that the inputs match the modalities of the model.

    Raises:
        ConfigError: an unsupported modality, no image or audio for a model that takes it, or an empty text.
    """
    modalities = " and ".join(names)
    for name, value in (("image", image), ("audio", audio)):
        if value is not None and name not in names:
            raise ConfigError(
                "look", expected=f"inputs of {type(model).__name__}: {modalities}", got=f"{name}",
                fix=f"Omit {name}, or choose a model that takes it.",
            )  # fmt: skip
    others = [name for name in names if name in ("image", "audio")]
    if others and image is None and audio is None:
        raise ConfigError(
            "look", expected=f"an input in addition to the text, since {type(model).__name__} takes {modalities}",
            got="text only", fix=f"Give {others[0]}=..., or --{others[0]} FILE.",
        )  # fmt: skip
    # An encoder-decoder may take its medium alone.
    if not text.strip() and not getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError("look", expected="a text, such as a question about the image", got="none")
