"""Decoding loops of ``generate``: which queries of a forward pass write which token of which returned sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from .shared_patches import wrapped

KINDS = {"_sample": "sample", "_beam_search": "beams", "_assisted_decoding": "assisted"}
"""The methods of transformers' ``GenerationMixin`` that decode."""

FIRST = ("input_ids", "logits_processor", "stopping_criteria", "generation_config")
"""Their first arguments."""

UNKNOWN = "it ran in a decoding loop of its own (custom_generate), whose steps cannot be told from one another"
KEPT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
"""Options that only matter for a result in the form of a dictionary."""


class Step(NamedTuple):
    """Queries whose place in the returned sequences is known later.

    Attributes:
        loop: that they belong to.
        number: of the forward pass.
        draft: 0 for the query that writes the next token, n for the one behind n tokens of a draft.
    """

    loop: Loop
    number: int
    draft: int = 0


class Chosen(NamedTuple):
    """Attributes:
    index: (row,) sample of the forward pass that each returned sequence continues.
    keep: (row,) whether the returned sequence holds what the query wrote.
    """

    index: Int[Tensor, " row"]
    keep: Bool[Tensor, " row"]


class Columns(NamedTuple):
    """Some queries of a forward pass, counted from its end.

    Attributes:
        first, last: -1 is the last query; None is the first.
        writes: whether the last of them writes a token, so that it is a ``"last"`` query.
        step: of queries that are assigned later; None where each sample is a returned sequence.
    """

    first: int | None
    last: int
    writes: bool
    step: Step | None = None


class Loop:
    """A decoding loop that runs.

    Args:
        model: that generates.
        kind: one of ``KINDS``, or ``"unknown"``.
        prompt: number of tokens of the prompt.
        chunks: forward passes that the prompt takes.
        draft: the loop proposes tokens for another loop of the same model.

    Attributes:
        done: (sample,) which samples have finished; None before the first token.
        first: no forward pass has been seen before this one.
        over: all samples have finished.
        running: a forward pass of the model runs.
    """

    def __init__(self, model: nn.Module, kind: str, prompt: int = 0, chunks: int = 1, *, draft: bool = False) -> None:
        self.model, self.kind, self.draft, self._prompt, self._chunks = model, kind, draft, prompt, chunks
        self.done: Bool[Tensor, " sample"] | None = None
        self.number, self.over, self.running = 0, False, False
        self.passes = 0
        """Forward passes since the last token."""
        self._written, self._drafted = 0, 0
        self._accepted: dict[int, int] = {}

    @property
    def first(self) -> bool:
        return self.number == 0 and self.passes <= 1

    @property
    def aside(self) -> bool:
        """Whether this pass writes nothing itself: a draft, or a second pass as for guidance without the prompt."""
        if self.kind == "unknown":
            return False
        return self.draft or self.passes > (1 if self.number else self._chunks)

    @property
    def partial(self) -> bool:
        """Whether the pass reads a part of the prompt."""
        return self._chunks > 1 and self.number == 0

    @property
    def text(self) -> int:
        """Tokens at the end of the sequence that did not come with the prompt."""
        return self._written + self._drafted

    def begin(self) -> None:
        """A forward pass begins."""
        self.passes, self.running = self.passes + 1, True

    def drafted(self, count: int) -> None:
        """So many tokens of a draft will be checked in the next pass."""
        self._drafted = count

    def wrote(self, length: int, done: Tensor | None) -> None:
        """The pass has led to tokens: sequences of this length, and whether each is complete and only padded now."""
        if done is not None:
            self.done = done if self.done is None else self.done | done
        self._accepted[self.number] = length - self._prompt - self._written
        self._written = length - self._prompt
        self.number, self.passes, self._drafted = self.number + 1, 0, 0

    def columns(self) -> list[Columns]:
        """The queries of this pass that no pass before it has had, in groups."""
        first = -1 - self._drafted
        new = None if self.number == 0 else first
        writes = self.number > 0 or self.passes == self._chunks
        if self.kind == "beams":
            return [Columns(new, first, writes, Step(self, self.number))]
        drafts = [Columns(at, at, True, Step(self, self.number, at - first)) for at in range(first + 1, 0)]
        return [Columns(new, first, writes), *drafts]

    def accepted(self, step: Step) -> Chosen | None:
        """What became of a draft; None where it was rejected."""
        if step.draft >= self._accepted.get(step.number, 0):
            return None
        return Chosen(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool))


@contextmanager
def decoding_loops(session: Any) -> Iterator[None]:
    """Follows the decoding loops of ``generate`` of Hugging Face models."""
    with ExitStack() as stack:
        done: set[tuple[type, str]] = set()
        # Besides its own parts, a model that holds the one that is watched may generate.
        for kind in (*{type(part) for part in session.model.modules()}, _mixin()):
            for owner, name, wrapper in _places(session, kind):
                if (owner, name) not in done:
                    done.add((owner, name))
                    stack.enter_context(wrapped(owner, name, wrapper))
        yield


def _mixin() -> type:
    from transformers import GenerationMixin

    return GenerationMixin


def _places(session: Any, kind: type) -> Iterator[tuple[type, str, Callable[..., Any]]]:
    for name in (*KINDS, "_get_candidate_generator", "generate"):
        owners = [owner for owner in kind.__mro__ if name in vars(owner)]
        # What overrides `generate` may call the method below it with other arguments.
        for owner in owners if name == "generate" else owners[:1]:
            if name == "generate":
                yield owner, name, _generates(session)
            elif name == "_get_candidate_generator":
                yield owner, name, _drafts(session)
            else:
                yield owner, name, _loops(session, KINDS[name])


def _generates(session: Any) -> Callable[..., Any]:
    def generate(inner: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not session.follows(model):
            return inner(model, *args, **kwargs)
        with session.generating(None if kwargs.get("custom_generate") is None else Loop(model, "unknown")):
            return inner(model, *args, **kwargs)

    return generate


def _drafts(session: Any) -> Callable[..., Any]:
    def generator(inner: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = inner(model, *args, **kwargs)
        loop = session.loop(model) if session.follows(model) else None
        if loop is not None:
            candidates = found.get_candidates

            def get_candidates(input_ids: Tensor, *rest: Any, **options: Any) -> Any:
                drafted = candidates(input_ids, *rest, **options)
                loop.drafted(drafted[0].shape[1] - input_ids.shape[1])
                return drafted

            found.get_candidates = get_candidates
        return found

    return generator


def _loops(session: Any, kind: str) -> Callable[..., Any]:
    def decode(inner: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not session.follows(model):
            return inner(model, *args, **kwargs)
        known = {**dict(zip(FIRST, args, strict=False)), **kwargs}
        ids, config, outer = known.pop("input_ids"), known["generation_config"], session.loop(model)
        draft = outer is not None and bool(config.is_assistant)
        if outer is not None and outer.kind != "unknown" and not draft:
            # A class that overrides the loop calls the one below it.
            return inner(model, ids, **known)
        chunks = 1 if kind == "assisted" else _chunks(known, config, ids.shape[1])
        loop = Loop(model, kind, ids.shape[1], chunks, draft=draft)
        known["stopping_criteria"] = _recorded(known["stopping_criteria"], loop, session)
        if kind == "beams":
            return _with_beams(session, loop, inner, model, ids, known)
        with session.generating(loop):
            found = inner(model, ids, **known)
            session.settle(loop, _none, len(getattr(found, "sequences", found)))
        return found

    return decode


def _none(step: Step) -> None:
    """Nothing is left to be assigned."""


def _with_beams(session: Any, loop: Loop, inner: Callable[..., Any], model: Any, ids: Tensor, kwargs: dict) -> Any:
    """Asks for the beam from which each token came, which does not change the sequences."""
    config = kwargs["generation_config"]
    asked = bool(config.return_dict_in_generate)
    if not asked:
        config = kwargs["generation_config"] = copy.copy(config)
        config.return_dict_in_generate = True
        for name in KEPT:
            setattr(config, name, False)
    with session.generating(loop):
        found = inner(model, ids, **kwargs)
        beams = found.beam_indices.long()

        def chosen(step: Step) -> Chosen | None:
            if step.number >= beams.shape[1]:
                return None
            slots = beams[:, step.number]
            return Chosen(slots.clamp(min=0), slots >= 0)

        session.settle(loop, chosen, len(beams))
    return found if asked else found.sequences


def _chunks(known: dict[str, Any], config: Any, tokens: int) -> int:
    """Forward passes that read the prompt, as transformers splits it."""
    if not (size := getattr(config, "prefill_chunk_size", None)):
        return 1
    cache, mask = known.get("cache", known.get("past_key_values")), known.get("attention_mask")
    past = int(cache.get_seq_length()) if cache is not None else 0
    whole = mask.shape[1] if mask is not None else getattr(config, "_mask_length", tokens if not past else -1)
    tokens -= past if whole == tokens else 0
    return max(-(-tokens // size), 1)


def _recorded(criteria: Any, loop: Loop, session: Any) -> Any:
    """The same criteria, which tell the loop what they find after each step."""
    from transformers import StoppingCriteriaList

    # Without an end-of-sequence token, samples that have finished go on, and what they write is returned.
    ends = loop.kind == "sample" and any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    class Recorded(StoppingCriteriaList):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            # Those that were given may tell another loop in turn.
            done = criteria(input_ids, scores, **kwargs)
            finished = done if loop.done is None else done | loop.done
            loop.over = loop.kind != "beams" and bool(finished.all())
            loop.wrote(input_ids.shape[1], done if ends else None)
            if loop.kind == "assisted":
                session.settle(loop, loop.accepted, len(input_ids))
            return done

    return Recorded(criteria)
