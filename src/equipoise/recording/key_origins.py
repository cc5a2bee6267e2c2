"""Attributes keys and queries of a Hugging Face model to its inputs, by the names of its arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int8
from torch import Tensor, nn
from torch.nn.modules import module as registry

from .attention_call import AttentionCall
from .origin_codes import MIXED, NEUTRAL, QUERY, READER, by_key
from .provenance import Provenance
from .submodels import ORDER, Submodels, output_modalities, submodel_kinds

MANY = "several"
"""Name of keys that contain several modalities at once."""
READ = "learned queries"
"""Name of learned queries that have attended to several modalities."""
NO_INPUT = re.compile(
    r"mask|position|grid|sizes?$|_ids_(keep|restore)|token_type|type_ids|spatial_shapes|level|cache|past|num_|bbox|"
    r"lengths?$|ratio|return_|use_|output_|tile|_shape|interpolate|noise|second_per|task_type|step|scale"
)
"""Arguments that describe tokens but are not tokens."""
KINDS = (
    ("video", re.compile(r"video")),
    ("image", re.compile(r"pixel|image|visual|flattened_patches|patches|img|vision")),
    ("audio", re.compile(r"input_features|input_values|audio|speech|spectrogram|waveform|speaker")),
)
DECODER_INPUTS = re.compile(r"(decoder_(input_ids|inputs_embeds|input_values|input_features)|labels)$")
TEXT = re.compile(r"(text_|decoder_|qformer_|context_|question_|class_|tasks?_)?(input_ids|inputs_embeds)$")
STATES = re.compile(r"hidden_state|_outputs?$|_embeds$|features$")
OWN_IDS = re.compile(r"(\w+?)_(input_ids|inputs)$")
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.RNNBase)
"""Modules whose inner functions are not visible to ``__torch_function__``."""


class Origins:
    """Origins of the keys and queries of a model.

    Args:
        parts: submodels of the model.

    Attributes:
        names: modality names of the codes 1, 2, ...
    """

    def __init__(self, parts: Submodels) -> None:
        self._parts = parts
        self._tracing = False
        self._provenance = Provenance()
        self._inputs: set[int] = set()
        self.names: list[str] = list(dict.fromkeys((*parts.modalities, *ORDER)))

    @property
    def active(self) -> bool:
        """Whether this pass is traced; decoding steps with a cache reuse the result of the first pass."""
        return self._provenance.active

    @active.setter
    def active(self, value: bool) -> None:
        # Outside of `tracing` there are no codes, so that no key would seem to come from any input.
        self._provenance.active = value and self._tracing

    @contextmanager
    def tracing(self, root: nn.Module) -> Iterator[None]:
        """Traces all functions called in the block."""

        def propagate(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(module, OPAQUE) and self.active and id(module) in self._parts.paths:
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, Tensor) and args and isinstance(args[0], Tensor):
                    self._provenance.propagate(args[0], first)

        handle = registry.register_module_forward_hook(propagate)
        try:
            with self._provenance.tracing():
                self._tracing = self.active = True
                yield
        finally:
            handle.remove()
            self._tracing = self.active = False

    def begin(self, part: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Marks the inputs of a submodel that is called from outside the model."""
        self._inputs = set()
        for name, value in arguments.items():
            self._mark(part, name, value)
        # Tracing is unnecessary if the only input has the only modality of the model.
        self.active = self._inputs != {1} or len(self._parts.modalities) > 1

    def mark_text(self, embedded: Tensor) -> None:
        """Marks text that was embedded before the model was called, as in ``generate`` of some models."""
        self._provenance.mark(embedded, self.code("text"))

    def code(self, name: str) -> int:
        """Returns the code of a modality, which is added if it is new."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name) + 1

    def is_known(self, tensor: Any) -> bool:
        """Whether a tensor has codes."""
        return isinstance(tensor, Tensor) and self._provenance.codes_of(tensor) is not None

    def keys(self, call: AttentionCall) -> Int8[Tensor, "batch key"] | None:
        """Returns the codes of the keys; None for a softmax that is not over products of queries and keys."""
        if call.sources is not None:
            codes = self._of_source(call, 1)
            # Keys that the layer adds depend on no input.
            return torch.nn.functional.pad(codes, (0, call.added), value=NEUTRAL)
        if call.key.numel():
            return self._by_token(call.key)
        codes = None if call.attention is None else self._provenance.keys_of_scores(call.attention)
        return None if codes is None else by_key(codes.transpose(-1, -2))

    def queries(self, call: AttentionCall) -> Int8[Tensor, "batch query"] | None:
        """Returns the codes of the queries."""
        if call.sources is not None:
            return self._of_source(call, 0)
        return self._by_token(call.query if call.attention is None or call.query.numel() else call.attention)

    def names_in(self, codes: Tensor) -> list[str]:
        """Returns the names of the modalities that occur."""
        present = [code for code in codes.unique().tolist() if code != NEUTRAL]
        special = {MIXED: MANY, READER: READ}
        return list(dict.fromkeys(special.get(code) or self.names[code % QUERY - 1] for code in present))

    def _by_token(self, tensor: Tensor) -> Tensor:
        codes = self._provenance.codes_of(tensor)
        batch, _, tokens, _ = tensor.shape
        return torch.zeros(batch, tokens, dtype=torch.int8, device=tensor.device) if codes is None else by_key(codes)

    def _of_source(self, call: AttentionCall, index: int) -> Tensor:
        tensor = call.sources[index]  # type: ignore[index]
        codes = self._provenance.codes_of(tensor)
        codes = torch.zeros(tensor.shape, dtype=torch.int8, device=tensor.device) if codes is None else codes
        codes = codes[None] if call.batch_dim is None else codes.transpose(0, 1) if call.batch_dim == 1 else codes
        return by_key(codes[:, None])

    def _mark(self, part: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.ndim and value.dtype != torch.bool and (code := self._code_of_input(part, name, value)):
                self._inputs.add(code)
                self._provenance.mark(value, code)
        elif NO_INPUT.search(name):
            return
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._mark(part, name, item)
        elif hasattr(value, "last_hidden_state"):
            self._mark_encoded(value.last_hidden_state)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._mark(part, str(key), item)

    def _mark_encoded(self, states: Any) -> None:
        """Marks the output of a unimodal encoder that ran outside of the block."""
        kinds = () if self._parts.encoder is None else submodel_kinds(self._parts.encoder)
        if isinstance(states, Tensor) and len(kinds) == 1 and not self.is_known(states):
            self._inputs.add(self.code(kinds[0]))
            self._provenance.mark(states, self.code(kinds[0]))

    def _code_of_input(self, part: nn.Module, name: str, value: Tensor) -> int:
        if DECODER_INPUTS.match(name):
            outputs = output_modalities(self._parts.root)
            if outputs == ("text",) or (value.ndim < 3 and "text" in outputs):
                return self._code_of_text(value)
            return self.code(outputs[0]) if len(outputs) == 1 else MIXED
        for kind, pattern in KINDS if not TEXT.match(name) else ():
            if pattern.search(name) and not NO_INPUT.search(name):
                return self.code(self._image_or_video(kind))
        if NO_INPUT.search(name):
            return NEUTRAL
        if TEXT.match(name):
            kinds = submodel_kinds(part)
            if len(kinds) == 1 and kinds[0] != "text":
                return self.code(kinds[0])
            is_joint = value.is_floating_point() and part is self._parts.root and bool(self._parts.others)
            return MIXED if is_joint else self._code_of_text(value)
        if (match := OWN_IDS.match(name)) is not None:
            return self.code(match[1])
        if name == "inputs" and not value.is_floating_point():
            return self._code_of_text(value)
        if not value.is_floating_point() or value.ndim < 2:
            return NEUTRAL
        if part is not self._parts.root and (kind := self._parts.unimodal_kind(part)) in self._parts.others:
            return self.code(kind)  # type: ignore[arg-type]
        # Hidden states that were computed elsewhere may contain any modality; other inputs are named by their argument.
        return MIXED if STATES.search(name) else self.code(name)

    def _code_of_text(self, value: Tensor) -> int:
        """Returns the code of token ids; several ids per position are streams whose embeddings the model adds."""
        return MIXED if value.ndim == 3 and not value.is_floating_point() else self.code("text")

    def _image_or_video(self, kind: str) -> str:
        """Returns "video" for the images of a model that takes only videos: they are frames."""
        others = self._parts.others
        return "video" if kind == "image" and "image" not in others and "video" in others else kind
