"""Which tokens of a Hugging Face model are pictures, sounds and text, at each of its attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from ..errors import unknown_name
from ..tokens.token_batch import SPECIAL
from .attention_call import AttentionCall
from .forward_inputs import bind_arguments, read_decoder_inputs, read_forward_inputs
from .generation_loops import Loop
from .key_origins import MANY, READ, Origins
from .provenance import MIXED, QUERY
from .recording_session import RecordingSession
from .shared_patches import wrapped
from .submodels import ORDER, Submodels, find_submodels, modalities_of, submodel_kinds
from .token_labels import LabeledKeys, UserLabels, check_names, label_keys
from .token_stream import TokenStream, fit_labels

KEPT = "kept"
NO_KEYS = (
    "its softmax is over scores that are no products of queries and keys, such as those of sampling points, and "
    "therefore is no attention over tokens"
)
LEARNED = "its keys are learned and come from no input"
Verdict = LabeledKeys | str | None


class TokenMap:
    """Labels of a Hugging Face model's keys.

    Encoders of one modality, and what is read from them, need no map; ``Stream`` tells all others.

    Args:
        root: a PreTrainedModel.
        modality: (key,) or (batch, key) labels of the prompt, from the user; tokens that are generated are text.
        names: of the labels, from the user.

    Raises:
        ConfigError: names that are no modalities of the model, where there are no labels to name.
    """

    def __init__(self, root: nn.Module, modality: Tensor | None = None, names: Sequence[str] | None = None) -> None:
        self.root, self.given, self.parts = root, modality, Submodels(root)
        self.names = self.parts.modalities if names is None and modality is None else check_names(modality, names)
        for name in self.names if modality is None else ():
            if name not in (*ORDER, *self.parts.modalities):
                raise unknown_name("watch names", f"modality of {type(root).__name__}", name, self.parts.modalities)
        encodes = self.parts.encoder is not None
        self._main = TokenStream(self.names, self.parts.placeholders, None if encodes else modality)
        self._encoder = TokenStream(self.names, self.parts.placeholders, modality)
        self.origins = Origins(self.parts)
        self._verdicts: dict[tuple[int, int], Verdict] = {}
        self._visits: dict[int, int] = {}
        self._samples: int | None = None
        self._gives_vectors = False
        self._running: list[nn.Module] = []
        self._reads_vectors: set[int] = set()
        self._embedded: Tensor | None = None

    @classmethod
    def inside(cls, root: nn.Module, modality: Tensor | None, names: Sequence[str] | None) -> TokenMap:
        """Of a model that is a part of another, whose modalities may be called otherwise."""
        own = modalities_of(root)
        return cls(root, modality, names if modality is not None or set(names or ()) & set(own) else None)

    @contextmanager
    def following(self, session: RecordingSession) -> Iterator[None]:
        """Reads the inputs of every forward pass, those of ``generate`` and of parts that run alone included."""

        def begin(part: nn.Module, args: tuple, kwargs: Any = None) -> None:
            if not session.in_recorded_thread() or session.aside:
                return
            if not self._running:
                session.begin_pass()
            self._begin(part, bind_arguments(part, args, kwargs or {}), session.current())

        def end(part: nn.Module, args: Any, output: Any) -> None:
            if not session.in_recorded_thread() or session.aside:
                return
            while self._running and self._running.pop() is not part:
                pass

        def embed(part: nn.Module, args: tuple, output: Any) -> None:
            if not session.in_recorded_thread() or session.aside:
                return
            if not self._running and isinstance(output, Tensor) and "text" in submodel_kinds(self.root):
                self.origins.words(output)
            self._embedded = args[0] if args and isinstance(args[0], Tensor) and args[0].ndim == 2 else None

        with ExitStack() as stack:
            for part in find_submodels(self.root):
                stack.callback(part.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(end, always_call=True).remove)
                if hasattr(type(part), "get_compiled_call"):
                    stack.enter_context(wrapped(part, "get_compiled_call", _uncompiled(session, part)))
            if (words := _word_embedding(self.root)) is not None:
                stack.callback(words.register_forward_hook(embed).remove)
            yield

    @contextmanager
    def tracing(self, session: RecordingSession) -> Iterator[None]:
        """Follows every tensor from the inputs on, where the user gives no labels."""
        if self.given is not None:
            yield
            return
        with self.origins.following(self.root):
            yield

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        """Labels that the inputs tell, held against where the keys come from."""
        if id(module) not in self.parts.paths:
            return None
        known = self._told(call, module)
        if self.given is not None or torch._C._current_graph_task_id() != -1:
            return known
        visit = self._visits.get(id(module), 0)
        self._visits[id(module)] = visit + 1
        if self.origins.active:
            verdict = self._verdicts[id(module), visit] = self._held(call, module, known)
        else:
            verdict = self._verdicts.get((id(module), visit), KEPT)
            if verdict is not KEPT:
                verdict = self._continued(call, verdict)
        known = known if verdict is KEPT else verdict
        if isinstance(known, LabeledKeys) and known.constant is not None:
            known = replace(known, samples=self._samples)
        return known

    def _held(self, call: AttentionCall, module: nn.Module, known: LabeledKeys | str | None) -> Verdict:
        """What is told, unless the keys come from somewhere else; where they come from, where nothing is told."""
        keys = self.origins.keys(call)
        if keys is None:
            return NO_KEYS
        found = self.origins.names_in(keys)
        told = isinstance(known, LabeledKeys)
        if found == [] and not (told and known.unimodal):
            # Words that were given as vectors come from no input, too.
            return KEPT if not told or self._gives_vectors else LEARNED
        if found == []:
            return KEPT
        if MANY in found:
            agrees = told and known.constant is None and self._agrees(keys, known)
            return KEPT if agrees else (known if isinstance(known, str) else f"its keys come from {self.origins.said}")
        if found == [READ] and not (told and known.unimodal):
            return "its keys are learned queries that have read several modalities"
        if told and self._agrees(keys, known):
            return KEPT
        if len(found) == 1:
            name = found[0]
            if name not in self.names:
                return f"its keys are {name}, and the modalities are {', '.join(self.names)}"
            labels = torch.full((call.sizes[3],), self.names.index(name))
        else:
            labels = self._numbers(keys)
        return self._traced(call, labels, found)

    def _agrees(self, keys: Tensor, known: LabeledKeys) -> bool:
        """Whether labels are right wherever they and the origin of a key name a modality."""
        origin = self._numbers(keys)
        labels = known.keys.to(origin.device)
        if labels.shape[-1] != origin.shape[-1] or (labels.ndim == 2 and len(labels) not in (1, len(origin))):
            return False
        if known.constant is not None and not set(self.origins.names_in(keys)) <= {*self.names, MANY, READ}:
            return False
        both = (origin != SPECIAL) & (labels != SPECIAL)
        if known.constant is None:
            # A placeholder that the model does not replace is a word by origin, and an image by the configuration.
            both &= keys != self.origins.code("text")
        return bool(((origin == labels) | ~both).all())

    def _numbers(self, codes: Tensor) -> Tensor:
        """Codes of origins as labels; ``SPECIAL`` for what comes from no input, and for modalities without a name."""
        table = torch.full((MIXED + 1,), SPECIAL, device=codes.device)
        for code, name in enumerate(self.origins.names, start=1):
            if name in self.names:
                table[code] = table[code + QUERY] = self.names.index(name)
        return table[codes.long()]

    def _traced(self, call: AttentionCall, labels: Tensor, found: list[str]) -> LabeledKeys:
        """Labels by the origin of keys and queries."""
        rows = self.origins.queries(call)
        keys = self.origins.keys(call)
        if rows is not None and keys is not None and torch.equal(rows, keys):
            # Self-attention: a key that is masked for all queries is padding, and so is the query at its position.
            call = replace(call, reads_itself=True)
        known: dict[str, Any] = {} if rows is None else {"queries": self._numbers(rows)}
        if rows is not None and rows.shape[1] == self._main.rows and self._main.labels is not None:
            own = self._main.labels[:, -rows.shape[1] :].to(rows.device)
            words = (rows == self.origins.code("text")).all() and len(own) in (1, len(rows))
            if words:
                known |= {key: value for key in ("valid", "answer")
                          if (value := getattr(self._main, key)) is not None and len(value) == len(rows)}  # fmt: skip
        constant = int(labels.flatten()[0]) if len(found) == 1 else None
        unimodal = (
            rows is not None and found != ["text"] and self.origins.names_in(rows) == found and len(self.names) > 1
        )
        return label_keys(call, labels, self.names, constant=constant, unimodal=unimodal, **known)

    def _continued(self, call: AttentionCall, verdict: Verdict) -> LabeledKeys | str | None:
        """What the first pass found of a layer, in the steps that follow it with a cache."""
        if not isinstance(verdict, LabeledKeys):
            return verdict  # type: ignore[return-value]
        batch, _, _, keys = call.sizes
        if verdict.constant is not None:
            labels = torch.full((keys,), verdict.constant)
        elif verdict.keys.shape[-1] > keys or len(verdict.keys) not in (1, batch):
            return f"it has {keys} keys, and the modality of {verdict.keys.shape[-1]} is known"
        else:
            labels = F.pad(verdict.keys, (0, keys - verdict.keys.shape[-1]), value=self._main.text)
        return LabeledKeys(labels, self.names, constant=verdict.constant, continues=True, unimodal=verdict.unimodal)

    def _told(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        name, joint = self.parts.alone(module), "text" in self.parts.modalities and bool(self.parts.others)
        if name is not None and (joint or self.given is None):
            return self._alone(call, module, name, unimodal=joint)
        if self.parts.is_cross(module):
            return self._of_source(call)
        stream = self._encoder if self.parts.in_encoder(module) else self._main
        if stream is self._main and not self._running and torch._C._current_graph_task_id() == -1:
            return f"it runs outside of the forward pass of {type(self.root).__name__}, whose inputs tell its tokens"
        if stream.labels is None:
            return stream.why
        if (why := self._untold(module, stream)) is not None:
            return why
        return self._fitting(call, stream, unimodal=self._is_text_encoder(module, stream))

    def _begin(self, part: nn.Module, given: dict[str, Any], loop: Loop | None) -> None:
        first = not self._running
        self._running.append(part)
        (self._reads_vectors.discard if given.get("input_ids") is not None else self._reads_vectors.add)(id(part))
        if not first:
            return
        self._visits = {}
        self._samples = _batch_of(given)
        past = read_forward_inputs(given).past if self.parts.encoder is None else read_decoder_inputs(given).past
        self._gives_vectors = given.get("inputs_embeds") is not None and not self.origins.is_known(
            given["inputs_embeds"]
        )
        self.origins.active = self.given is None and not past
        if not past:
            self._verdicts = {}
        if self.origins.active:
            self.origins.begin(part, given)
        own = self._encoder if self.parts.in_encoder(part) else self._main
        if self.parts.encoder is None or own is self._encoder:
            if self.given is not None or self.parts.alone(part) not in self.parts.others or part is self.root:
                # Words become vectors outside of a part that is given these, as parts of `generate` are.
                inputs = read_forward_inputs(given, embedded=None if part is self.root else self._embedded)
                if loop is not None:
                    inputs = inputs._replace(text=loop.text, generates=True, partial=loop.partial)
                own.begin(inputs)
            return
        if any(given.get(name) is not None for name in ("input_ids", "inputs_embeds")) or self.given is not None:
            if given.get("encoder_outputs") is None:
                self._encoder.begin(read_forward_inputs(given))
        elif given.get("encoder_outputs") is None:
            self._encoder.forget()
        self._main.words(read_decoder_inputs(given))

    def _fitting(self, call: AttentionCall, stream: TokenStream, *, unimodal: bool) -> LabeledKeys | str | None:
        batch, _, rows, keys = call.sizes
        labels: Tensor = stream.labels  # type: ignore[assignment]
        if labels.shape[0] not in (1, batch):
            return f"it has batch = {batch}, and the modality of {labels.shape[0]} samples is known"
        found = fit_labels(labels, keys, stream)
        if found is None:
            return self._one_of_several(call) or self._other_length(keys, labels.shape[1])
        keys_here, start = found
        return self._known(call, keys_here, stream, rows, start=start, own=True, unimodal=unimodal)

    def _known(self, call: AttentionCall, keys: Tensor, stream: TokenStream, rows: int, **known: Any) -> LabeledKeys:
        batch = call.sizes[0]
        if rows == stream.rows and stream.labels is not None and len(stream.labels) in (1, batch):
            known["queries"] = stream.labels[:, -rows:].expand(batch, -1)
            known |= {key: value for key in ("valid", "answer")
                      if (value := getattr(stream, key)) is not None and value.shape == (batch, rows)}  # fmt: skip
        if stream.labels is not None:
            known["length"] = stream.labels.shape[1]
        constant = _constant(keys) if keys.device.type == "cpu" else None
        return label_keys(
            call, keys.expand(batch, -1), self.names, constant=constant, continues=stream.continues, **known
        )

    def _alone(self, call: AttentionCall, module: nn.Module, name: str, *, unimodal: bool) -> LabeledKeys | None:
        front = self.parts.queries_in_front(module)
        if front is not None and front < call.sizes[3] and not self.parts.is_cross(module) and name in self.names:
            text = self._main.text
            labels = torch.full((call.sizes[3],), text)
            labels[:front] = self.names.index(name)
            return label_keys(call, labels, self.names)
        return self._constant(call, name, unimodal=unimodal)

    def _of_source(self, call: AttentionCall) -> LabeledKeys | str | None:
        """Keys that come from another stream than the queries."""
        _, _, rows, keys = call.sizes
        if self.parts.encoder is not None:
            labels = _repeated(self._encoder.labels, call.sizes[0])
            if labels is None:
                return self._constant(call, self.parts.source())
            if labels.shape[1] != keys:
                return self._other_length(keys, labels.shape[1])
            return self._known(call, labels, self._main, rows)
        words = self._main.labels
        if words is not None and keys == words.shape[1] and not self._main.told:
            if rows != keys:
                return self._constant(call, "text")
            if not getattr(self.root, "can_generate", bool)():
                return f"its {keys} keys may be words or something else, of which there are as many"
        return self._constant(call, self.parts.source())

    def _constant(self, call: AttentionCall, name: str, *, unimodal: bool = False) -> LabeledKeys | None:
        """Keys that are all of one modality."""
        if name not in self.names:
            return None
        number, (batch, _, rows, keys) = self.names.index(name), call.sizes
        known: dict[str, Any] = {}
        if self._running and rows == self._main.rows and not unimodal and self._main.labels is not None:
            known = {key: value for key in ("valid", "answer")
                     if (value := getattr(self._main, key)) is not None and len(value) == batch}  # fmt: skip
            known["length"] = self._main.labels.shape[1]
            known["queries"] = self._main.labels[:, -rows:].expand(batch, -1) if len(self._main.labels) in (1, batch) \
                else None  # fmt: skip
        return LabeledKeys(
            torch.full((keys,), number), self.names, constant=number, unimodal=unimodal,
            continues=self._main.continues and not unimodal, **known,
        )  # fmt: skip

    def _untold(self, module: nn.Module, stream: TokenStream) -> str | None:
        """Why words cannot be told from pictures, where a part is given vectors and nothing tells whose they are."""
        if stream.told or self.given is not None or len(self.names) < 2 or self.parts.encoder is not None:
            return None
        owner = self.parts.owner(module)
        if owner is self.root or id(owner) not in self._reads_vectors or not self.parts.is_submodel(module):
            return None
        return "neither the configuration nor the inputs tell which of its tokens are text"

    def _is_text_encoder(self, module: nn.Module, stream: TokenStream) -> bool:
        """Whether these are words that never meet anything else."""
        if stream.told or self.given is not None or not self.parts.others or not self.parts.is_submodel(module):
            return False
        return self.parts.encoder is None and not self.parts.reads_others(self.parts.owner(module))

    def _one_of_several(self, call: AttentionCall) -> LabeledKeys | None:
        """Where several streams run side by side, as many keys as the user's map has of one modality are those."""
        if self.given is None or self.parts.placeholders or not self.parts.others:
            return None
        rows = self.given if self.given.ndim == 2 else self.given[None]
        counts = [(rows == number).sum(dim=1) for number in range(len(self.names))]
        fits = [n for n, count in enumerate(counts) if bool((count == call.sizes[3]).all())]
        return self._constant(call, self.names[fits[0]]) if len(fits) == 1 else None

    def _other_length(self, keys: int, total: int) -> str:
        if self.given is not None:
            return f"it has {keys} keys, and modality is given for {self.given.shape[-1]}"
        return (
            f"it has {keys} keys, and the inputs tell the modality of {total} tokens; give one label for every key: "
            "watch(model, modality=..., names=...)"
        )


class CompositeLabeler:
    """Labels of a model that holds Hugging Face models.

    Args:
        outside: knows the keys of all other attentions.
        maps: one for each of them.
    """

    def __init__(self, outside: UserLabels, maps: Sequence[TokenMap]) -> None:
        self._outside, self._maps = outside, maps
        self.names = outside.names or tuple(dict.fromkeys(name for part in maps for name in part.names))

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        for part in self._maps:
            if id(module) in part.parts.paths:
                known = part.labeled(call, module)
                # Inside a larger model, what is of one modality is an encoder.
                if isinstance(known, LabeledKeys) and len(part.parts.modalities) == 1 and part.given is None:
                    return replace(known, unimodal=True, continues=False)
                return known
        return self._outside.labeled(call, module)


def _uncompiled(session: RecordingSession, part: nn.Module) -> Callable[..., Any]:
    """``generate`` compiles a model by itself where its cache allows it; attention could not be seen there."""

    def get_compiled_call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return part.__call__ if session.in_recorded_thread() else inner(*args, **kwargs)

    return get_compiled_call


def _batch_of(given: dict[str, Any]) -> int | None:
    """Samples of a pass: of the words, or of the first input there is."""
    tensors = [value for value in given.values() if isinstance(value, Tensor) and value.ndim > 1]
    words = [given[name] for name in ("input_ids", "decoder_input_ids", "inputs_embeds") if given.get(name) is not None]
    first = next(iter([*words, *tensors]), None)
    return None if first is None else len(first)


def _repeated(labels: Tensor | None, batch: int) -> Tensor | None:
    """Labels of the samples of a source that several beams read each."""
    if labels is None or len(labels) == 1 or batch % len(labels):
        return labels
    return labels.repeat_interleave(batch // len(labels), dim=0)


def _word_embedding(root: nn.Module) -> nn.Module | None:
    try:
        found = root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _constant(labels: Int[Tensor, "batch key"]) -> int | None:
    first = int(labels.flatten()[0]) if labels.numel() else SPECIAL
    return first if first != SPECIAL and bool((labels == first).all()) else None
