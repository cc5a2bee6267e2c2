"""``look``: where a model that reads pictures or sounds looks while it answers, and whether its answer needs them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..nn.eval_mode import eval_mode_no_grad
from ..recording import labels_for
from .attention_maps import build_attention_maps, trace_readers
from .attention_trace import trace_attention
from .inspection_result import VIEWS, InspectedToken, Inspection, build_view
from .media_effects import blank_media, mean_log_likelihood, measure_effects
from .patch_layout import frame_index, patch_grid
from .prompt_inputs import (
    PreparedPrompt,
    check_given,
    complete_inputs,
    load_image,
    placeholders,
    prepare_prompt,
    read_audio,
    token_words,
    tokenizer_of,
)

PICTURE = 512
"""Pixels of the longer side of the picture in the page."""


def look(
    model: Any, processor: Any, *, image: Any = None, text: str, audio: Any = None, answer: str | None = None,
    max_new_tokens: int = 20, device: Any = None, sites: Sequence[str] | str | None = None, sinks: int = 3,
    name: str | None = None, notes: Sequence[str] = (), tell: Callable[[str], None] | None = None,
) -> Inspection:  # fmt: skip
    """Asks a model of Hugging Face a question about a picture or a sound, and looks where it looks.

    ::

        share^m   = mean over queries of sum_{j in m} A_ij     prompt: all its tokens; answer: those that write it
        even^m    = mean over queries of |visible m| / |visible|
        L         = mean over the answer's tokens of log p(token | all before)

    The answer is written greedily, or given, and then read once more together with the prompt; everything is measured
    in that one pass, without a cache. No attention matrix is kept but the rows of the tokens that can be chosen.

    Args:
        model: of transformers, one that reads and writes one sequence (LLaVA, Qwen-VL, Gemma, Qwen-Audio, Llama, ...).
        processor: its processor; a tokenizer for a model that reads text alone.
        image: a path, or a picture of PIL.
        text: the question; put into the model's chat template, unless it has the image's placeholder already.
        audio: a path, or (sample,) at the model's rate.
        answer: whose likelihood is asked for, in place of what the model would write.
        max_new_tokens: of the answer.
        device: moves the model there and leaves it there; by default it stays where it is.
        sites: names or patterns of the layers to watch; all by default.
        sinks: number of top tokens that are left out in the second figures.
        name: of the model, for the page.
        notes: sentences that the page shows in front.
        tell: is told what is done at the moment.

    Returns:
        Look.

    Raises:
        ConfigError: what is given is not what the model reads; no text; an empty answer; nothing seen.
        DataError: a picture or sound that cannot be read.

    Attention is no proof of use; read it beside ``effects``. Tokens beside a picture may carry it further, so that a
    small share in late layers is no neglect.

    Reference: spec 8.1; sinks: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024).
    """
    tell = tell or (lambda step: None)
    if max_new_tokens < 1 or sinks < 0:
        raise ConfigError("look", expected="max_new_tokens from 1 and sinks from 0 on",
                          got=f"max_new_tokens = {max_new_tokens}, sinks = {sinks}")  # fmt: skip
    names = labels_for(model, None, None)[0].names
    check_given(model, names, text, image, audio)
    picture = None if image is None else load_image(image, who="look image")
    sound = None if audio is None else read_audio(audio, processor.feature_extractor.sampling_rate, who="look audio")
    if device is not None:
        model.to(device)
    with eval_mode_no_grad(model):
        tell("reading the question")
        prompt = prepare_prompt(model, processor, text, picture, sound)
        tokenizer = tokenizer_of(processor)
        if answer is None:
            tell("writing the answer")
            written = _generated(model, prompt, max_new_tokens)
        else:
            written = _given(tokenizer, answer, placeholders(model.config))
        tell("watching")
        whole = complete_inputs(prompt.inputs, written, model.config.model_type)
        texts = token_words(tokenizer, whole["input_ids"][0])
        choose = partial(trace_readers, texts, prompt.length, model.config.get_text_config().num_hidden_layers)
        logits, seen, trace = trace_attention(model, whole, _groups(prompt.length, len(texts)), choose, sites)
        likelihood = mean_log_likelihood(logits, written[0])
        tell("taking away what it is given")
        effects = [*measure_effects(model, whole, written), *blank_media(model, prompt.blank, written, likelihood)]
    first = seen["answer"]
    if not first.layers:
        raise first.nothing()
    target = next((kind for kind, given in (("image", picture), ("audio", sound)) if given is not None), None)
    labels = trace.labels
    count = 0 if labels is None or target is None else int((labels == first.names.index(target)).sum())
    maps = build_attention_maps(first.layers, seen, trace, prompt.length)
    if apart := len(first.layers) - len(maps.layers):
        said = f"{apart} of {len(first.layers)} layers read another stream than the words; the maps leave them out."
        notes = (*notes, said)
    if first.missing:
        listed = "; ".join(f"{site}: {why}" for site, why in first.missing.items())
        notes = (*notes, f"Not in the tables: {listed}.")
    return Inspection(
        model=name or getattr(model, "name_or_path", "") or type(model).__name__,
        names=first.names, prompt=prompt.text, given=answer is not None,
        answer=tokenizer.decode(written[0], skip_special_tokens=True).strip(),
        tokens=tuple(_tokens(texts, first.names, labels, prompt.length)), sites=tuple(first.layers),
        views={
            part: build_view(seen[part], [trace.even[site][part] for site in first.layers], texts, labels, sinks)
            for part in VIEWS
        },
        log_likelihood=likelihood, effects=tuple(effects), target=target,
        grid=patch_grid(count, prompt.inputs, model.config, target) if target and count else None,
        frame=frame_index(processor, picture.size) if picture else (0.0, 0.0, 1.0, 1.0),
        maps=maps, picture=_png(picture) if picture else None, left_out=sinks, notes=tuple(notes),
    )  # fmt: skip


def _groups(length: int, total: int) -> dict[str, Tensor]:
    """Who reads: all of the prompt, and those that write the answer, each the token before."""
    places = torch.arange(total)
    return {"prompt": places < length, "answer": (places >= length - 1) & (places < total - 1)}


def _generated(model: Any, prompt: PreparedPrompt, count: int) -> Int[Tensor, "1 token"]:
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    barred = placeholders(model.config)
    found = model.generate(**prompt.inputs, max_new_tokens=count, suppress_tokens=barred or None, **greedy)
    return found[:, prompt.length :]


def _given(tokenizer: Any, answer: str, barred: Sequence[int]) -> Int[Tensor, "1 token"]:
    ids = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"] if answer.strip() else None
    if ids is None or not ids.shape[1] or set(barred) & set(ids[0].tolist()):
        raise ConfigError("look answer", expected="words that the model could write, one token or more",
                          got=repr(answer), fix="Leave it out, and the model writes one.")  # fmt: skip
    return ids.long()


def _tokens(texts: Sequence[str], names: Sequence[str], labels: Tensor | None, length: int) -> Iterator[InspectedToken]:
    known = [-1] * len(texts) if labels is None else labels.tolist()
    for place, (text, label) in enumerate(zip(texts, known, strict=True)):
        yield InspectedToken(text, names[label] if label >= 0 else None, "prompt" if place < length else "answer")


def _png(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((PICTURE, PICTURE))
    sheet = io.BytesIO()
    small.save(sheet, format="PNG", optimize=True)
    return sheet.getvalue()
