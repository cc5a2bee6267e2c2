"""``AskedModel``: answers batches of questions with a Hugging Face model, by likelihood or by generation."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...diagnostics.interventions import without_modality
from ...diagnostics.steering import steer
from ...errors import EquipoiseError
from ...inspection.prompt_inputs import Inputs, complete_inputs, placeholders, prompt_encoder, tokenizer_of
from ...recording import ConfirmedLabels, watch
from .blind_test import Call
from .call_journal import Reply
from .choice_tokens import ChoiceTokens
from .feature_cache import FeatureCache
from .media_conditions import STEER
from .question_batches import equal_groups, join_inputs, layout
from .question_set import checked_medium
from .shared_prompts import ScoredAnswers, SharedPrompts, score_answers

FIELD = {"image": "images", "audio": "audio"}
SAMPLE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, OSError)
"""Errors of a sample that the processor or the model cannot take, which do not end the evaluation."""


class ScoredRow(NamedTuple):
    """A row of a batch whose likelihoods are needed.

    Attributes:
        inputs: inputs of one sample, which may end with an answer.
        start: position of the query that predicts the first token of the answer.
        call: index of the call.
        answers: choice -> token ids (1, token) of the answers that the row scores.
    """

    inputs: Inputs
    start: int
    call: int
    answers: dict[int, Tensor]


class Answer(NamedTuple):
    """The answer to a question.

    Attributes:
        text: the reply.
        share: share of attention on the media; None if it was not recorded.
        likelihood: log-likelihood of the right choice; None for generated answers.
    """

    text: str
    share: float | None = None
    likelihood: float | None = None


class AskedModel:
    """Answers questions by likelihood or by generation.

    Args:
        model, processor: a transformers model and its processor.
        max_new_tokens: maximum length of generated answers.
        batch_size: number of rows in one forward pass.
        by_likelihood: whether the most likely choice is the reply, instead of a generated text.

    Attributes:
        features: encoder outputs that conditions share while ``features.open()`` is entered.
        notes: sentences on conditions and values that the model does not have.
        identity: what replies depend on apart from the weights and the question.
        records_attention: whether shares of attention are recorded.
    """

    ids = "input_ids"
    """Name of the input that an answer continues."""
    notes: tuple[str, ...] = ()
    identity = ""
    records_attention = True
    _layers: tuple[str, ...] | None = None
    """Layers whose attention is recorded; None for all."""

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, batch_size: int, by_likelihood: bool) -> None:
        self.model, self.processor, self.tokenizer = model, processor, tokenizer_of(processor)
        self.max_new_tokens, self.batch_size, self.by_likelihood = max_new_tokens, batch_size, by_likelihood
        self._given: dict[int, Inputs] = {}
        self._beta = 0.0
        # Whisper writes a space first, as it reads one before its prompt.
        lead = " " if hasattr(processor, "get_prompt_ids") else ""
        self._choices = ChoiceTokens(self.tokenizer, placeholders(model.config), lead)
        self._labels, self.features = ConfirmedLabels(model), FeatureCache(model)
        self._prompts = SharedPrompts(model)

    def replies(self, calls: list[Call]) -> list[Reply]:
        """Answers questions under one condition; if a batch fails, each question on its own."""
        try:
            return self._replies(calls)
        except EquipoiseError:
            raise
        except SAMPLE_ERRORS as error:
            if len(calls) == 1:
                return [Reply(None, f"{type(error).__name__}: {error}"[:500])]
            return [reply for one in calls for reply in self.replies([one])]

    def _replies(self, calls: list[Call]) -> list[Reply]:
        inputs = [self._encoded(one) for one in calls]
        kinds = sorted({name for one in calls for name, _ in one.media})
        condition = calls[0].condition
        self._beta = float(condition.removeprefix(STEER)) if condition.startswith(STEER) else 0.0
        measured = condition == "given" or self._beta != 0
        recorded = kinds if measured and self.records_attention else []
        hidden = kinds if condition == "hidden" else []
        answer = self._most_likely if self.by_likelihood else self._generated
        # The attention of the encoder is recorded as well, so that it has to run.
        with nullcontext() if recorded else self.features.reused(condition):
            answers = answer(calls, inputs, recorded, hidden)
        return [
            Reply(one.text, extra={
                **({"attention_share": one.share} if recorded else {}),
                **({"log_likelihood": one.likelihood} if measured and self.by_likelihood else {}),
            }) for one in answers
        ]  # fmt: skip

    def _encoded(self, call: Call) -> Inputs:
        index = call.question.index
        if (call.condition == "hidden" or call.condition.startswith(STEER)) and index in self._given:
            return self._given[index]
        inputs = self._encode(call)
        if call.condition == "given":
            if len(self._given) >= self.batch_size:
                self._given.clear()
            self._given[index] = inputs
        return inputs

    def _encode(self, call: Call) -> Inputs:
        groups: dict[str, list[Any]] = {}
        for name, value in call.media:
            groups.setdefault(FIELD[name], []).append(checked_medium(name, value, call.question.index))
        _, encode = prompt_encoder(self.model, self.processor, call.prompt, groups)
        return encode(groups)

    def _complete(self, inputs: Inputs, answer: Tensor) -> Inputs:
        return complete_inputs(inputs, answer, self.model.config.model_type)

    def _most_likely(
        self, calls: list[Call], inputs: list[Inputs], kinds: list[str], hidden: list[str]
    ) -> list[Answer]:  # fmt: skip
        answers = [self._choices.of(one.question) for one in calls]
        shareable = [self._shareable_kind(*pair, hidden) for pair in zip(inputs, answers, strict=True)]
        results = [
            None if kind is None else self._with_shared_prompt(one, some, kinds, hidden)
            for kind, one, some in zip(shareable, inputs, answers, strict=True)
        ]
        rest = [n for n, one in enumerate(results) if one is None or not self._prompts.is_trusted(shareable[n])]
        for n, complete in zip(rest, self._scored(rest, inputs, answers, kinds, hidden), strict=True):
            if shareable[n] is not None:
                self._prompts.check(shareable[n], results[n], complete)
            results[n] = complete
        replies = []
        for one, (values, share) in zip(calls, cast(list[ScoredAnswers], results), strict=True):
            if any(value != value for value in values):
                raise ValueError("the log-likelihood of a choice is NaN")
            best = max(range(len(values)), key=values.__getitem__)
            replies.append(Answer(one.question.choices[best], share, values[one.question.target or 0]))
        return replies

    def _shareable_kind(self, inputs: Inputs, answers: list[Tensor], hidden: list[str]) -> Hashable:
        """Returns the kind of inputs whose prompt may be shared by all answers; None if it is not."""
        kind = (layout(inputs), bool(hidden), self._beta != 0)
        several = any(ids.shape[1] > 1 for ids in answers)
        return kind if several and self._prompts.may_share(kind) else None

    def _with_shared_prompt(
        self, inputs: Inputs, answers: list[Tensor], kinds: list[str], hidden: list[str]
    ) -> ScoredAnswers | None:
        # Interventions label the keys of one sample after another.
        size = 1 if hidden or self._beta else self.batch_size
        try:
            with self._attention(inputs, [inputs[self.ids].shape[1] - 1], kinds, hidden) as record:
                values = score_answers(self.model, inputs, answers, size)
        except (*SAMPLE_ERRORS, AttributeError, NotImplementedError):
            return None
        return ScoredAnswers(values, _share(record, kinds, 0))

    def _scored(
        self, chosen: list[int], inputs: list[Inputs], answers: list[list[Tensor]], kinds: list[str], hidden: list[str]
    ) -> list[ScoredAnswers]:
        """Scores the answers to some of the calls, each choice of several tokens in a row of its own."""
        rows = [row for index in chosen for row in self._rows(index, inputs[index], answers[index])]
        scores = {index: [0.0] * len(answers[index]) for index in chosen}
        shares: dict[int, float | None] = {}
        for group in equal_groups([layout(row.inputs) for row in rows], self.batch_size):
            some = [rows[index] for index in group]
            batch = join_inputs([row.inputs for row in some], self._padding)
            with self._attention(batch, [row.start for row in some], kinds, hidden) as record:
                logits = self.model(**batch).logits
            for place, row in enumerate(some):
                shares[row.call] = _share(record, kinds, place)
                for choice, answer in row.answers.items():
                    count = answer.shape[1]
                    likely = logits[place, row.start : row.start + count].float().log_softmax(dim=-1)
                    value = likely.gather(1, answer[0, :, None].to(likely.device)).double().mean()
                    scores[row.call][choice] = float(value)
        return [ScoredAnswers(scores[index], shares[index]) for index in chosen]

    def _rows(self, index: int, inputs: Inputs, answers: list[Tensor]) -> list[ScoredRow]:
        start = inputs[self.ids].shape[1] - 1
        if all(ids.shape[1] == 1 for ids in answers):
            # One row without an answer has the likelihoods of all choices.
            return [ScoredRow(inputs, start, index, dict(enumerate(answers)))]
        return [ScoredRow(self._complete(inputs, ids), start, index, {n: ids}) for n, ids in enumerate(answers)]

    def _generated(
        self, calls: list[Call], inputs: list[Inputs], kinds: list[str], hidden: list[str]
    ) -> list[Answer]:  # fmt: skip
        answers: list[Answer] = [Answer("")] * len(calls)
        for group in equal_groups([self._generation_layout(one) for one in inputs], self.batch_size):
            batch = self._joined_for_generation([inputs[index] for index in group])
            options = {"pad_token_id": self._padding} if len(group) > 1 else {}
            with self._attention(batch, None, kinds, hidden) as record:
                output = self._generate(batch, max_new_tokens=self.max_new_tokens, **options)
            written = output[:, batch[self.ids].shape[1] :]
            for place, index in enumerate(group):
                text = self.tokenizer.decode(written[place], skip_special_tokens=True).strip()
                answers[index] = Answer(text, _share(record, kinds, place))
        return answers

    def _generation_layout(self, inputs: Inputs) -> Hashable:
        return layout(inputs)

    def _joined_for_generation(self, rows: Sequence[Inputs]) -> Inputs:
        return join_inputs(rows, self._padding, left=True)

    def _generate(self, batch: Inputs, **options: Any) -> Tensor:
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        suppressed = placeholders(self.model.config) or None
        return self.model.generate(**batch, **options, suppress_tokens=suppressed, **greedy)

    @contextmanager
    def _attention(self, batch: Inputs, starts: list[int] | None, kinds: list[str], hidden: list[str]) -> Iterator[Any]:
        """Records attention on ``kinds``, or hides media; without tracing for kinds of inputs that were traced once.

        The recorded queries are those that predict the first token, or all that generate the answer.
        """
        if not kinds and not hidden:
            yield None
            return
        with self._labels.repeated((layout(batch), starts is None)):
            if hidden:
                with without_modality(self.model, hidden):
                    yield None
                return
            queries: Any = "last"
            if starts is not None:
                queries = torch.zeros_like(batch[self.ids], dtype=torch.bool)
                queries[torch.arange(len(starts)), torch.tensor(starts)] = True
            # With a media condition "steer", all kinds of media are steered.
            steered = steer(self.model, **dict.fromkeys(kinds, self._beta)) if self._beta else nullcontext()  # type: ignore[arg-type]
            with _quiet_watch(self.model, queries, self._layers) as record, steered:
                yield record

    @property
    def _padding(self) -> int:
        for name in ("pad_token_id", "eos_token_id"):
            if isinstance(number := getattr(self.tokenizer, name, None), int):
                return number
        return 0


@contextmanager
def _quiet_watch(model: Any, queries: Any, layers: Sequence[str] | None) -> Iterator[Any]:
    """``watch`` without warnings about layers that cannot be recorded, which do not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with watch(model, queries=queries, layers=layers) as record:
            yield record


def _share(record: Any, kinds: Sequence[str], sample: int) -> float | None:
    """Share of attention on the media of a sample, mean over layers and heads."""
    if record is None or not record.layers or not set(kinds) <= set(record.names):
        return None
    columns = [record.names.index(name) for name in kinds]
    shares = [float(record.share(layer)[sample][..., columns].sum(dim=-1).mean()) for layer in record.layers]
    return sum(shares) / len(shares)
