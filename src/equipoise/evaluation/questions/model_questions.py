"""Evaluates a Hugging Face vision-language or audio-language model on questions with and without their media."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...diagnostics.interventions import without_modality
from ...errors import ConfigError, DataError, EquipoiseError, unknown_name
from ...inspection.prompt_inputs import Inputs, complete_inputs, placeholders, prompt_encoder, tokenizer_of
from ...nn.eval_mode import eval_mode_no_grad
from ...recording import labels_for, watch
from .answer_scoring import choice, scoring_for
from .blind_test import ask_all, result_of
from .call_journal import CallJournal, Reply
from .media_conditions import Media, MediaConditions
from .question_result import QuestionResult
from .question_set import RATE, MediaQuestion, check_choice, read_questions

CONDITIONS = ("given", "blank", "other", "hidden", "none")
"""Conditions of a model; "hidden" masks all tokens of the medium in attention."""
SCORES = ("auto", "likelihood", "generated")
FIELD = {"image": "images", "audio": "audio"}


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
    seed: int = 0,
    journal: str | Path | None = None,
    root: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    name: str = "",
) -> QuestionResult:
    """Asks a model each question with and without its image or sound.

    The conditions: as given, a blank one, that of another question, hidden from attention, and without any.

    Args:
        model: a decoder-only transformers model with images or audio (LLaVA, Qwen-VL, Gemma, Qwen-Audio, ...).
        processor: its processor.
        samples: as for ``blind``.
        conditions: some of "given", "blank", "other", "hidden" and "none"; "given" is required.
        score: "likelihood" chooses the choice with the highest mean log-likelihood of its tokens after the question;
            "generated" reads the answer that the model writes, by greedy decoding; "auto" is "likelihood" if all
            questions have choices.
        metric: of generated answers, as in ``blind``.
        template: prompt with {} in place of the question.
        max_new_tokens: maximum length of generated answers.
        batch_size: number of choices in one forward pass, where they have the same number of tokens.
        limit: number of leading questions; all by default.
        seed: of the permutation for "other".
        journal: file of replies; a later call with the same model and file asks only what has no reply.
        root: folder of relative paths.
        progress: called with the number of replies and their total.
        name: of the model, for tables.

    Returns:
        QuestionResult; ``extra["attention_share"]`` has the share of attention on the medium by the query that predicts
        the first token of the answer, as given, averaged over layers and heads.

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
    if "{}" not in template:
        raise ConfigError("evaluate template", expected="a text with {} in place of the question", got=repr(template))
    for option, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"evaluate {option}", expected="at least 1", got=str(value))
    rows = samples if limit is None else [sample for _, sample in zip(range(limit), samples, strict=False)]
    questions = read_questions(rows, who="evaluate", root=root)
    _check_media(model, questions)
    by_likelihood = score == "likelihood" or (score == "auto" and all(question.choices for question in questions))
    if by_likelihood and (without := next((q for q in questions if not q.choices), None)) is not None:
        raise DataError(
            f"evaluate sample {without.index}", expected='"choices" for score="likelihood"', got="none",
            fix='Use score="generated".',
        )  # fmt: skip
    metric_name, scoring = ("likelihood", choice) if by_likelihood else scoring_for(metric, questions)
    reader = getattr(processor, "feature_extractor", None)
    rate = int(getattr(reader, "sampling_rate", None) or RATE)
    sources = MediaConditions(questions, seed, other="other" in chosen, rate=rate)
    target = _AskedModel(model, processor, max_new_tokens, batch_size, by_likelihood)
    how = "likelihood" if by_likelihood else f"generated {max_new_tokens}"
    with eval_mode_no_grad(model):
        replies = ask_all(
            target.reply, questions, chosen, sources, CallJournal(journal), progress, who="evaluate",
            prompt=lambda question: template.replace("{}", question.text if by_likelihood else question.prompt),
            identity=f"{fingerprint(model)} {how} ",
        )  # fmt: skip
    shares = [replies["given", index].extra.get("attention_share") for index in range(len(questions))]
    return result_of(
        questions, chosen, replies, scoring, metric=metric_name, name=name, extra={"attention_share": shares}
    )


class _AskedModel:
    """Answers single questions by likelihood or by generation."""

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, batch_size: int, by_likelihood: bool) -> None:
        self.model, self.processor, self.tokenizer = model, processor, tokenizer_of(processor)
        self.max_new_tokens, self.batch_size, self.by_likelihood = max_new_tokens, batch_size, by_likelihood

    def reply(self, question: MediaQuestion, condition: str, media: Media, prompt: str) -> Reply:
        try:
            return self._reply(question, condition, media, prompt)
        except EquipoiseError:
            raise
        # One sample that the processor or the model cannot take does not end the evaluation.
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, OSError) as error:
            return Reply(None, f"{type(error).__name__}: {error}"[:500])

    def _reply(self, question: MediaQuestion, condition: str, media: Media, prompt: str) -> Reply:
        groups: dict[str, list[Any]] = {}
        for name, value in media:
            groups.setdefault(FIELD[name], []).append(value)
        _, encode = prompt_encoder(self.model, self.processor, prompt, groups)
        inputs = encode(groups)
        kinds = sorted({name for name, _ in media})
        block: AbstractContextManager[Any] = (
            without_modality(self.model, kinds) if condition == "hidden" else nullcontext()
        )
        extra: dict[str, Any] = {}
        if condition == "given":
            extra["attention_share"] = self._share(inputs, kinds)
        with block:
            text = self._most_likely(inputs, question) if self.by_likelihood else self._generated(inputs)
        return Reply(text, extra=extra)

    def _generated(self, inputs: Inputs) -> str:
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        suppressed = placeholders(self.model.config)
        output = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, suppress_tokens=suppressed or None, **greedy
        )
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _most_likely(self, inputs: Inputs, question: MediaQuestion) -> str:
        tokens = [self._choice_tokens(text, question) for text in question.choices]
        scores = [0.0] * len(tokens)
        if all(ids.shape[1] == 1 for ids in tokens):
            # One pass over the prompt has the likelihoods of all choices.
            likely = self.model(**inputs).logits[0, -1].float().log_softmax(dim=-1)
            scores = [float(likely[ids[0, 0]]) for ids in tokens]
        else:
            for group in _batches(tokens, self.batch_size):
                for index, value in zip(group, self._likelihoods(inputs, [tokens[n] for n in group]), strict=True):
                    scores[index] = value
        if any(value != value for value in scores):
            raise ValueError("the log-likelihood of a choice is NaN")
        return question.choices[max(range(len(scores)), key=lambda n: scores[n])]

    def _likelihoods(self, inputs: Inputs, answers: list[Tensor]) -> list[float]:
        """Mean log-likelihood of the tokens of each answer; all answers have the same number."""
        length = inputs["input_ids"].shape[1]
        wholes = [complete_inputs(inputs, answer, self.model.config.model_type) for answer in answers]
        batch = wholes[0]
        if len(wholes) > 1:
            batch = {
                name: torch.cat([one[name] for one in wholes]) if isinstance(value, Tensor) and value.ndim else value
                for name, value in batch.items()
            }
        logits = self.model(**batch).logits[:, length - 1 : -1].float().log_softmax(dim=-1)
        target = torch.cat(answers).to(logits.device)
        return logits.gather(2, target[..., None])[..., 0].double().mean(dim=1).tolist()

    def _choice_tokens(self, text: str, question: MediaQuestion) -> Tensor:
        encoded = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        if not encoded.shape[1] or set(placeholders(self.model.config)) & set(encoded[0].tolist()):
            raise DataError(
                f"evaluate sample {question.index}", expected="choices of at least one token without placeholders",
                got=repr(text),
            )  # fmt: skip
        return encoded

    def _share(self, inputs: Inputs, kinds: list[str]) -> float | None:
        with warnings.catch_warnings():
            # Layers that cannot be recorded do not count.
            warnings.simplefilter("ignore")
            with watch(self.model, queries="last") as record:
                self.model(**inputs)
        if not record.layers or not set(kinds) <= set(record.names):
            return None
        columns = [record.names.index(name) for name in kinds]
        shares = [float(record.share(layer)[..., columns].sum(dim=-1).mean()) for layer in record.layers]
        return sum(shares) / len(shares)


def _batches(tokens: Sequence[Tensor], size: int) -> list[list[int]]:
    """Indices of choices with the same number of tokens, in groups of at most ``size``."""
    lengths: dict[int, list[int]] = {}
    for index, ids in enumerate(tokens):
        lengths.setdefault(ids.shape[1], []).append(index)
    return [group[start : start + size] for group in lengths.values() for start in range(0, len(group), size)]


def _check_media(model: Any, questions: Sequence[MediaQuestion]) -> None:
    names = labels_for(model, None, None)[0].names
    media = [name for name in names if name in FIELD]
    if not media or "text" not in names:
        raise ConfigError(
            "evaluate", expected="a generative model with images or audio, such as LLaVA or Qwen-Audio",
            got=f"{type(model).__name__}, which takes {' and '.join(names) or 'no known modality'}",
        )  # fmt: skip
    for question in questions:
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
