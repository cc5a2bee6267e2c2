"""Labels the keys of each attention of a Hugging Face model as text, image, video or audio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..errors import unknown_name
from ..tokens.token_batch import SPECIAL
from .attention_call import AttentionCall
from .confirmed_labels import shared_in_block
from .forward_inputs import bind_arguments, read_decoder_inputs, read_forward_inputs
from .generation_loops import Loop
from .key_origins import Origins
from .origin_labels import KEEP, OriginLabels, Verdict
from .recording_session import RecordingSession
from .shared_patches import wrapped
from .submodels import ORDER, Submodels, find_submodels, modalities_of, submodel_kinds
from .token_labels import LabeledKeys, check_names, label_keys
from .token_stream import TokenStream, fit_labels


class TokenMap:
    """Labels of the keys of a Hugging Face model.

    Keys of unimodal encoders, and those of cross-attention to their outputs, have one modality; all others are labeled
    by a ``TokenStream``. Labels are checked against the origin of the keys, which ``Origins`` traces.

    Args:
        root: a PreTrainedModel.
        modality: (key,) or (batch, key) labels of the prompt, from the user; generated tokens are text.
        names: modality names of the labels, from the user.
        traced: whether labels are checked against the origin of the keys.

    Attributes:
        confirmed: whether labels were checked, and all of them agreed with the origin of the keys.

    Raises:
        ConfigError: without ``modality``, names that are not modalities of the model.
    """

    def __init__(
        self,
        root: nn.Module,
        modality: Tensor | None = None,
        names: Sequence[str] | None = None,
        *,
        traced: bool = True,
    ) -> None:
        self.root, self.given, self.parts = root, modality, Submodels(root)
        self._traced = traced and modality is None
        self._agreed: set[bool] = set()
        self.names = self.parts.modalities if names is None and modality is None else check_names(modality, names)
        for name in self.names if modality is None else ():
            if name not in (*ORDER, *self.parts.modalities):
                raise unknown_name("watch names", f"modality of {type(root).__name__}", name, self.parts.modalities)
        encodes = self.parts.encoder is not None
        self._main = TokenStream(self.names, self.parts.placeholders, None if encodes else modality)
        self._encoder = TokenStream(self.names, self.parts.placeholders, modality)
        self.origins = Origins(self.parts)
        self._origin_labels = OriginLabels(self.origins, self.names, self._main)
        self._verdicts: dict[tuple[int, int], Verdict] = {}
        self._visits: dict[int, int] = {}
        self._samples: int | None = None
        self._untraced_embeddings = False
        self._running: list[nn.Module] = []
        self._takes_embeddings: set[int] = set()
        self._embedded: Tensor | None = None

    @classmethod
    def inside(cls, root: nn.Module, modality: Tensor | None, names: Sequence[str] | None) -> TokenMap:
        """Creates the map of a model inside another module, whose modality names may differ."""
        modalities = modalities_of(root)
        return cls(root, modality, names if modality is not None or set(names or ()) & set(modalities) else None)

    @contextmanager
    def following(self, session: RecordingSession) -> Iterator[None]:
        """Reads the inputs of each forward pass, including those of ``generate`` and of submodels called directly."""

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
                self.origins.mark_text(output)
            self._embedded = args[0] if args and isinstance(args[0], Tensor) and args[0].ndim == 2 else None

        with ExitStack() as stack:
            for part in shared_in_block(self.root, "submodels", lambda: find_submodels(self.root)):
                stack.callback(part.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(end, always_call=True).remove)
                if hasattr(type(part), "get_compiled_call"):
                    stack.enter_context(wrapped(part, "get_compiled_call", _without_compilation(session, part)))
            if (embedding := _token_embedding(self.root)) is not None:
                stack.callback(embedding.register_forward_hook(embed).remove)
            yield

    @contextmanager
    def tracing(self, session: RecordingSession) -> Iterator[None]:
        """Traces all tensors from the inputs on, unless the user passes labels."""
        if not self._traced:
            yield
            return
        with self.origins.tracing(self.root):
            yield

    @property
    def confirmed(self) -> bool:
        return self._agreed == {True}

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        """Returns the labels that the inputs determine, checked against the origin of the keys."""
        if id(module) not in self.parts.paths:
            return None
        labels = self._labels_from_inputs(call, module)
        if not self._traced or torch._C._current_graph_task_id() != -1:
            return self._with_samples(labels)
        visit = self._visits.get(id(module), 0)
        self._visits[id(module)] = visit + 1
        if self.origins.active:
            verdict = self._verdicts[id(module), visit] = self._origin_labels.check(
                call, labels, untraced=self._untraced_embeddings
            )
            self._agreed.add(verdict is KEEP)
        else:
            verdict = self._verdicts.get((id(module), visit), KEEP)
            if verdict is not KEEP:
                verdict = self._origin_labels.extend(call, verdict)
        return self._with_samples(labels if verdict is KEEP else verdict)

    def _with_samples(self, labels: LabeledKeys | str | None) -> LabeledKeys | str | None:
        if isinstance(labels, LabeledKeys) and labels.constant is not None and self.given is None:
            labels = replace(labels, samples=self._samples)
        return labels

    def _labels_from_inputs(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        name, joint = self.parts.unimodal_kind(module), "text" in self.parts.modalities and bool(self.parts.others)
        if name is not None and (joint or self.given is None):
            return self._unimodal_labels(call, module, name, unimodal=joint)
        if self.parts.is_cross(module):
            return self._source_labels(call)
        stream = self._encoder if self.parts.in_encoder(module) else self._main
        if stream is self._main and not self._running and torch._C._current_graph_task_id() == -1:
            return (
                f"it runs outside of the forward pass of {type(self.root).__name__}, whose inputs identify its tokens"
            )
        if stream.labels is None:
            return stream.why
        if (why := self._why_unlabeled(module, stream)) is not None:
            return why
        return self._stream_labels(call, stream, unimodal=self._is_text_encoder(module, stream))

    def _begin(self, part: nn.Module, arguments: dict[str, Any], loop: Loop | None) -> None:
        first = not self._running
        self._running.append(part)
        (self._takes_embeddings.discard if arguments.get("input_ids") is not None else self._takes_embeddings.add)(
            id(part)
        )
        if not first:
            return
        self._visits = {}
        self._samples = _batch_size(arguments)
        past = (
            read_forward_inputs(arguments).past if self.parts.encoder is None else read_decoder_inputs(arguments).past
        )
        embeddings = arguments.get("inputs_embeds")
        self._untraced_embeddings = embeddings is not None and not self.origins.is_known(embeddings)
        self.origins.active = self._traced and not past
        if not past:
            self._verdicts = {}
        if self.origins.active:
            self.origins.begin(part, arguments)
        stream = self._encoder if self.parts.in_encoder(part) else self._main
        if self.parts.encoder is None or stream is self._encoder:
            if self.given is not None or self.parts.unimodal_kind(part) not in self.parts.others or part is self.root:
                # `generate` passes embeddings to some submodels; their ids were embedded before.
                inputs = read_forward_inputs(arguments, embedded=None if part is self.root else self._embedded)
                if loop is not None:
                    inputs = inputs._replace(text=loop.text, generates=True, partial=loop.partial)
                stream.begin(inputs)
            return
        if any(arguments.get(name) is not None for name in ("input_ids", "inputs_embeds")) or self.given is not None:
            ran_before = self.given is not None and self._encoder.labels is None
            if arguments.get("encoder_outputs") is None or ran_before:
                self._encoder.begin(read_forward_inputs(arguments))
        elif arguments.get("encoder_outputs") is None:
            self._encoder.reset()
        self._main.begin_text(read_decoder_inputs(arguments))

    def _stream_labels(self, call: AttentionCall, stream: TokenStream, *, unimodal: bool) -> LabeledKeys | str | None:
        batch, _, rows, keys = call.sizes
        labels: Tensor = stream.labels  # type: ignore[assignment]
        if labels.shape[0] not in (1, batch):
            return f"it has batch = {batch}, and the modality of {labels.shape[0]} samples is known"
        fitted = fit_labels(labels, keys, stream)
        if fitted is None:
            return self._labels_by_count(call) or self._length_mismatch(keys, labels.shape[1])
        key_labels, start = fitted
        return self._with_queries(call, key_labels, stream, rows, start=start, own=True, unimodal=unimodal)

    def _with_queries(
        self, call: AttentionCall, keys: Tensor, stream: TokenStream, rows: int, **known: Any
    ) -> LabeledKeys:
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

    def _unimodal_labels(
        self, call: AttentionCall, module: nn.Module, name: str, *, unimodal: bool
    ) -> LabeledKeys | None:
        leading = self.parts.num_leading_queries(module)
        if leading is not None and leading < call.sizes[3] and not self.parts.is_cross(module) and name in self.names:
            text = self._main.text
            labels = torch.full((call.sizes[3],), text)
            labels[:leading] = self.names.index(name)
            return label_keys(call, labels, self.names)
        return self._constant(call, name, unimodal=unimodal)

    def _source_labels(self, call: AttentionCall) -> LabeledKeys | str | None:
        """Returns the labels of cross-attention keys."""
        _, _, rows, keys = call.sizes
        if self.parts.encoder is not None:
            labels = _repeat_for_beams(self._encoder.labels, call.sizes[0])
            if labels is None:
                return self._constant(call, self.parts.source_modality())
            if labels.shape[1] != keys:
                return self._length_mismatch(keys, labels.shape[1])
            return self._with_queries(call, labels, self._main, rows)
        labels = self._main.labels
        if labels is not None and keys == labels.shape[1] and not self._main.distinguishes:
            if rows != keys:
                return self._constant(call, "text")
            if not getattr(self.root, "can_generate", bool)():
                return f"its {keys} keys may be the text tokens or another input of the same length"
        return self._constant(call, self.parts.source_modality())

    def _constant(self, call: AttentionCall, name: str, *, unimodal: bool = False) -> LabeledKeys | None:
        """Returns labels for keys that all have one modality."""
        if name not in self.names:
            return None
        index, (batch, _, rows, keys) = self.names.index(name), call.sizes
        fields: dict[str, Any] = {}
        if self._running and rows == self._main.rows and not unimodal and self._main.labels is not None:
            fields = {key: value for key in ("valid", "answer")
                     if (value := getattr(self._main, key)) is not None and len(value) == batch}  # fmt: skip
            fields["length"] = self._main.labels.shape[1]
            fields["queries"] = self._main.labels[:, -rows:].expand(batch, -1) if len(self._main.labels) in (1, batch) \
                else None  # fmt: skip
        return LabeledKeys(
            torch.full((keys,), index), self.names, constant=index, unimodal=unimodal,
            continues=self._main.continues and not unimodal, **fields,
        )  # fmt: skip

    def _why_unlabeled(self, module: nn.Module, stream: TokenStream) -> str | None:
        """Returns why text cannot be distinguished in a submodel that takes embeddings; None if it can."""
        if stream.distinguishes or self.given is not None or len(self.names) < 2 or self.parts.encoder is not None:
            return None
        owner = self.parts.owner(module)
        if owner is self.root or id(owner) not in self._takes_embeddings or not self.parts.is_submodel(module):
            return None
        return "neither the configuration nor the inputs identify which of its tokens are text"

    def _is_text_encoder(self, module: nn.Module, stream: TokenStream) -> bool:
        """Whether the module belongs to an encoder of text only."""
        if (
            stream.distinguishes
            or self.given is not None
            or not self.parts.others
            or not self.parts.is_submodel(module)
        ):
            return False
        return self.parts.encoder is None and not self.parts.has_cross_attention(self.parts.owner(module))

    def _labels_by_count(self, call: AttentionCall) -> LabeledKeys | None:
        """Labels the keys of one of several parallel streams by their number.

        Exactly one modality of the user must have as many.
        """
        if self.given is None or self.parts.placeholders or not self.parts.others:
            return None
        rows = self.given if self.given.ndim == 2 else self.given[None]
        counts = [(rows == index).sum(dim=1) for index in range(len(self.names))]
        fits = [n for n, count in enumerate(counts) if bool((count == call.sizes[3]).all())]
        return self._constant(call, self.names[fits[0]]) if len(fits) == 1 else None

    def _length_mismatch(self, keys: int, total: int) -> str:
        if self.given is not None:
            return f"it has {keys} keys, and modality is given for {self.given.shape[-1]}"
        return (
            f"it has {keys} keys, and the inputs have {total} tokens; give one label for each key: "
            "watch(model, modality=..., names=...)"
        )


def _without_compilation(session: RecordingSession, part: nn.Module) -> Callable[..., Any]:
    """Keeps ``generate`` from compiling the model, as attention cannot be intercepted in compiled code."""

    def get_compiled_call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return part.__call__ if session.in_recorded_thread() else inner(*args, **kwargs)

    return get_compiled_call


def _batch_size(arguments: dict[str, Any]) -> int | None:
    """Returns the number of samples of a pass: that of the text inputs, or of the first tensor."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor) and value.ndim > 1]
    text = [
        arguments[name]
        for name in ("input_ids", "decoder_input_ids", "inputs_embeds")
        if arguments.get(name) is not None
    ]
    first = next(iter([*text, *tensors]), None)
    return None if first is None else len(first)


def _repeat_for_beams(labels: Tensor | None, batch: int) -> Tensor | None:
    """Repeats the labels of each sample for its beams."""
    if labels is None or len(labels) == 1 or batch % len(labels):
        return labels
    return labels.repeat_interleave(batch // len(labels), dim=0)


def _token_embedding(root: nn.Module) -> nn.Module | None:
    try:
        embedding = root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def _constant(labels: Int[Tensor, "batch key"]) -> int | None:
    first = int(labels.flatten()[0]) if labels.numel() else SPECIAL
    return first if first != SPECIAL and bool((labels == first).all()) else None
