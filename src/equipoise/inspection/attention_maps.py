"""Attention of single tokens on all tokens, by layer and head, limited to a size that fits into a report."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..recording import AttentionRecord
from .attention_trace import AttentionTrace, TraceReader

VALUES = 1_500_000
"""Maximum number of values in a report for means over heads, and again for single heads."""

MAX_TOKENS = 96
"""Maximum number of selectable tokens in a report."""

WHOLE = {"answer": "the whole answer", "prompt": "the whole prompt"}


class AttentionMaps(NamedTuple):
    """Attention of selected queries on all tokens.

    Attributes:
        readers: the whole answer, the whole prompt, then single tokens in their order.
        layers: indices of the self-attention layers among the recorded layers.
        mean: (reader, layer, key) over heads, float16.
        by_head: (some, layer, head, key) of the first readers, float16, as many as fit.
        left_out: number of tokens that are not selectable, for lack of space.
    """

    readers: tuple[TraceReader, ...]
    layers: tuple[int, ...]
    mean: Float[Tensor, "reader layer key"]
    by_head: Float[Tensor, "some layer head key"]
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON types; values are little-endian float16 in base64, in row-major order."""
        return {
            "readers": [reader._asdict() for reader in self.readers],
            "layers": list(self.layers),
            "left_out": self.left_out,
            "mean": _packed(self.mean),
            "by_head": _packed(self.by_head),
        }


def trace_readers(
    texts: Sequence[str], length: int, num_layers: int, names: tuple[str, ...], labels: Tensor
) -> list[TraceReader]:
    """Selects the queries to keep: tokens of the answer first, then text tokens of the prompt from its end.

    Args:
        texts: texts of all tokens.
        length: length of the prompt; the answer follows.
        num_layers: number of layers, which limits the number of queries.
        names, labels: modalities of all tokens; only text tokens are selectable.

    Example:
        >>> readers = trace_readers(["a", "<image>", "b", "c"], 3, 2, ("text", "image"), torch.tensor([0, 1, 0, 0]))
        >>> [(reader.text, reader.query) for reader in readers]
        [('a', 0), ('b', 2), ('c', 2)]
    """
    room = max(1, min(MAX_TOKENS, VALUES // max(1, num_layers * len(texts)) - len(WHOLE)))
    return [
        TraceReader(texts[index], "prompt", index, index) if index < length else
        TraceReader(texts[index], "answer", index, index - 1)
        for index in sorted(selectable_tokens(length, names, labels)[:room])
    ]  # fmt: skip


def selectable_tokens(length: int, names: tuple[str, ...], labels: Int[Tensor, " token"]) -> list[int]:
    """Returns the positions of selectable tokens, by priority."""
    word = (labels == (names.index("text") if "text" in names else 0)).tolist()
    return [*range(length, len(word)), *(index for index in reversed(range(length)) if word[index])]


def build_attention_maps(
    names: Sequence[str], records: dict[str, AttentionRecord], trace: AttentionTrace, length: int
) -> AttentionMaps:
    """Builds the maps of a sequence with a prompt of ``length`` tokens from the records and the trace of its pass."""
    layers = [index for index, name in enumerate(names) if name in trace.rows]
    readers = (*(TraceReader(text, part) for part, text in WHOLE.items()), *trace.readers)
    if trace.labels is None:
        return AttentionMaps(readers, (), torch.zeros(len(readers), 0, 0).half(), torch.zeros(0, 0, 0, 0).half())
    rows = [
        torch.cat([*(records[part].tokens(names[layer]) for part in WHOLE), trace.rows[names[layer]].transpose(0, 1)])
        for layer in layers
    ]
    mean = torch.stack([row.mean(dim=1) for row in rows], dim=1)
    heads = max(row.shape[1] for row in rows)
    each = len(layers) * heads * mean.shape[-1]
    count = len(mean) if len(mean) * each <= VALUES else int(each <= VALUES)
    by_head = torch.stack([F.pad(row[:count], (0, 0, 0, heads - row.shape[1])) for row in rows], dim=1)
    left_out = len(selectable_tokens(length, records["prompt"].names, trace.labels)) - len(trace.readers)
    return AttentionMaps(readers, tuple(layers), mean.half(), by_head.half(), left_out)


def _packed(values: Tensor) -> dict[str, Any]:
    data = values.numpy().astype(np.dtype("<f2")).tobytes()
    return {"shape": list(values.shape), "float16": base64.b64encode(data).decode()}
