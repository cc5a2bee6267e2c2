"""What a look has found: shares of layers and heads, maps of single tokens, and what the answer needs."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..io.atomic_files import atomic_write, to_jsonable
from ..optional_packages import require_extra
from ..recording import AttentionRecord
from .attention_maps import AttentionMaps
from .media_effects import MediaEffect
from .patch_layout import PatchGrid

SCHEMA = 1
VIEWS = ("prompt", "answer")
CAVEAT = (
    "Attention is no proof of use: what is read may be ignored, and a token near the answer may carry what was read "
    "from the picture before. Some tokens are sinks that get much and say little. Believe what happens to the answer "
    "when the picture is taken away before you believe where attention goes."
)


class InspectedToken(NamedTuple):
    """A token of the sequence: its text, its modality (None for padding), and its part, prompt or answer."""

    text: str
    modality: str | None
    part: str


class SinkToken(NamedTuple):
    """A token that gets much: its place, and its part of the attention, mean over layers and heads."""

    place: int
    text: str
    modality: str | None
    attention: float


class InspectionView(NamedTuple):
    """The attention of one part of the sequence.

    Attributes:
        share: (layer, head, modality) part of the attention that falls on each modality, mean over the queries.
        without_sinks: the same without the tokens that get most in that layer.
        even: (layer, modality) the share, if all that a query sees got the same.
        sinks: the tokens that get most over all layers.
    """

    share: Float[Tensor, "layer head modality"]
    without_sinks: Float[Tensor, "layer head modality"]
    even: Float[Tensor, "layer modality"]
    sinks: tuple[SinkToken, ...]


@dataclass(frozen=True, eq=False)
class Inspection:
    """Where a model looks.

    Attributes:
        model: its name.
        names: of its modalities.
        prompt: what it was asked, as its processor got it.
        answer: what it wrote, or was given to write.
        given: the answer was given.
        tokens: of prompt and answer.
        sites: the layers, in calling order.
        views: ``"prompt"``: all its tokens read; ``"answer"``: those that write the answer.
        log_likelihood: of the answer, mean over its tokens, in nats.
        effects: what becomes of it when something is taken away.
        target: the modality that is looked at; None where the model reads text alone.
        grid: where its tokens lie; None without.
        frame: left, upper, right and lower edge of what the model sees of the picture, as parts of it.
        maps: attention of single tokens.
        picture: PNG, for the page.
        left_out: number of top tokens that ``without_sinks`` leaves out.
        notes: what a reader has to know.
    """

    model: str
    names: tuple[str, ...]
    prompt: str
    answer: str
    given: bool
    tokens: tuple[InspectedToken, ...]
    sites: tuple[str, ...]
    views: Mapping[str, InspectionView]
    log_likelihood: float
    effects: tuple[MediaEffect, ...]
    target: str | None
    grid: PatchGrid | None
    frame: tuple[float, float, float, float]
    maps: AttentionMaps
    picture: bytes | None
    left_out: int
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row for each view, layer, head and modality, for a data frame."""
        return [
            {
                "view": name, "layer": layer, "site": site, "head": head, "modality": modality,
                "share": float(view.share[layer, head, m]),
                "share_without_sinks": float(view.without_sinks[layer, head, m]),
                "even": float(view.even[layer, m]),
            }
            for name, view in self.views.items()
            for layer, site in enumerate(self.sites)
            for head in range(view.share.shape[1])
            for m, modality in enumerate(self.names)
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON's own types, as ``look.json`` has it."""
        return to_jsonable(
            {
                "schema": SCHEMA, "kind": "look", "model": self.model, "modalities": self.names,
                "target": self.target, "prompt": self.prompt, "answer": self.answer, "given": self.given,
                "log_likelihood": self.log_likelihood, "effects": [effect._asdict() for effect in self.effects],
                "tokens": [token._asdict() for token in self.tokens], "sites": self.sites,
                "views": {
                    name: {**view._asdict(), "sinks": [sink._asdict() for sink in view.sinks]}
                    for name, view in self.views.items()
                },
                "sinks_left_out": self.left_out, "grid": self.grid and self.grid._asdict(), "frame": self.frame,
                "maps": self.maps.to_dict(), "notes": self.notes, "caveat": CAVEAT,
                "picture": self.picture and "data:image/png;base64," + base64.b64encode(self.picture).decode(),
            }, "look",
        )  # fmt: skip

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``look.json``, whole or not at all, and returns its path."""
        return atomic_write(Path(folder) / "look.json", json.dumps(self.to_dict(), allow_nan=False) + "\n")

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Writes one self-contained HTML page; ``report.html`` where a folder is given."""
        with require_extra("Inspection.report"):
            from ..report.look_html import look_report

        return look_report(self.to_dict(), path)

    def table(self) -> str:
        """Layer by modality, in per cent: the prompt, the answer, and the answer without its top tokens."""
        shown = {name: view.share.nanmean(dim=1) for name, view in self.views.items()}
        shown["without sinks"] = self.views["answer"].without_sinks.nanmean(dim=1)
        wide = max(9, *(len(name) + 2 for name in self.names))
        lines = [
            "     " + "".join(f"{name:>{wide * len(self.names)}}" for name in shown),
            "layer" + "".join(f"{name:>{wide}}" for name in self.names) * len(shown),
        ]
        for layer in (*range(len(self.sites)), None):
            cells = [values.nanmean(dim=0) if layer is None else values[layer] for values in shown.values()]
            figures = "".join(f"{100 * value:.1f} %".rjust(wide) for part in cells for value in part.tolist())
            lines.append(("mean" if layer is None else str(layer)).rjust(5) + figures)
        return "\n".join(lines)


def build_view(
    seen: AttentionRecord,
    even: Sequence[Float[Tensor, " modality"]],
    texts: Sequence[str],
    labels: Tensor | None,
    left_out: int,
) -> InspectionView:
    """One part of the sequence, out of what was seen of its queries."""
    share = _stacked([seen.share(site)[0] for site in seen.layers])
    without = _stacked([seen.share(site, exclude_top_k=left_out)[0] for site in seen.layers]) if left_out else share
    return InspectionView(share, without, torch.stack(list(even)), tuple(_sinks(seen, texts, labels, left_out)))


def _sinks(seen: AttentionRecord, texts: Sequence[str], labels: Tensor | None, count: int) -> list[SinkToken]:
    rows = [seen.tokens(site)[0].mean(dim=0) for site in seen.layers]
    rows = [row for row in rows if len(row) == len(texts)]
    if labels is None or not rows:
        return []
    mean = torch.stack(rows).mean(dim=0)
    places: list[int] = mean.topk(min(count, len(mean))).indices.tolist()
    modality = [seen.names[label] if label >= 0 else None for label in labels.tolist()]
    return [SinkToken(place, texts[place], modality[place], float(mean[place])) for place in places]


def _stacked(parts: Sequence[Float[Tensor, "head modality"]]) -> Float[Tensor, "layer head modality"]:
    """Layers with fewer heads are filled up with NaN."""
    heads = max(len(part) for part in parts)
    return torch.stack([F.pad(part, (0, 0, 0, heads - len(part)), value=math.nan) for part in parts])
