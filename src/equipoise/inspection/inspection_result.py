"""``Inspection``: attention shares by layer and head, maps of single tokens, and the effects of ablations."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import require_extra
from ..io.atomic_files import atomic_write, to_jsonable
from ..io.table_display import to_pandas
from ..recording import AttentionRecord
from .attention_maps import AttentionMaps
from .media_effects import MediaEffect
from .patch_layout import PatchGrid

SCHEMA = 1
VIEWS = ("prompt", "answer")
CAVEAT = (
    "Attention does not prove use: attended tokens may be ignored, and text tokens may carry information from the "
    "image. Some tokens are attention sinks, which get much attention regardless of their content. Rely on the effect "
    "of removing the image on the answer more than on attention."
)


class InspectedToken(NamedTuple):
    """A token of the sequence: its text, modality (None for padding) and part (prompt or answer)."""

    text: str
    modality: str | None
    part: str


class SinkToken(NamedTuple):
    """A token with much attention: its position and its share, averaged over layers and heads."""

    place: int
    text: str
    modality: str | None
    attention: float


class InspectionView(NamedTuple):
    """The attention of one part of the sequence.

    Attributes:
        share: (layer, head, modality) share of attention, averaged over the queries.
        without_sinks: the same, excluding the tokens with the most attention in each layer.
        uniform: (layer, modality) share if each query attended uniformly to all visible keys.
        sinks: the tokens with the most attention over all layers.
    """

    share: Float[Tensor, "layer head modality"]
    without_sinks: Float[Tensor, "layer head modality"]
    uniform: Float[Tensor, "layer modality"]
    sinks: tuple[SinkToken, ...]


class ImageScene(NamedTuple):
    """A map of an image: one for each image, or one each for the tiles and the overview of an image.

    Attributes:
        image: PNG.
        grid: number of tokens in each direction.
        frame: the region that the grid covers, relative to the image.
        places: positions of the tokens in the sequence.
        title: name of the map.
        boxes: region of each token; empty if the tokens are the cells of the grid, row by row.
    """

    image: bytes
    grid: PatchGrid
    frame: tuple[float, float, float, float]
    places: tuple[int, ...]
    title: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """Result of ``look``.

    Attributes:
        model: name of the model.
        names: modality names.
        prompt: the formatted prompt, as passed to the processor.
        answer: the generated answer, or the one that was passed.
        given: whether the answer was passed.
        tokens: tokens of prompt and answer.
        layers: recorded layers, in calling order.
        views: ``"prompt"``: queries of all prompt tokens; ``"answer"``: queries that predict the answer's tokens.
        log_likelihood: mean log-likelihood of the answer's tokens, in nats.
        effects: changes of the log-likelihood when inputs are removed or attention is averaged.
        target: the modality besides text that was passed; None for text-only prompts.
        grid: arrangement of the target's tokens as image patches; None if unknown.
        frame: left, upper, right and lower edge of the region that the grid covers, relative to the image size; with
            padding, it is larger than the image.
        maps: attention of single tokens.
        image: PNG for the report.
        exclude_top_k: number of tokens that ``without_sinks`` excludes.
        notes: sentences shown at the top of the report.
        written: (layer,) of an encoder-decoder, whose layers are the cross-attention of the decoder: the norm of its
            output relative to the sum with that of the self-attention; empty for other models. Its ``maps`` are
            weighted by the norm of the values.
        scenes: the maps if there are several, for several images or for the tiles and the overview of an image;
            ``image``, ``grid`` and ``frame`` are then those of the first.
        unplaced: positions of image tokens that cover no region, such as those at the end of each row.
        separators: positions of text tokens between the tiles of an image.
    """

    model: str
    names: tuple[str, ...]
    prompt: str
    answer: str
    given: bool
    tokens: tuple[InspectedToken, ...]
    layers: tuple[str, ...]
    views: Mapping[str, InspectionView]
    log_likelihood: float
    effects: tuple[MediaEffect, ...]
    target: str | None
    grid: PatchGrid | None
    frame: tuple[float, float, float, float]
    maps: AttentionMaps
    image: bytes | None
    exclude_top_k: int
    notes: tuple[str, ...] = ()
    written: tuple[float, ...] = ()
    scenes: tuple[ImageScene, ...] = ()
    unplaced: tuple[int, ...] = ()
    separators: tuple[int, ...] = ()

    @property
    def by_construction(self) -> bool:
        """Whether all keys belong to the target, so that its share is 100 % by construction."""
        if self.target is None:
            return False
        return all(bool((view.uniform[:, self.names.index(self.target)] == 1).all()) for view in self.views.values())

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row for each view, layer, head and modality.

        ``layer`` is the index into ``layers``, ``name`` its module name, and ``aei`` the attention efficiency index,
        share / uniform share (arXiv 2508.10552): 1 if the modality gets as much attention as its number of tokens
        suggests.
        """
        return [
            {
                "view": name, "layer": layer, "name": module, "head": head, "modality": modality,
                "share": float(view.share[layer, head, m]),
                "share_without_sinks": float(view.without_sinks[layer, head, m]),
                "uniform": float(view.uniform[layer, m]),
                "aei": float(view.share[layer, head, m] / view.uniform[layer, m]),
            }
            for name, view in self.views.items()
            for layer, module in enumerate(self.layers)
            for head in range(view.share.shape[1])
            for m, modality in enumerate(self.names)
        ]  # fmt: skip

    def to_pandas(self) -> Any:
        """Returns ``rows()`` as a ``pandas.DataFrame``.

        Raises:
            ConfigError: pandas is not installed.
        """
        return to_pandas(self.rows(), "Inspection")

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.table())}\n\n{escape(self.answer)}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``look.json`` as JSON types."""
        return dict(self._content)

    @cached_property
    def _content(self) -> dict[str, Any]:
        return to_jsonable(
            {
                "schema": SCHEMA, "kind": "look", "model": self.model, "modalities": self.names,
                "target": self.target, "prompt": self.prompt, "answer": self.answer, "given": self.given,
                "log_likelihood": self.log_likelihood, "effects": [effect._asdict() for effect in self.effects],
                "tokens": [token._asdict() for token in self.tokens], "sites": self.layers,
                "views": {
                    name: {
                        "share": view.share, "without_sinks": view.without_sinks, "even": view.uniform,
                        "sinks": [sink._asdict() for sink in view.sinks],
                    }
                    for name, view in self.views.items()
                },
                "sinks_left_out": self.exclude_top_k, "grid": self.grid and self.grid._asdict(), "frame": self.frame,
                "maps": self.maps.to_dict(), "notes": self.notes, "caveat": CAVEAT,
                "written": self.written, "by_construction": self.by_construction,
                "picture": self.image and _data_url(self.image),
                "scenes": [
                    {
                        "picture": _data_url(one.image), "grid": one.grid._asdict(), "frame": one.frame,
                        "places": one.places, "title": one.title, "boxes": one.boxes,
                    }
                    for one in self.scenes
                ],
                "unplaced": self.unplaced, "separators": self.separators,
            }, "look",
        )  # fmt: skip

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``look.json`` atomically and returns its path."""
        return atomic_write(Path(folder) / "look.json", json.dumps(self.to_dict(), allow_nan=False) + "\n")

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Writes a self-contained HTML page, ``report.html`` if ``path`` is a folder, and returns its path."""
        with require_extra("Inspection.report"):
            from ..report.look_html import look_report

        return look_report(self.to_dict(), path)

    def table(self) -> str:
        """Returns a text table of shares by layer and modality: prompt, answer, and answer without sinks."""
        parts = {name: view.share.nanmean(dim=1) for name, view in self.views.items()}
        parts["without sinks"] = self.views["answer"].without_sinks.nanmean(dim=1)
        # A modality without attention anywhere has no columns.
        shown = [] if self.by_construction and self.written else [
            m for m in range(len(self.names)) if any(bool((part[:, m] > 0).any()) for part in parts.values())
        ]  # fmt: skip
        columns = {name: part[:, shown] for name, part in parts.items()} if shown else {}
        names = [self.names[m] for m in shown]
        width = max([9, *(len(name) + 2 for name in names)])
        lines = [
            "     " + "".join(f"{name:>{width * len(names)}}" for name in columns),
            "layer" + "".join(f"{name:>{width}}" for name in names) * len(columns),
        ]
        if self.written:
            lines[0], lines[1] = f"{lines[0]}{'written by':>16}", f"{lines[1]}{'cross-attention':>16}"
        for layer in (*range(len(self.layers)), None):
            cells = [values.nanmean(dim=0) if layer is None else values[layer] for values in columns.values()]
            figures = "".join(f"{100 * value:.1f} %".rjust(width) for part in cells for value in part.tolist())
            if self.written:
                value = sum(self.written) / len(self.written) if layer is None else self.written[layer]
                figures += f"{100 * value:.1f} %".rjust(16)
            lines.append(("mean" if layer is None else str(layer)).rjust(5) + figures)
        return "\n".join(lines)


def _data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def build_view(
    record: AttentionRecord,
    uniform: Sequence[Float[Tensor, " modality"]],
    texts: Sequence[str],
    labels: Tensor | None,
    exclude_top_k: int,
) -> InspectionView:
    """Builds the view of one group of queries from their record."""
    share = without_sinks = _stack_heads([record.share(layer)[0] for layer in record.layers])
    if exclude_top_k:
        without_sinks = _stack_heads([record.share(name, exclude_top_k=exclude_top_k)[0] for name in record.layers])
    sinks = tuple(_sinks(record, texts, labels, exclude_top_k))
    return InspectionView(share, without_sinks, torch.stack(list(uniform)), sinks)


def _sinks(record: AttentionRecord, texts: Sequence[str], labels: Tensor | None, count: int) -> list[SinkToken]:
    rows = [record.tokens(layer)[0].mean(dim=0) for layer in record.layers]
    rows = [row for row in rows if len(row) == len(texts)]
    if labels is None or not rows:
        return []
    mean = torch.stack(rows).mean(dim=0)
    positions: list[int] = mean.topk(min(count, len(mean))).indices.tolist()
    modality = [record.names[label] if label >= 0 else None for label in labels.tolist()]
    return [SinkToken(i, texts[i], modality[i], float(mean[i])) for i in positions]


def _stack_heads(parts: Sequence[Float[Tensor, "head modality"]]) -> Float[Tensor, "layer head modality"]:
    """Stacks layers, padding those with fewer heads with NaN."""
    heads = max(len(part) for part in parts)
    return torch.stack([F.pad(part, (0, 0, 0, heads - len(part)), value=math.nan) for part in parts])
