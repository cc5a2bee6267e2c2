"""Converts an image or a sound and a question to the inputs of an encoder-decoder, and generates its answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import ConfigError
from .prompt_inputs import Inputs, prompt_encoder, sampling_rate, tokenizer_of, uniform_image


class EncodedPrompt(NamedTuple):
    """Inputs of an encoder, the same with blank media, and the first tokens of the decoder."""

    inputs: Inputs
    blank: dict[str, Inputs]
    start: Int[Tensor, "1 token"]


def encode_prompt(model: Any, processor: Any, text: str, picture: Any, sound: Any) -> EncodedPrompt:
    """Prepares the inputs of the encoder and the decoder, also with a blank image or silence."""
    kind, medium, empty = (
        ("image", picture, uniform_image(picture)) if sound is None else ("audio", sound, np.zeros_like(sound))
    )
    inputs, start = encode_medium(model, processor, text, kind, medium)
    blank, _ = encode_medium(model, processor, text, kind, empty)
    return EncodedPrompt(inputs, {kind: blank}, start)


def encode_medium(
    model: Any, processor: Any, text: str, kind: str | None, medium: Any = None
) -> tuple[Inputs, Int[Tensor, "1 token"]]:
    """Returns the inputs of the encoder and the first tokens of the decoder.

    A text that the encoder does not take starts the decoder.

    Args:
        model, processor: an encoder-decoder and its processor.
        text: the question; it may be empty.
        kind: "image", "audio", or None for the text alone.
        medium: an image, or a sound (sample,) at the sampling rate of the processor.
    """
    tokenizer = tokenizer_of(processor)
    start = start_tokens(model, tokenizer)
    device, dtype = next(model.parameters()).device, model.dtype
    # Pix2Struct renders the question into the image, or has none.
    rendered = getattr(getattr(processor, "image_processor", None), "is_vqa", None)
    if kind != "audio" and rendered is None:
        media = {} if kind is None else {"images": [medium]}
        return prompt_encoder(model, processor, text, media)[1](media), start.to(device)
    if kind == "audio":
        rate = sampling_rate(processor)
        encoded = processor.feature_extractor(medium, sampling_rate=rate, return_tensors="pt")
    else:
        options = {"header_text": text} if rendered else {}
        encoded = processor.image_processor(medium, return_tensors="pt", **options)
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in encoded.items() if isinstance(value, Tensor)
    }  # fmt: skip
    if text.strip() and not (kind == "image" and rendered):
        get_prompt_ids = getattr(processor, "get_prompt_ids", None)
        prompt = (
            torch.as_tensor(get_prompt_ids(text)).long() if get_prompt_ids is not None
            else tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()
        )  # fmt: skip
        # Whisper's prompt is text before the start; other decoders continue the text.
        parts = (prompt[None], start) if get_prompt_ids is not None else (start, prompt[None])
        start = torch.cat(parts, dim=1)
    return inputs, start.to(device)


def generate_answer(model: Any, prompt: EncodedPrompt, count: int) -> Int[Tensor, "1 token"]:
    """Generates an answer greedily."""
    output = generate_greedily(model, {**prompt.inputs, "decoder_input_ids": prompt.start}, max_new_tokens=count)
    return output[:, prompt.start.shape[1] :]


def generate_greedily(model: Any, inputs: Inputs, **options: Any) -> Int[Tensor, "batch token"]:
    """Generates by greedy decoding, without the loop of Whisper over segments of 30 s.

    Returns:
        The first tokens of the decoder and the generated ones.
    """
    from transformers import GenerationMixin

    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    mixin: Any = GenerationMixin
    return mixin.generate(model, **inputs, **options, **greedy)


def start_tokens(model: Any, tokenizer: Any) -> Int[Tensor, "1 token"]:
    """Returns the tokens that the decoder starts with, before any text.

    Raises:
        ConfigError: none are configured.
    """
    if prefix := list(getattr(tokenizer, "prefix_tokens", None) or ()):
        return torch.tensor([prefix])
    for config in (model.generation_config, model.config, model.config.get_text_config(decoder=True)):
        if isinstance(start := getattr(config, "decoder_start_token_id", None), int):
            # Whisper writes text without times after this token, which is part of WhisperTokenizer's prefix.
            plain = tokenizer.get_vocab().get("<|notimestamps|>")
            # BART-like decoders, as of Florence-2, always write this token first.
            forced = getattr(model.generation_config, "forced_bos_token_id", None)
            return torch.tensor([[token for token in (start, plain, forced) if isinstance(token, int)]])
    raise ConfigError(
        type(model).__name__, expected="a decoder_start_token_id in the configuration", got="none",
        fix="Set model.generation_config.decoder_start_token_id to the token that starts the decoder's text.",
    )  # fmt: skip
