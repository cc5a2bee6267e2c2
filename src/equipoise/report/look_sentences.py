"""Text of an inspection page: headline, findings, captions and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .text_format import MINUS, format_signed, join_and, pluralize

STILL = 0.005
"""A change of the log-likelihood below this is reported as no change."""

WRITTEN = (
    "Norm of the output of cross-attention relative to the sum with that of self-attention, mean over the queries that "
    "generate the answer."
)


class MeanShares:
    """Attention shares of an inspection as arrays.

    Attributes:
        names: modalities.
        target: the modality of interest, or None.
        sites: names of the layers.
        share, without: view -> (layer, head, modality), with and without sinks.
        even: view -> (layer, modality), the uniform share.
        effects: interventions of the inspection.
        written: (layer,) norm that cross-attention writes, of an encoder-decoder; empty for others.
        by_construction: whether all keys belong to the target.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.names: list[str] = list(content["modalities"])
        self.target: str | None = content["target"]
        self.sites: list[str] = list(content["sites"])
        self.left_out: int = content["sinks_left_out"]
        self.effects: list[dict[str, Any]] = list(content["effects"])
        self.tokens: list[dict[str, Any]] = list(content["tokens"])
        self.written = [math.nan if value is None else float(value) for value in content.get("written") or ()]
        self.by_construction = bool(content.get("by_construction"))
        views = content["views"]
        self.share, self.without, self.even = (
            {name: np.array(view[part], dtype=float) for name, view in views.items()}
            for part in ("share", "without_sinks", "even")
        )

    def by_layer(self, view: str) -> Float[np.ndarray, "layer modality"]:
        return _mean(self.share[view], 1)

    def curves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(layer,) shares of the target in the answer: with sinks, without sinks, and uniform."""
        m = self.names.index(self.target or "")
        return (
            self.by_layer("answer")[:, m], _mean(self.without["answer"], 1)[:, m], self.even["answer"][:, m],
        )  # fmt: skip

    def part(self, view: str, *, without: bool = False) -> float:
        """Attention share of the target, mean over layers and heads."""
        values = (self.without if without else self.share)[view][..., self.names.index(self.target or "")]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def times(self, view: str) -> float:
        """Attention share of the target relative to its uniform share (attention efficiency index)."""
        even = float(self.even[view][:, self.names.index(self.target or "")].mean())
        return self.part(view) / even if even else math.nan


def headline(shares: MeanShares) -> str:
    if shares.target is None:
        return "This model has text tokens only"
    if shares.by_construction:
        return effect_text(shares).rstrip(".") or f"Cross-attention to the {shares.target}"
    return f"{percent(shares.part('answer'))} of the answer’s attention goes to the {shares.target}"


def verdict(shares: MeanShares) -> list[str]:
    """The main finding, and further findings."""
    target = shares.target
    if target is None:
        return [
            "The input contains text only, so all attention goes to text. The map below shows the attention between "
            "tokens."
        ]
    number = sum(token["modality"] == target for token in shares.tokens)
    if shares.by_construction:
        return [
            f"The decoder reads the {target} by cross-attention, all keys of which are {target}: its share of "
            f"attention is 100 % by construction and says nothing about use. {effect_text(shares)}",
            *written_text(shares),
        ]
    lead = (
        f"In the answer, {percent(shares.part('answer'))} of attention goes to the {target}, "
        f"{times(shares.times('answer'))} its uniform share ({number} of {len(shares.tokens)} tokens)."
    )
    effect = effect_text(shares)
    curve = shares.curves()[0]
    high, low = int(np.nanargmax(curve)), int(np.nanargmin(curve))
    more = [
        f"In the prompt, the share is {percent(shares.part('prompt'))}, "
        f"{times(shares.times('prompt'))} the uniform share.",
    ]
    if percent(curve[high]) != percent(curve[low]):
        more.append(
            f"Attention to the {target} is highest in layer {high} ({percent(curve[high])}) and "
            f"lowest in layer {low} ({percent(curve[low])})."
        )
    return [f"{lead} {effect}".strip(), *more, *written_text(shares)]


def written_text(shares: MeanShares) -> list[str]:
    """How much the cross-attention of an encoder-decoder writes."""
    finite = [value for value in shares.written if math.isfinite(value)]
    if not finite:
        return []
    low, high = min(finite), max(finite)
    between = f", from {percent(low)} to {percent(high)} by layer" if percent(low) != percent(high) else ""
    return [
        f"While the answer is generated, {percent(sum(finite) / len(finite))} of the norm that the attention of the "
        f"decoder writes comes from cross-attention{between}; the rest comes from self-attention to text."
    ]


def effect_text(shares: MeanShares) -> str:
    """Change of the likelihood of the answer with the target hidden or, if unavailable, blank."""
    rows = {row["change"]: row["difference"] for row in shares.effects if row["difference"] is not None}
    ways = {f"{shares.target} hidden": f"Without the {shares.target}", f"blank {shares.target}":
            f"With a blank {shares.target}"}  # fmt: skip
    change, what = next(((rows[way], text) for way, text in ways.items() if way in rows), (None, ""))
    if change is None:
        return ""
    if abs(change) < STILL:
        return f"{what}, the likelihood of the answer does not change."
    direction = "decreases" if change < 0 else "increases"
    return f"{what}, the log-likelihood of the answer {direction} by {abs(change):.2f} per token."


def sinks_text(shares: MeanShares) -> str:
    total, without = shares.part("answer"), shares.part("answer", without=True)
    return (
        f"Excluding the {pluralize(shares.left_out, 'token')} with the most attention in each layer "
        f"(likely attention sinks) "
        f"changes the share of the {shares.target} from {percent(total)} to {percent(without)}. "
        "Dotted line: uniform attention over all visible tokens."
    )


def heads_text(shares: MeanShares, view: str) -> str:
    values = shares.share[view][..., shares.names.index(shares.target or "")]
    layer, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
    queries = "tokens that generate the answer" if view == "answer" else "tokens of the prompt"
    return (
        f"Queries: {queries}. The maximum is {percent(values[layer, head])} (layer {layer}, head {head}), "
        f"the median over all heads {percent(np.nanmedian(values))}."
    )


def explained(shares: MeanShares) -> str:
    """Instructions for the attention map."""
    if shares.target is None:
        return "Select a token to display its attention to all tokens."
    if shares.written:
        return (
            "Select a token, a layer and a head. The map shows the cross-attention of that token to the "
            f"{shares.target}, weighted by the norm of the values; in the answer, the query is the position that "
            "generates the token."
        )
    return (
        f"Select a token, a layer and a head. The map shows the attention of that token to the {shares.target}; in the "
        "answer, the query is the position that generates the token. The color of a token is its attention to the "
        f"{shares.target}, or the attention of the selected token to it."
    )


def tiled_text(content: Mapping[str, Any]) -> str:
    """What the maps of tiles and overview show, and which tokens they omit; empty without such maps."""
    scenes = [scene for scene in content.get("scenes") or [] if scene.get("boxes")]
    if not scenes:
        return ""
    parts = [f"{one['title']}: {one['grid']['rows']} x {one['grid']['columns']} tokens" for one in scenes]
    text = f"One map for each set of tokens, on the same scale ({'; '.join(parts)})." if len(parts) > 1 else ""
    if unplaced := len(content["unplaced"]):
        tokens = "1 token covers" if unplaced == 1 else f"{unplaced} tokens cover"
        text += f" {tokens} no single region of the image (ends of rows, or a mean of the whole image); not drawn."
    return text.strip()


class EffectRow(NamedTuple):
    change: str
    value: str
    difference: str
    factor: str


def effect_rows(content: Mapping[str, Any]) -> list[EffectRow]:
    """Log-likelihood of the answer without intervention and under each one."""
    rows = [EffectRow("none", number(content["log_likelihood"]), "", "")]
    for row in content["effects"]:
        change = row["difference"]
        defined = change is not None
        factor = f"× {math.exp(min(change, 50.0)):.2f}" if defined else "–"
        rows.append(
            EffectRow(row["change"], number(row["log_likelihood"]), format_signed(change) if defined else "–", factor)
        )
    return rows


def sink_rows(content: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """View, token, position, modality and attention of the tokens with the most attention."""
    return [
        (view, row["text"], str(row["place"]), row["modality"] or "–", percent(row["attention"]))
        for view in ("answer", "prompt") for row in content["views"][view]["sinks"]
    ]  # fmt: skip


def facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model, prompt, answer and sizes."""
    kinds = [token["modality"] or "other" for token in content["tokens"]]
    sizes = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    rows = [
        ("Model", content["model"]), *([("Prompt", content["prompt"])] if content["prompt"] else []),
        ("Answer (provided)" if content["given"] else "Answer (greedy decoding)", content["answer"]),
        ("Tokens", join_and(sizes)), ("Layers", f"{len(content['sites'])}, from {content['sites'][0]}"),
    ]  # fmt: skip
    if content["grid"]:
        rows.append(("Token positions", content["grid"]["why"]))
    if content["maps"]["left_out"]:
        rows.append(
            (
                "Not selectable",
                f"{pluralize(content['maps']['left_out'], 'token')} of the prompt, to limit the file size",
            )
        )
    return rows


def percent(value: float) -> str:
    """A fraction in percent, with one decimal if it is small.

    Example:
        >>> percent(0.1234), percent(0.034), percent(float("nan"))
        ('12 %', '3.4 %', 'none')
    """
    if value is None or math.isnan(value):
        return "none"
    return f"{100 * value:.0f} %" if value >= 0.0995 else f"{100 * value:.1f} %"


def times(value: float) -> str:
    """A multiple of the uniform share in words.

    Example:
        >>> times(1.27), times(0.42), times(1.004)
        ('1.3 times', '0.42 times', 'equal to')
    """
    if math.isnan(value):
        return "an unknown multiple of"
    if abs(value - 1) < 0.015:
        return "equal to"
    return f"{value:.1f} times" if value >= 1 else f"{value:.2f} times"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", MINUS)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the finite values; NaN without any."""
    finite = np.isfinite(values)
    return np.where(finite, values, 0).sum(axis=axis) / np.where(finite.any(axis=axis), finite.sum(axis=axis), np.nan)
