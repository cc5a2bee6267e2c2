"""The inputs of a Hugging Face model as origins of keys and queries, by the names of its arguments."""

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
from .provenance import MIXED, NEUTRAL, QUERY, READER, Provenance, by_key
from .submodels import ORDER, Submodels, submodel_kinds

MANY = "several"
"""In place of a name, for keys that carry several modalities at once."""
READ = "learned queries"
"""In place of a name, for learned queries that have read several modalities."""
NO_INPUT = re.compile(
    r"mask|position|grid|sizes?$|_ids_(keep|restore)|token_type|type_ids|spatial_shapes|level|cache|past|num_|bbox|"
    r"lengths?$|ratio|return_|use_|output_|tile|_shape|interpolate|noise|second_per|task_type|step|scale"
)
"""Arguments that say something about tokens, and are none."""
KINDS = (
    ("video", re.compile(r"video")),
    ("image", re.compile(r"pixel|image|visual|flattened_patches|patches|img|vision")),
    ("audio", re.compile(r"input_features|input_values|audio|speech|spectrogram|waveform|speaker")),
)
WRITTEN = re.compile(r"(decoder_(input_ids|inputs_embeds|input_values|input_features)|labels)$")
WORDS = re.compile(r"(text_|decoder_|qformer_|context_|question_|class_|tasks?_)?(input_ids|inputs_embeds)$")
STATES = re.compile(r"hidden_state|_outputs?$|_embeds$|features$")
OWN_IDS = re.compile(r"(\w+?)_(input_ids|inputs)$")
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.RNNBase)
"""Modules whose insides run where functions are not seen."""


class Origins:
    """Where the keys and queries of a model come from.

    Args:
        parts: of the model.

    Attributes:
        names: of the codes 1, 2, ...
    """

    def __init__(self, parts: Submodels) -> None:
        self._parts = parts
        self._followed = False
        self._provenance = Provenance()
        self._met: set[int] = set()
        self.names: list[str] = list(dict.fromkeys((*parts.modalities, *ORDER)))

    @property
    def active(self) -> bool:
        """Whether this pass is followed; steps that decode with a cache go on with what their first pass found."""
        return self._provenance.active

    @active.setter
    def active(self, value: bool) -> None:
        # Without the function mode of `following` there are no codes, and every key would seem to come from no input.
        self._provenance.active = value and self._followed

    @property
    def said(self) -> str:
        """Words for ``MANY``."""
        return "several modalities at once, or through functions that cannot be followed"

    @contextmanager
    def following(self, root: nn.Module) -> Iterator[None]:
        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(module, OPAQUE) and self.active and id(module) in self._parts.paths:
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, Tensor) and args and isinstance(args[0], Tensor):
                    self._provenance.give(first, args[0])

        handle = registry.register_module_forward_hook(leave)
        try:
            with self._provenance.following():
                self._followed = self.active = True
                yield
        finally:
            handle.remove()
            self._followed = self.active = False

    def begin(self, part: nn.Module, given: Mapping[str, Any]) -> None:
        """Notes the inputs of a part that is called from outside the model."""
        self._met = set()
        for name, value in given.items():
            self._note(part, name, value)
        # Nothing else can be met where the only input is of the only modality.
        self.active = self._met != {1} or len(self._parts.modalities) > 1

    def words(self, embedded: Tensor) -> None:
        """Notes words that became vectors before the model was called, as ``generate`` of some models does."""
        self._provenance.mark(embedded, self.code("text"))

    def code(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name) + 1

    def is_known(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and self._provenance.of(tensor) is not None

    def give(self, output: Tensor, source: Tensor) -> None:
        """Codes of what a kernel returned whose inside is not followed."""
        self._provenance.give(output, source)

    def keys(self, call: AttentionCall) -> Int8[Tensor, "batch key"] | None:
        """Codes of the keys; None for a softmax over anything else than products of queries and keys."""
        if call.sources is not None:
            found = self._of_source(call, 1)
            # Keys that the layer adds itself come from no input.
            return torch.nn.functional.pad(found, (0, call.added), value=NEUTRAL)
        if call.key.numel():
            return self._by_token(call.key)
        found = None if call.attention is None else self._provenance.keys_of_scores(call.attention)
        return None if found is None else by_key(found.transpose(-1, -2))

    def queries(self, call: AttentionCall) -> Int8[Tensor, "batch query"] | None:
        """Codes of the queries."""
        if call.sources is not None:
            return self._of_source(call, 0)
        return self._by_token(call.query if call.attention is None or call.query.numel() else call.attention)

    def names_in(self, codes: Tensor) -> list[str]:
        """The modalities that occur, without what comes from no input."""
        found = [code for code in codes.unique().tolist() if code != NEUTRAL]
        special = {MIXED: MANY, READER: READ}
        return list(dict.fromkeys(special.get(code) or self.names[code % QUERY - 1] for code in found))

    def _by_token(self, tensor: Tensor) -> Tensor:
        codes = self._provenance.of(tensor)
        batch, _, tokens, _ = tensor.shape
        return torch.zeros(batch, tokens, dtype=torch.int8, device=tensor.device) if codes is None else by_key(codes)

    def _of_source(self, call: AttentionCall, number: int) -> Tensor:
        tensor = call.sources[number]  # type: ignore[index]
        codes = self._provenance.of(tensor)
        codes = torch.zeros(tensor.shape, dtype=torch.int8, device=tensor.device) if codes is None else codes
        codes = codes[None] if call.batch_dim is None else codes.transpose(0, 1) if call.batch_dim == 1 else codes
        return by_key(codes[:, None])

    def _note(self, part: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.ndim and value.dtype != torch.bool and (code := self._of_input(part, name, value)):
                self._met.add(code)
                self._provenance.mark(value, code)
        elif NO_INPUT.search(name):
            return
        elif isinstance(value, (list, tuple)):
            for one in value:
                self._note(part, name, one)
        elif isinstance(value, Mapping) and not hasattr(value, "last_hidden_state"):
            for key, one in value.items():
                self._note(part, str(key), one)

    def _of_input(self, part: nn.Module, name: str, value: Tensor) -> int:
        if WRITTEN.match(name):
            written = getattr(self._parts.root, "output_modalities", None) or ("text",)
            written = (written,) if isinstance(written, str) else tuple(written)
            if written == ("text",) or (value.ndim < 3 and "text" in written):
                return self._ids(value)
            return self.code(written[0]) if len(written) == 1 else MIXED
        for kind, pattern in KINDS if not WORDS.match(name) else ():
            if pattern.search(name) and not NO_INPUT.search(name):
                return self.code(self._named(kind))
        if NO_INPUT.search(name):
            return NEUTRAL
        if WORDS.match(name):
            said = submodel_kinds(part)
            if len(said) == 1 and said[0] != "text":
                return self.code(said[0])
            vectors = value.is_floating_point() and part is self._parts.root and bool(self._parts.others)
            return MIXED if vectors else self._ids(value)
        if (own := OWN_IDS.match(name)) is not None:
            return self.code(own[1])
        if name == "inputs" and not value.is_floating_point():
            return self._ids(value)
        if not value.is_floating_point() or value.ndim < 2:
            return NEUTRAL
        if part is not self._parts.root and (alone := self._parts.alone(part)) in self._parts.others:
            return self.code(alone)  # type: ignore[arg-type]
        # States that were not seen to be computed may be of any modality; other inputs have their own name.
        return MIXED if STATES.search(name) else self.code(name)

    def _ids(self, value: Tensor) -> int:
        """Words; several ids at one place are streams that the model adds up."""
        return MIXED if value.ndim == 3 and not value.is_floating_point() else self.code("text")

    def _named(self, kind: str) -> str:
        """Pictures of a model that reads videos alone are frames."""
        others = self._parts.others
        return "video" if kind == "image" and "image" not in others and "video" in others else kind
