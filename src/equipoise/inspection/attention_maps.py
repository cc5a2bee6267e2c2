"""Which tokens every single token reads, layer by layer and head by head, in a form that fits into a page."""

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
"""How many figures a page may hold of the means over heads, and as many again of single heads."""

MOST = 96
"""Tokens that can be chosen on a page."""

WHOLE = {"answer": "the whole answer", "prompt": "the whole prompt"}


class AttentionMaps(NamedTuple):
    """Attention of readers on all tokens.

    Attributes:
        readers: the whole answer, the whole prompt, then single tokens in their order.
        layers: places of the layers among the sites: those whose keys are the sequence itself.
        mean: (reader, layer, key) over heads, float16.
        by_head: (some readers, layer, head, key) of the first readers, float16; as many as fit.
        left_out: tokens that could not be chosen any more.
    """

    readers: tuple[TraceReader, ...]
    layers: tuple[int, ...]
    mean: Float[Tensor, "reader layer key"]
    by_head: Float[Tensor, "some layer head key"]
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON's own types; the figures as little-endian float16 in base64, the last axis running fastest."""
        return {
            "readers": [reader._asdict() for reader in self.readers],
            "layers": list(self.layers),
            "left_out": self.left_out,
            "mean": _packed(self.mean),
            "by_head": _packed(self.by_head),
        }


def trace_readers(
    texts: Sequence[str], length: int, sites: int, names: tuple[str, ...], labels: Tensor
) -> list[TraceReader]:
    """The tokens that can be chosen: the answer goes first, then words of the prompt from its end on.

    Args:
        texts: of all tokens.
        length: of the prompt; what follows is the answer.
        sites: number of layers, which decides how many there is room for.
        names, labels: modality of all tokens; only text can be chosen.

    Example:
        >>> found = readers_of(["a", "<image>", "b", "c"], 3, 2, ("text", "image"), torch.tensor([0, 1, 0, 0]))
        >>> [(reader.text, reader.query) for reader in found]
        [('a', 0), ('b', 2), ('c', 2)]
    """
    room = max(1, min(MOST, VALUES // max(1, sites * len(texts)) - len(WHOLE)))
    return [
        TraceReader(texts[place], "prompt", place, place) if place < length else
        TraceReader(texts[place], "answer", place, place - 1)
        for place in sorted(selectable_layers(length, names, labels)[:room])
    ]  # fmt: skip


def selectable_layers(length: int, names: tuple[str, ...], labels: Int[Tensor, " token"]) -> list[int]:
    """Places of words, the most wanted first."""
    word = (labels == (names.index("text") if "text" in names else 0)).tolist()
    return [*range(length, len(word)), *(place for place in reversed(range(length)) if word[place])]


def build_attention_maps(
    sites: Sequence[str], seen: dict[str, AttentionRecord], trace: AttentionTrace, length: int
) -> AttentionMaps:
    """The maps of a sequence, whose prompt has ``length`` tokens, out of what a pass has shown."""
    layers = [place for place, site in enumerate(sites) if site in trace.rows]
    readers = (*(TraceReader(text, part) for part, text in WHOLE.items()), *trace.readers)
    if trace.labels is None:
        return AttentionMaps(readers, (), torch.zeros(len(readers), 0, 0).half(), torch.zeros(0, 0, 0, 0).half())
    rows = [
        torch.cat([*(seen[part].tokens(sites[layer]) for part in WHOLE), trace.rows[sites[layer]].transpose(0, 1)])
        for layer in layers
    ]
    mean = torch.stack([row.mean(dim=1) for row in rows], dim=1)
    heads = max(row.shape[1] for row in rows)
    each = len(layers) * heads * mean.shape[-1]
    some = len(mean) if len(mean) * each <= VALUES else int(each <= VALUES)
    by_head = torch.stack([F.pad(row[:some], (0, 0, 0, heads - row.shape[1])) for row in rows], dim=1)
    left_out = len(selectable_layers(length, seen["prompt"].names, trace.labels)) - len(trace.readers)
    return AttentionMaps(readers, tuple(layers), mean.half(), by_head.half(), left_out)


def _packed(values: Tensor) -> dict[str, Any]:
    data = values.numpy().astype(np.dtype("<f2")).tobytes()
    return {"shape": list(values.shape), "float16": base64.b64encode(data).decode()}
