"""``AskedEncoderDecoder``: answers questions with models whose decoder reads the media by cross-attention."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, DataError, EquipoiseError
from ...inspection.encoder_decoder import record_cross_attention
from ...inspection.encoder_prompts import encode_medium, generate_greedily, start_tokens
from ...inspection.prompt_inputs import Inputs
from .asked_model import SAMPLE_ERRORS, AskedModel
from .blind_test import Call
from .media_conditions import STEER
from .question_batches import join_inputs, layout
from .question_set import checked_medium


class AskedEncoderDecoder(AskedModel):
    """Answers questions about one image or sound each. The answer continues the first tokens of the decoder.

    Args:
        model, processor, max_new_tokens, batch_size, by_likelihood: as in ``AskedModel``.
    """

    ids = "decoder_input_ids"

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, batch_size: int, by_likelihood: bool) -> None:
        super().__init__(model, processor, max_new_tokens, batch_size, by_likelihood)
        self.identity = f"{start_tokens(model, self.tokenizer).tolist()} "

    def examine(self, calls: Iterable[Call], conditions: Sequence[str]) -> tuple[str, ...]:
        """Returns the conditions that the model has, after a look at the first question that it can run.

        The keys of the decoder's cross-attention are recorded. If all belong to the medium, their share is 100 % by
        construction, and neither recorded nor steered. ``notes`` has a sentence on everything that is left out.

        Args:
            calls: questions as given.
            conditions: names of conditions.

        Raises:
            ConfigError: steering of attention that cannot be steered. DataError: no question can be run.
        """
        error: Exception | None = None
        for call in calls:
            try:
                _, trace = record_cross_attention(self.model, self._encode(call))
            except EquipoiseError:
                raise
            except SAMPLE_ERRORS as raised:
                error = error or raised
                continue
            name, (kind, _) = type(self.model).__name__, call.media[0]
            known = trace.labels[trace.labels >= 0]
            self._layers, self.records_attention = tuple(trace.rows), bool((known != trace.names.index(kind)).any())
            if not self.records_attention:
                self._check_not_steered(kind, conditions)
                self.features.encoders = (self.model.get_encoder(),)
                self.notes = (
                    f"The decoder reads the {kind} by cross-attention, all keys of which are {kind}: its share of "
                    "attention is 100 % by construction and is not reported.",
                )
            if "none" in conditions and not (self.records_attention and self._runs_without_media(call)):
                self.notes += (f"The condition 'none' is not available: {name} does not run without its {kind}.",)
                conditions = [one for one in conditions if one != "none"]
            return tuple(conditions)
        raise DataError(
            "evaluate", expected=f"questions that {type(self.model).__name__} can run",
            got=f"{type(error).__name__}: {error}"[:500], fix="Check the media and the processor.",
        ) from error  # fmt: skip

    def _check_not_steered(self, kind: str, conditions: Sequence[str]) -> None:
        if any(one.startswith(STEER) for one in conditions):
            raise ConfigError(
                "evaluate steer", expected=f"a model whose attention has keys of {kind} and of text",
                got=f"{type(self.model).__name__}, whose decoder reads the {kind} by cross-attention of its own",
                fix="Leave it out: softmax does not change if the same number is added to all logits.",
            )  # fmt: skip

    def _runs_without_media(self, call: Call) -> bool:
        try:
            self.model(**self._encode(call._replace(condition="none", media=())), use_cache=False)
        except SAMPLE_ERRORS:
            return False
        return True

    def _encode(self, call: Call) -> Inputs:
        kind, medium = call.media[0] if call.media else (None, None)
        if kind is not None:
            medium = checked_medium(kind, medium, call.question.index)
        inputs, start = encode_medium(self.model, self.processor, call.prompt, kind, medium)
        return {**inputs, self.ids: start}

    def _complete(self, inputs: Inputs, answer: Tensor) -> Inputs:
        return {**inputs, self.ids: torch.cat([inputs[self.ids], answer.to(inputs[self.ids])], dim=1)}

    @contextmanager
    def _attention(self, batch: Inputs, starts: list[int] | None, kinds: list[str], hidden: list[str]) -> Iterator[Any]:
        # Tracing needs a run of the encoder.
        traced = hidden and not self._labels.is_confirmed((layout(batch), starts is None))
        with (
            self.features.reused("") if traced else nullcontext(),
            super()._attention(batch, starts, kinds, hidden) as record,
        ):
            yield record

    def _generation_layout(self, inputs: Inputs) -> Hashable:
        # Padding of the decoder would move the positions of some models.
        return layout(inputs), inputs[self.ids].shape

    def _joined_for_generation(self, rows: Sequence[Inputs]) -> Inputs:
        return join_inputs(rows, self._padding)

    def _generate(self, batch: Inputs, **options: Any) -> Tensor:
        return generate_greedily(self.model, batch, **options)
