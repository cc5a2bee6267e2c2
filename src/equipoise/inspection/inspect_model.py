"""``look``: measures where a multimodal language model attends while it answers, and whether the answer needs it."""

from __future__ import annotations

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
from .encoder_decoder import cross_effects, trace_cross_attention
from .encoder_prompts import encode_prompt, generate_answer
from .image_scenes import WHOLE, ImageLayout, encode_png, image_layout, mean_token_layout
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
    sampling_rate,
    token_words,
    tokenizer_of,
)


def look(
    model: Any, processor: Any, *, image: Any = None, text: str = "", audio: Any = None, answer: str | None = None,
    max_new_tokens: int = 20, device: Any = None, layers: Sequence[str] | str | None = None, exclude_top_k: int = 3,
    name: str | None = None, notes: Sequence[str] = (), progress: Callable[[str], None] | None = None,
) -> Inspection:  # fmt: skip
    """Asks a Hugging Face model a question about an image or a sound, and measures where its attention goes.

    ::

        share^m   = mean over queries of sum_{j in m} A_ij     queries: the prompt's, or those that predict the answer
        uniform^m = mean over queries of |visible m| / |visible|
        L         = mean over the answer's tokens of log p(token | all before)

    The answer is generated greedily unless it is passed. Prompt and answer then run through the model in one forward
    pass without a cache, in which everything is measured. Of the attention matrices only the rows of selectable tokens
    are kept.

    Args:
        model: a transformers model (LLaVA, Qwen-VL, Gemma, Qwen-Audio, Llama, ...), or an encoder-decoder with images
            or audio (Whisper, Moonshine, Florence-2, Pix2Struct), whose cross-attention is recorded.
        processor: its processor, or its tokenizer for a text-only model.
        image: a path or a PIL image, or a list of several.
        text: the question; formatted with the chat template unless it contains the image placeholder. Encoder-decoders
            such as Whisper need none.
        audio: a path, or an array or tensor (sample,) at the model's sampling rate.
        answer: an answer to score instead of the one that the model would generate.
        max_new_tokens: maximum length of the generated answer.
        device: device to move the model to; by default the model is not moved.
        layers: names or patterns of the layers to record; all by default.
        exclude_top_k: number of tokens with the most attention that ``share_without_sinks`` excludes in each layer.
        name: name of the model in the report.
        notes: sentences shown at the top of the report.
        progress: called with a description of each step.

    Returns:
        Inspection.

    Raises:
        ConfigError: inputs that the model does not take, no text, an empty answer, or no recorded attention.
        DataError: an image or sound that cannot be decoded.

    Attention does not prove use; compare it with ``effects``. Text tokens may carry information from the image, so a
    small share in late layers does not mean that the image is ignored.

    Reference: attention sinks: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024).
    """
    progress = progress or (lambda step: None)
    if max_new_tokens < 1 or exclude_top_k < 0:
        raise ConfigError("look", expected="max_new_tokens >= 1 and exclude_top_k >= 0",
                          got=f"max_new_tokens = {max_new_tokens}, exclude_top_k = {exclude_top_k}")  # fmt: skip
    names = labels_for(model, None, None)[0].names
    images = _listed(image)
    check_given(model, names, text, images or None, audio)
    pictures = [load_image(one, who="look image") for one in images]
    picture = pictures[0] if pictures else None
    sound = None if audio is None else read_audio(audio, sampling_rate(processor), who="look audio")
    if device is not None:
        model.to(device)
    if getattr(model.config, "is_encoder_decoder", False):
        if len(pictures) > 1:
            raise ConfigError("look", expected="one image for an encoder-decoder", got=f"{len(pictures)} images")
        return _look_at_encoder(
            model, processor, text, picture, sound, answer, max_new_tokens, layers, exclude_top_k, name, notes, progress
        )
    with eval_mode_no_grad(model):
        progress("preparing the prompt")
        prompt = prepare_prompt(model, processor, text, pictures or None, sound)
        tokenizer = tokenizer_of(processor)
        if answer is None:
            progress("generating the answer")
            written = _generated(model, prompt, max_new_tokens)
        else:
            written = _given(tokenizer, answer, placeholders(model.config))
        progress("recording attention")
        full_inputs = complete_inputs(prompt.inputs, written, model.config.model_type)
        texts = token_words(tokenizer, full_inputs["input_ids"][0])
        choose = partial(trace_readers, texts, prompt.length, model.config.get_text_config().num_hidden_layers)
        logits, record, trace = trace_attention(model, full_inputs, _groups(prompt.length, len(texts)), choose, layers)
        likelihood = mean_log_likelihood(logits, written[0])
        progress("measuring ablations")
        effects = [
            *measure_effects(model, full_inputs, written),
            *blank_media(model, prompt.blank, written, likelihood),
        ]
    first = record["answer"]
    if not first.layers:
        raise first.nothing()
    target = next((kind for kind, medium in (("image", picture), ("audio", sound)) if medium is not None), None)
    labels = trace.labels
    count = 0 if labels is None or target is None else int((labels == first.names.index(target)).sum())
    maps = build_attention_maps(first.layers, record, trace, prompt.length)
    if apart := len(first.layers) - len(maps.layers):
        note = f"{apart} of {len(first.layers)} layers attend to another sequence than the text; the maps omit them."
        notes = (*notes, note)
    layout = ImageLayout(patch_grid(count, prompt.inputs, model.config, target) if target and count else None)
    if labels is not None and pictures and count:
        places = (labels == first.names.index("image")).nonzero().flatten().tolist()
        layout = image_layout(processor, prompt.process, pictures, places, prompt.inputs, model.config)
    if first.missing:
        listed = "; ".join(f"{layer}: {reason}" for layer, reason in first.missing.items())
        notes = (*notes, f"Not in the tables: {listed}.")
    return Inspection(
        model=name or getattr(model, "name_or_path", "") or type(model).__name__,
        names=first.names,
        prompt=prompt.text,
        given=answer is not None,
        answer=tokenizer.decode(written[0], skip_special_tokens=True).strip(),
        tokens=tuple(_tokens(texts, first.names, labels, prompt.length)),
        layers=tuple(first.layers),
        views={
            part: build_view(
                record[part], [trace.uniform[layer][part] for layer in first.layers], texts, labels, exclude_top_k
            )
            for part in VIEWS
        },
        log_likelihood=likelihood,
        effects=tuple(effects),
        target=target,
        grid=layout.grid,
        frame=layout.frame,
        maps=maps,
        image=encode_png(picture) if picture else None,
        exclude_top_k=exclude_top_k,
        notes=tuple(notes),
        scenes=tuple(layout.scenes),
        unplaced=tuple(layout.unplaced),
        separators=tuple(layout.separators),
    )


def _listed(image: Any) -> list[Any]:
    return [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]


def _look_at_encoder(
    model: Any, processor: Any, text: str, picture: Image.Image | None, sound: Any, answer: str | None, count: int,
    layers: Sequence[str] | str | None, exclude_top_k: int, name: str | None, notes: Sequence[str],
    progress: Callable[[str], None],
) -> Inspection:  # fmt: skip
    """Inspects the cross-attention of an encoder-decoder."""
    target = "image" if picture is not None else "audio" if sound is not None else None
    if target is None:
        raise ConfigError("look", expected="an encoder-decoder with an image or a sound", got="text only",
                          fix="Use eq.watch for encoder-decoders of text.")  # fmt: skip
    tokenizer = tokenizer_of(processor)
    with eval_mode_no_grad(model):
        progress("preparing the prompt")
        prompt = encode_prompt(model, processor, text, picture, sound)
        progress("generating the answer")
        written = (
            generate_answer(model, prompt, count) if answer is None
            else _given(tokenizer, answer, placeholders(model.config)).to(prompt.start)
        )  # fmt: skip
        progress("recording attention")
        ids = torch.cat([prompt.start, written], dim=1)[0]
        encoder_ids = prompt.inputs.get("input_ids")
        likelihood, cross = trace_cross_attention(
            model, prompt, written, token_words(tokenizer, ids), exclude_top_k, target,
            None if encoder_ids is None else token_words(tokenizer, encoder_ids[0]), layers,
        )  # fmt: skip
        progress("measuring ablations")
        effects = cross_effects(model, prompt, written, likelihood)
    layout = ImageLayout(cross.grid, frame_index(processor, picture.size) if picture else WHOLE)
    if picture:
        places = [place for place, token in enumerate(cross.tokens) if token.modality == "image"]
        layout = mean_token_layout(processor, picture, places, model.config) or layout
    return Inspection(
        model=name or getattr(model, "name_or_path", "") or type(model).__name__,
        names=tuple(labels_for(model, None, None)[0].names), prompt=text, given=answer is not None,
        answer=tokenizer.decode(written[0], skip_special_tokens=True).strip(), tokens=cross.tokens, layers=cross.layers,
        views=cross.views, log_likelihood=likelihood, effects=tuple(effects), target=target, grid=layout.grid,
        frame=layout.frame, maps=cross.maps,
        image=encode_png(picture) if picture else None, exclude_top_k=exclude_top_k, notes=tuple(notes),
        written=cross.written, scenes=tuple(layout.scenes), unplaced=tuple(layout.unplaced),
    )  # fmt: skip


def _groups(length: int, total: int) -> dict[str, Tensor]:
    """Returns the queries of each view: the prompt's tokens, and the tokens before those of the answer."""
    positions = torch.arange(total)
    return {"prompt": positions < length, "answer": (positions >= length - 1) & (positions < total - 1)}


def _generated(model: Any, prompt: PreparedPrompt, count: int) -> Int[Tensor, "1 token"]:
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    suppressed = placeholders(model.config)
    output = model.generate(**prompt.inputs, max_new_tokens=count, suppress_tokens=suppressed or None, **greedy)
    return output[:, prompt.length :]


def _given(tokenizer: Any, answer: str, placeholder_ids: Sequence[int]) -> Int[Tensor, "1 token"]:
    ids = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"] if answer.strip() else None
    if ids is None or not ids.shape[1] or set(placeholder_ids) & set(ids[0].tolist()):
        raise ConfigError("look answer", expected="text of at least one token without placeholders",
                          got=repr(answer), fix="Omit it to let the model generate an answer.")  # fmt: skip
    return ids.long()


def _tokens(texts: Sequence[str], names: Sequence[str], labels: Tensor | None, length: int) -> Iterator[InspectedToken]:
    label_ids = [-1] * len(texts) if labels is None else labels.tolist()
    for position, (text, label) in enumerate(zip(texts, label_ids, strict=True)):
        yield InspectedToken(text, names[label] if label >= 0 else None, "prompt" if position < length else "answer")
