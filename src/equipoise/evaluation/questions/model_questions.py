"""Evaluates a Hugging Face vision-language or audio-language model on questions with and without their media."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, DataError, unknown_name
from ...nn.eval_mode import eval_mode_no_grad
from ...recording import labels_for
from .answer_scoring import choice, scoring_for
from .asked_encoder_decoder import AskedEncoderDecoder
from .asked_model import FIELD, AskedModel
from .blind_test import STOP_AFTER, Call, ask_all, result_of
from .call_journal import CallJournal, Reply
from .media_conditions import STEER, MediaConditions
from .question_result import QuestionResult
from .question_set import RATE, MediaQuestion, check_choice, read_questions

CONDITIONS = ("given", "blank", "other", "hidden", "none")
"""Conditions of a model; "hidden" masks all tokens of the medium in attention."""
SCORES = ("auto", "likelihood", "generated")


def evaluate_questions(
    model: Any,
    processor: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    conditions: Sequence[str] = CONDITIONS,
    score: str = "auto",
    metric: str | Callable[[str, Mapping[str, Any]], float] | None = None,
    template: str = "{}",
    max_new_tokens: int = 16,
    batch_size: int = 1,
    limit: int | None = None,
    steer: Sequence[float] = (),
    seed: int = 0,
    journal: str | Path | None = None,
    root: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    name: str = "",
) -> QuestionResult:
    """Asks a model each question with and without its image or sound.

    The conditions: as given, a blank one, that of another question, hidden from attention, and without any.

    Args:
        model: a transformers model with images or audio (LLaVA, Qwen-VL, Gemma, Qwen-Audio, ...), or an
            encoder-decoder (Whisper, Moonshine, Pix2Struct, Florence-2) for questions about one image or sound each.
        processor: its processor.
        samples: as for ``blind``; arrays of sound are floating (sample,) at the rate of the processor.
        conditions: some of "given", "blank", "other", "hidden" and "none"; "given" is required.
        score: "likelihood" chooses the choice with the highest mean log-likelihood of its tokens after the question;
            "generated" reads the answer that the model writes, by greedy decoding; "auto" is "likelihood" if all
            questions have choices.
        metric: of generated answers, as in ``blind``.
        template: prompt with {} in place of the question; encoder-decoders also take one without it, such as "".
        max_new_tokens: maximum length of generated answers.
        batch_size: number of questions, or choices of several tokens, in one forward pass; shorter ones are padded,
            and those whose images have other sizes run in another pass.
        limit: number of leading questions; all by default.
        steer: numbers that are added to the attention logits of the media (``eq.steer``), in further passes over the
            questions as given; ``steering`` of the result has the curve.
        seed: of the permutation for "other".
        journal: file of replies; a later call with the same model and file asks only what has no reply.
        root: folder of relative paths.
        progress: called with the number of replies and their total.
        name: of the model, for tables.

    Returns:
        QuestionResult; ``extra["attention_share"]`` has the share of attention on the medium, as given, averaged over
        layers and heads: of the query that predicts the first token of a choice, or of all that generate the answer.
        ``extra["log_likelihood"]`` has that of the right choice. For encoder-decoders, the share is that of the
        decoder's cross-attention; where all of its keys belong to the medium, it is 100 % by construction and omitted.
        Conditions that the model does not have are left out; ``notes`` has a sentence on each.

    Raises:
        ConfigError: a model without images and audio, a medium that it does not take, unknown options. DataError:
            samples that cannot be read, or 20 failures in a row.
    """
    chosen = check_choice("evaluate", "conditions", conditions, CONDITIONS)
    if "given" not in chosen:
        raise ConfigError("evaluate conditions", expected="'given' among them", got=str(list(chosen)))
    chosen = ("given", *(one for one in chosen if one != "given"))
    if score not in SCORES:
        raise unknown_name("evaluate", "score", score, SCORES)
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    # An encoder-decoder may take its medium alone.
    if "{}" not in template and not decodes:
        raise ConfigError("evaluate template", expected="a text with {} in place of the question", got=repr(template))
    for option, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"evaluate {option}", expected="at least 1", got=str(value))
    betas = checked_betas(steer)
    steered = tuple(f"{STEER}{beta:g}" for beta in betas if beta)
    rows = samples if limit is None else [sample for _, sample in zip(range(limit), samples, strict=False)]
    questions = read_questions(rows, who="evaluate", root=root)
    _check_media(model, questions, single=decodes)
    by_likelihood = score == "likelihood" or (score == "auto" and all(question.choices for question in questions))
    if by_likelihood and (without := next((q for q in questions if not q.choices), None)) is not None:
        raise DataError(
            f"evaluate sample {without.index}", expected='"choices" for score="likelihood"', got="none",
            fix='Use score="generated".',
        )  # fmt: skip
    metric_name, scoring = ("likelihood", choice) if by_likelihood else scoring_for(metric, questions)
    reader = getattr(processor, "feature_extractor", None)
    rate = int(getattr(reader, "sampling_rate", None) or RATE)
    sources = MediaConditions(questions, seed, other="other" in chosen, rate=rate, who="evaluate")
    target = (AskedEncoderDecoder if decodes else AskedModel)(
        model, processor, max_new_tokens, batch_size, by_likelihood
    )
    weights = fingerprint(model)

    def identity(question: MediaQuestion) -> str:
        # The prompt of a generated answer has the choices.
        how = f"likelihood {question.choices} {question.target}" if by_likelihood else f"generated {max_new_tokens}"
        return f"{weights} {target.identity}{how} "

    def prompt(question: MediaQuestion) -> str:
        return template.replace("{}", question.text if by_likelihood else question.prompt)

    with eval_mode_no_grad(model):
        if isinstance(target, AskedEncoderDecoder):
            given = (Call(one, "given", sources.media(one, "given"), prompt(one)) for one in questions[:STOP_AFTER])
            chosen = target.examine(given, (*chosen, *steered))[: -len(steered) or None]
        with target.features.open():
            replies = ask_all(
                target.replies, questions, (*chosen, *steered), sources, CallJournal(journal), progress,
                who="evaluate", prompt=prompt, identity=identity,
                batch_size=batch_size, order=sources.order,
            )  # fmt: skip
    result = result_of(questions, chosen, replies, scoring, metric=metric_name, name=name)
    result.notes = target.notes
    if target.records_attention:
        result.extra["attention_share"] = _extras(replies, "given", len(questions), "attention_share")
    if by_likelihood:
        result.extra["log_likelihood"] = _extras(replies, "given", len(questions), "log_likelihood")
    if betas:
        result.betas = betas
        curve = result_of(questions, steered, replies, scoring, metric="", name="")
        result.errors |= curve.errors
        for condition, values in curve.scores.items():
            result.extra[condition] = [None if math.isnan(value) else float(value) for value in values]
            for name_of in ("attention_share", "log_likelihood") if by_likelihood else ("attention_share",):
                result.extra[f"{condition} {name_of}"] = _extras(replies, condition, len(questions), name_of)
    return result


def checked_betas(values: Sequence[float]) -> tuple[float, ...]:
    """Returns the numbers for ``steer`` in ascending order, with 0, the questions as given.

    Raises:
        ConfigError: values other than numbers from -100 to 100.

    Example:
        >>> checked_betas([1, -2]), checked_betas([])
        ((-2.0, 0.0, 1.0), ())
    """
    try:
        betas = [math.nan if isinstance(value, str) else float(value) for value in values]
    except (TypeError, ValueError):
        betas = [math.nan]
    if not all(abs(beta) <= 100 for beta in betas):
        raise ConfigError("evaluate steer", expected="a list of numbers from -100 to 100", got=repr(values))
    # Conditions are named by the number with six digits.
    return tuple(sorted({0.0, *(float(f"{beta:g}") for beta in betas)})) if betas else ()


def _extras(replies: Mapping[tuple[str, int], Reply], condition: str, count: int, name: str) -> list[float | None]:
    return [replies[condition, index].extra.get(name) for index in range(count)]


def _check_media(model: Any, questions: Sequence[MediaQuestion], single: bool) -> None:
    names = labels_for(model, None, None)[0].names
    media = [name for name in names if name in FIELD]
    if not media or "text" not in names:
        raise ConfigError(
            "evaluate", expected="a generative model with images or audio, such as LLaVA or Qwen-Audio",
            got=f"{type(model).__name__}, which takes {' and '.join(names) or 'no known modality'}",
        )  # fmt: skip
    if not getattr(model, "can_generate", bool)():
        raise ConfigError(
            "evaluate", expected="a generative model", fix="Load it as ...ForConditionalGeneration.",
            got=f"{type(model).__name__}, which has no language modeling head",
        )  # fmt: skip
    for question in questions:
        if single and len(question.media) > 1:
            raise ConfigError(
                f"evaluate sample {question.index}", expected=f"one {' or '.join(media)} for an encoder-decoder",
                got=f"{len(question.media)}",
            )  # fmt: skip
        for name, _ in question.media:
            if name not in media:
                raise ConfigError(
                    f"evaluate sample {question.index}",
                    expected=f"inputs of {type(model).__name__}: {' and '.join(names)}",
                    got=name,
                )


def fingerprint(model: Any) -> str:
    """Returns a hash of some of the weights, so that replies of another model are not reused for this one."""
    parts = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.state_dict().items():
        values = weight.flatten()[:64].detach().to("cpu", torch.float32) if weight.numel() else torch.zeros(0)
        parts.update(f"{name}{tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return parts.hexdigest()[:16]
