"""Decoding loops of ``generate``: assigns queries to the tokens of the returned sequences that they generate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from .confirmed_labels import shared_in_block
from .shared_patches import wrapped

KINDS = {"_sample": "sample", "_beam_search": "beams", "_assisted_decoding": "assisted"}
"""Decoding methods of transformers' ``GenerationMixin``."""

FIRST = ("input_ids", "logits_processor", "stopping_criteria", "generation_config")
"""Positional arguments of these methods."""

UNKNOWN = "it ran in a custom decoding loop (custom_generate), whose steps cannot be distinguished"
DICT_OPTIONS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
"""Options that only affect results returned as a dictionary."""


class Step(NamedTuple):
    """Queries whose position in the returned sequences is known later.

    Attributes:
        loop: decoding loop of the queries.
        number: index of the forward pass.
        draft: 0 for the query that generates the next token, n for the query after n draft tokens.
    """

    loop: Loop
    number: int
    draft: int = 0


class Chosen(NamedTuple):
    """Samples of a forward pass that are part of the returned sequences.

    Attributes:
        index: (row,) sample of the forward pass for each returned sequence.
        keep: (row,) whether the returned sequence contains the token that the query generated.
    """

    index: Int[Tensor, " row"]
    keep: Bool[Tensor, " row"]


class Columns(NamedTuple):
    """A range of queries of a forward pass, counted from its end.

    Attributes:
        first, last: -1 is the last query; ``first`` = None is the first query of the pass.
        writes: whether the last query of the range generates a token, which makes it a ``"last"`` query.
        step: step of queries that are assigned later; None if each sample is a returned sequence.
    """

    first: int | None
    last: int
    writes: bool
    step: Step | None = None


class Loop:
    """A running decoding loop.

    Args:
        model: the generating model.
        kind: a value of ``KINDS``, or ``"unknown"``.
        prompt: number of tokens of the prompt.
        chunks: number of forward passes over the prompt.
        draft: whether the loop generates draft tokens for another loop of the same model.

    Attributes:
        done: (sample,) which samples have finished; None before the first token.
        first: whether this is the first forward pass.
        over: whether all samples have finished.
        running: whether a forward pass of the model is running.
    """

    def __init__(self, model: nn.Module, kind: str, prompt: int = 0, chunks: int = 1, *, draft: bool = False) -> None:
        self.model, self.kind, self.draft, self._prompt, self._chunks = model, kind, draft, prompt, chunks
        self.done: Bool[Tensor, " sample"] | None = None
        self.number, self.over, self.running = 0, False, False
        self.passes = 0
        """Number of forward passes since the last token."""
        self._written, self._drafted = 0, 0
        self._accepted: dict[int, int] = {}

    @property
    def first(self) -> bool:
        return self.number == 0 and self.passes <= 1

    @property
    def aside(self) -> bool:
        """Whether this pass generates no returned token: a draft, or an extra pass as in classifier-free guidance."""
        if self.kind == "unknown":
            return False
        return self.draft or self.passes > (1 if self.number else self._chunks)

    @property
    def partial(self) -> bool:
        """Whether the pass processes a chunk of the prompt."""
        return self._chunks > 1 and self.number == 0

    @property
    def text(self) -> int:
        """Number of tokens after the prompt."""
        return self._written + self._drafted

    def begin(self) -> None:
        """Called when a forward pass starts."""
        self.passes, self.running = self.passes + 1, True

    def drafted(self, count: int) -> None:
        """Called before a pass that verifies ``count`` draft tokens."""
        self._drafted = count

    def wrote(self, length: int, done: Tensor | None) -> None:
        """Called after new tokens, with the length of the sequences and (sample,) True for those that have finished."""
        if done is not None:
            self.done = done if self.done is None else self.done | done
        self._accepted[self.number] = length - self._prompt - self._written
        self._written = length - self._prompt
        self.number, self.passes, self._drafted = self.number + 1, 0, 0

    def columns(self) -> list[Columns]:
        """Returns the new queries of this pass in groups."""
        first = -1 - self._drafted
        new = None if self.number == 0 else first
        writes = self.number > 0 or self.passes == self._chunks
        if self.kind == "beams":
            return [Columns(new, first, writes, Step(self, self.number))]
        drafts = [
            Columns(column, column, True, Step(self, self.number, column - first)) for column in range(first + 1, 0)
        ]
        return [Columns(new, first, writes), *drafts]

    def accepted(self, step: Step) -> Chosen | None:
        """Returns the samples of an accepted draft token; None if it was rejected."""
        if step.draft >= self._accepted.get(step.number, 0):
            return None
        return Chosen(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool))


@contextmanager
def decoding_loops(session: Any) -> Iterator[None]:
    """Patches ``generate`` of Hugging Face models to track its decoding loops."""
    with ExitStack() as stack:
        done: set[tuple[type, str]] = set()
        # A model that contains the recorded one may generate, too.
        kinds = shared_in_block(session.model, "kinds", lambda: {type(part) for part in session.model.modules()})
        for kind in (*kinds, _mixin()):
            for owner, name, wrapper in _methods_to_patch(session, kind):
                if (owner, name) not in done:
                    done.add((owner, name))
                    stack.enter_context(wrapped(owner, name, wrapper))
        yield


def _mixin() -> type:
    from transformers import GenerationMixin

    return GenerationMixin


def _methods_to_patch(session: Any, kind: type) -> Iterator[tuple[type, str, Callable[..., Any]]]:
    for name in (*KINDS, "_get_candidate_generator", "generate"):
        owners = [owner for owner in kind.__mro__ if name in vars(owner)]
        # An override of `generate` may call the inherited method with other arguments.
        for owner in owners if name == "generate" else owners[:1]:
            if name == "generate":
                yield owner, name, _patch_generate(session)
            elif name == "_get_candidate_generator":
                yield owner, name, _patch_drafts(session)
            else:
                yield owner, name, _patch_loop(session, KINDS[name])


def _patch_generate(session: Any) -> Callable[..., Any]:
    def generate(inner: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not session.follows(model):
            return inner(model, *args, **kwargs)
        with session.generating(None if kwargs.get("custom_generate") is None else Loop(model, "unknown")):
            return inner(model, *args, **kwargs)

    return generate


def _patch_drafts(session: Any) -> Callable[..., Any]:
    def generator(inner: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        candidate_generator = inner(model, *args, **kwargs)
        loop = session.loop(model) if session.follows(model) else None
        if loop is not None:
            original = candidate_generator.get_candidates

            def get_candidates(input_ids: Tensor, *rest: Any, **options: Any) -> Any:
                candidates = original(input_ids, *rest, **options)
                loop.drafted(candidates[0].shape[1] - input_ids.shape[1])
                return candidates

            candidate_generator.get_candidates = get_candidates
        return candidate_generator

    return generator


def _patch_loop(session: Any, kind: str) -> Callable[..., Any]:
    def decode(inner: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not session.follows(model):
            return inner(model, *args, **kwargs)
        arguments = {**dict(zip(FIRST, args, strict=False)), **kwargs}
        ids, config, outer = arguments.pop("input_ids"), arguments["generation_config"], session.loop(model)
        draft = outer is not None and bool(config.is_assistant)
        if outer is not None and outer.kind != "unknown" and not draft:
            # A class that overrides the loop calls the inherited one.
            return inner(model, ids, **arguments)
        chunks = 1 if kind == "assisted" else _num_chunks(arguments, config, ids.shape[1])
        loop = Loop(model, kind, ids.shape[1], chunks, draft=draft)
        arguments["stopping_criteria"] = _recorded_criteria(arguments["stopping_criteria"], loop, session)
        if kind == "beams":
            return _beam_search(session, loop, inner, model, ids, arguments)
        with session.generating(loop):
            output = inner(model, ids, **arguments)
            session.settle(loop, _nothing_pending, len(getattr(output, "sequences", output)))
        return output

    return decode


def _nothing_pending(step: Step) -> None:
    """Returns None, because all queries were assigned when they ran."""


def _beam_search(session: Any, loop: Loop, inner: Callable[..., Any], model: Any, ids: Tensor, kwargs: dict) -> Any:
    """Requests the beam indices of each token, which does not change the sequences, to assign the queries."""
    config = kwargs["generation_config"]
    returns_dict = bool(config.return_dict_in_generate)
    if not returns_dict:
        config = kwargs["generation_config"] = copy.copy(config)
        config.return_dict_in_generate = True
        for name in DICT_OPTIONS:
            setattr(config, name, False)
    with session.generating(loop):
        output = inner(model, ids, **kwargs)
        beams = output.beam_indices.long()

        def chosen(step: Step) -> Chosen | None:
            if step.number >= beams.shape[1]:
                return None
            slots = beams[:, step.number]
            return Chosen(slots.clamp(min=0), slots >= 0)

        session.settle(loop, chosen, len(beams))
    return output if returns_dict else output.sequences


def _num_chunks(arguments: dict[str, Any], config: Any, tokens: int) -> int:
    """Returns the number of forward passes into which transformers splits the prompt."""
    if not (size := getattr(config, "prefill_chunk_size", None)):
        return 1
    cache, mask = arguments.get("cache", arguments.get("past_key_values")), arguments.get("attention_mask")
    past = int(cache.get_seq_length()) if cache is not None else 0
    total = mask.shape[1] if mask is not None else getattr(config, "_mask_length", tokens if not past else -1)
    tokens -= past if total == tokens else 0
    return max(-(-tokens // size), 1)


def _recorded_criteria(criteria: Any, loop: Loop, session: Any) -> Any:
    """Wraps stopping criteria to update the loop after each step."""
    from transformers import StoppingCriteriaList

    # Without an end-of-sequence token, finished samples continue, and their tokens are returned.
    ends = loop.kind == "sample" and any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    class Recorded(StoppingCriteriaList):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            # The wrapped criteria may update an outer loop in turn.
            done = criteria(input_ids, scores, **kwargs)
            finished = done if loop.done is None else done | loop.done
            loop.over = loop.kind != "beams" and bool(finished.all())
            loop.wrote(input_ids.shape[1], done if ends else None)
            if loop.kind == "assisted":
                session.settle(loop, loop.accepted, len(input_ids))
            return done

    return Recorded(criteria)
