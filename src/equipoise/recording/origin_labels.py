"""Labels of keys by the inputs from which they are computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens.token_batch import SPECIAL
from .attention_call import AttentionCall
from .key_origins import MANY, READ, Origins
from .origin_codes import MIXED, QUERY
from .token_labels import LabeledKeys, label_keys
from .token_stream import TokenStream

KEEP = "keep"
"""Verdict: the labels that the inputs determine are used."""
NO_KEYS = (
    "its softmax is not over products of queries and keys, but over other scores such as those of sampling points, so "
    "it is not attention over tokens"
)
LEARNED = "its keys are learned parameters and depend on no input"
UNTRACEABLE = "its keys come from several modalities at once, or from functions that cannot be traced"
Verdict = LabeledKeys | str | None


class OriginLabels:
    """Checks the labels of keys against their origin, and derives labels from the origin where they disagree.

    Args:
        origins: the traced origins of all tensors.
        names: modality names of the labels.
        stream: tokens of the decoder, or of the whole model.
    """

    def __init__(self, origins: Origins, names: tuple[str, ...], stream: TokenStream) -> None:
        self.origins, self.names, self.stream = origins, names, stream

    def check(self, call: AttentionCall, known: LabeledKeys | str | None, *, untraced: bool) -> Verdict:
        """Returns ``KEEP`` if the labels agree with the origin of the keys; otherwise labels by origin, or a reason.

        Args:
            call: the attention.
            known: labels that the inputs determine, or why they determine none.
            untraced: whether the embeddings were passed by the caller, so that they have no traced origin.
        """
        keys = self.origins.keys(call)
        if keys is None:
            return NO_KEYS
        origins = self.origins.names_in(keys)
        labeled = isinstance(known, LabeledKeys)
        if origins == [] and not (labeled and known.unimodal):
            # Embeddings passed by the caller have no traced origin either.
            return KEEP if not labeled or untraced else LEARNED
        if origins == []:
            return KEEP
        if MANY in origins:
            agrees = labeled and known.constant is None and self._agrees(keys, known)
            return KEEP if agrees else (known if isinstance(known, str) else UNTRACEABLE)
        if origins == [READ] and not (labeled and known.unimodal):
            return "its keys are learned queries that have attended to several modalities"
        if labeled and self._agrees(keys, known):
            return KEEP
        if len(origins) == 1:
            name = origins[0]
            if name not in self.names:
                return f"its keys are {name}, and the modalities are {', '.join(self.names)}"
            labels = torch.full((call.sizes[3],), self.names.index(name))
        else:
            labels = self._labels_of_codes(keys)
        return self._labels_from_origin(call, labels, origins)

    def _agrees(self, keys: Tensor, known: LabeledKeys) -> bool:
        """Whether the labels equal the origins of all keys for which both are known."""
        origin = self._labels_of_codes(keys)
        labels = known.keys.to(origin.device)
        if labels.shape[-1] != origin.shape[-1] or (labels.ndim == 2 and len(labels) not in (1, len(origin))):
            return False
        if known.constant is not None and not set(self.origins.names_in(keys)) <= {*self.names, MANY, READ}:
            return False
        both = (origin != SPECIAL) & (labels != SPECIAL)
        if known.constant is None:
            # A placeholder that the model does not replace has text origin, but an image label by configuration.
            both &= keys != self.origins.code("text")
        return bool(((origin == labels) | ~both).all())

    def _labels_of_codes(self, codes: Tensor) -> Tensor:
        """Converts codes of origins to labels; ``SPECIAL`` for no input and for unnamed modalities."""
        table = torch.full((MIXED + 1,), SPECIAL, device=codes.device)
        for code, name in enumerate(self.origins.names, start=1):
            if name in self.names:
                table[code] = table[code + QUERY] = self.names.index(name)
        return table[codes.long()]

    def _labels_from_origin(self, call: AttentionCall, labels: Tensor, origins: list[str]) -> LabeledKeys:
        """Returns labels derived from the origin of keys and queries."""
        rows = self.origins.queries(call)
        keys = self.origins.keys(call)
        if rows is not None and keys is not None and torch.equal(rows, keys):
            # Self-attention: a key that is masked for all queries is padding, as is the query at its position.
            call = replace(call, reads_itself=True)
        fields: dict[str, Any] = {} if rows is None else {"queries": self._labels_of_codes(rows)}
        if rows is not None and rows.shape[1] == self.stream.rows and self.stream.labels is not None:
            is_text = bool((rows == self.origins.code("text")).all())
            if is_text and len(self.stream.labels) in (1, len(rows)):
                fields |= {key: value for key in ("valid", "answer")
                          if (value := getattr(self.stream, key)) is not None and len(value) == len(rows)}  # fmt: skip
        constant = int(labels.flatten()[0]) if len(origins) == 1 else None
        unimodal = (
            rows is not None and origins != ["text"] and self.origins.names_in(rows) == origins and len(self.names) > 1
        )
        return label_keys(call, labels, self.names, constant=constant, unimodal=unimodal, **fields)

    def extend(self, call: AttentionCall, verdict: Verdict) -> LabeledKeys | str | None:
        """Extends the verdict of the first pass to the keys of a decoding step with a cache."""
        if not isinstance(verdict, LabeledKeys):
            return verdict  # type: ignore[return-value]
        batch, _, _, keys = call.sizes
        if verdict.constant is not None:
            labels = torch.full((keys,), verdict.constant)
        elif verdict.keys.shape[-1] > keys or len(verdict.keys) not in (1, batch):
            return f"it has {keys} keys, and the modality of {verdict.keys.shape[-1]} is known"
        else:
            labels = F.pad(verdict.keys, (0, keys - verdict.keys.shape[-1]), value=self.stream.text)
        return LabeledKeys(labels, self.names, constant=verdict.constant, continues=True, unimodal=verdict.unimodal)
