"""What a look says in words: every figure in a sentence is one of the page's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .text_format import MINUS, format_signed, join_and, pluralize

STILL = 0.005
"""A change of the log-likelihood below this is printed as none."""


class MeanShares:
    """The figures of a look as arrays.

    Attributes:
        names: of the modalities. target: the one that is looked at, or None. sites: the layers.
        share, without, even: view -> (layer, head, modality), the same, (layer, modality).
        effects: as they stand in the look.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.names: list[str] = list(content["modalities"])
        self.target: str | None = content["target"]
        self.sites: list[str] = list(content["sites"])
        self.left_out: int = content["sinks_left_out"]
        self.effects: list[dict[str, Any]] = list(content["effects"])
        self.tokens: list[dict[str, Any]] = list(content["tokens"])
        views = content["views"]
        self.share, self.without, self.even = (
            {name: np.array(view[part], dtype=float) for name, view in views.items()}
            for part in ("share", "without_sinks", "even")
        )

    def by_layer(self, view: str) -> Float[np.ndarray, "layer modality"]:
        return _mean(self.share[view], 1)

    def curves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(layer,) of the target in the answer: with and without sinks, and even."""
        m = self.names.index(self.target or "")
        return (
            self.by_layer("answer")[:, m], _mean(self.without["answer"], 1)[:, m], self.even["answer"][:, m],
        )  # fmt: skip

    def part(self, view: str, *, without: bool = False) -> float:
        """Part of the attention that goes to the target, mean over layers and heads."""
        values = (self.without if without else self.share)[view][..., self.names.index(self.target or "")]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def times(self, view: str) -> float:
        """The same as a multiple of what its number of tokens would give."""
        even = float(self.even[view][:, self.names.index(self.target or "")].mean())
        return self.part(view) / even if even else math.nan


def headline(shares: MeanShares) -> str:
    if shares.target is None:
        return "This model reads text alone"
    return f"{percent(shares.part('answer'))} of the answer’s attention goes to the {shares.target}"


def verdict(shares: MeanShares) -> list[str]:
    """The finding in one sentence, and what stands beside it."""
    target = shares.target
    if target is None:
        return ["There is nothing beside the text, so all attention goes to text. Below is which token reads which."]
    number = sum(token["modality"] == target for token in shares.tokens)
    lead = (
        f"In the answer, {percent(shares.part('answer'))} of attention goes to the {target}: "
        f"{times(shares.times('answer'))} what its number of tokens ({number} of {len(shares.tokens)}) would give."
    )
    effect = effect_text(shares)
    curve = shares.curves()[0]
    high, low = int(np.nanargmax(curve)), int(np.nanargmin(curve))
    more = [
        f"While the model reads the prompt, it is {percent(shares.part('prompt'))}, "
        f"{times(shares.times('prompt'))} the even part.",
    ]
    if percent(curve[high]) != percent(curve[low]):
        more.append(
            f"Layer {high} looks at the {target} most ({percent(curve[high])}), "
            f"layer {low} least ({percent(curve[low])})."
        )
    return [f"{lead} {effect}".strip(), *more]


def effect_text(shares: MeanShares) -> str:
    """What the answer loses without the target: hidden from every query, or else blank."""
    rows = {row["change"]: row["difference"] for row in shares.effects if row["difference"] is not None}
    ways = {f"{shares.target} hidden": f"Without the {shares.target}", f"blank {shares.target}":
            f"With a blank {shares.target} instead"}  # fmt: skip
    change, what = next(((rows[way], text) for way, text in ways.items() if way in rows), (None, ""))
    if change is None:
        return ""
    if abs(change) < STILL:
        return f"{what}, the answer is as likely as before."
    return f"{what}, the answer’s log-likelihood {'falls' if change < 0 else 'rises'} by {abs(change):.2f} a token."


def sinks_text(shares: MeanShares) -> str:
    whole, without = shares.part("answer"), shares.part("answer", without=True)
    return (
        f"Each layer without the {pluralize(shares.left_out, 'token')} that it reads most, which in all likelihood are "
        f"sinks: the {shares.target}’s part goes from {percent(whole)} to {percent(without)}. Dotted: if all tokens "
        "that a query sees got the same."
    )


def heads_text(shares: MeanShares, view: str) -> str:
    values = shares.share[view][..., shares.names.index(shares.target or "")]
    layer, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
    who = "write the answer" if view == "answer" else "read the prompt"
    return (
        f"The tokens that {who}. The deepest square is {percent(values[layer, head])}, in layer {layer}, head {head}; "
        f"half of all heads give less than {percent(np.nanmedian(values))}."
    )


def explained(shares: MeanShares) -> str:
    """How to use the map."""
    if shares.target is None:
        return "Choose a token to see which tokens it reads."
    return (
        f"Choose a token, a layer and a head. The map shows which places of the {shares.target} that token reads; in "
        "the answer, the token is the one that is being written at that moment. Words are colored by how much of "
        f"their attention goes to the {shares.target}, or by how much the chosen token reads them."
    )


class EffectRow(NamedTuple):
    change: str
    value: str
    difference: str
    factor: str


def effect_rows(content: Mapping[str, Any]) -> list[EffectRow]:
    """The answer as it is, then after every change."""
    found = [EffectRow("as it is", number(content["log_likelihood"]), "", "")]
    for row in content["effects"]:
        change = row["difference"]
        known = change is not None
        factor = f"× {math.exp(min(change, 50.0)):.2f}" if known else "–"
        found.append(
            EffectRow(row["change"], number(row["log_likelihood"]), format_signed(change) if known else "–", factor)
        )
    return found


def sink_rows(content: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """View, token, place, modality and attention of the tokens that get most."""
    return [
        (view, row["text"], str(row["place"]), row["modality"] or "–", percent(row["attention"]))
        for view in ("answer", "prompt") for row in content["views"][view]["sinks"]
    ]  # fmt: skip


def facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked, of whom, and how it was read."""
    kinds = [token["modality"] or "other" for token in content["tokens"]]
    sizes = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    rows = [
        ("Model", content["model"]), ("Prompt, as its processor got it", content["prompt"]),
        ("Answer, given" if content["given"] else "Answer, written greedily", content["answer"]),
        ("Tokens", join_and(sizes)), ("Layers", f"{len(content['sites'])}, {content['sites'][0]} and on"),
    ]  # fmt: skip
    if content["grid"]:
        rows.append(("Places of its tokens", content["grid"]["why"]))
    if content["maps"]["left_out"]:
        rows.append(("Not to be chosen", f"{pluralize(content['maps']['left_out'], 'token')} of the prompt, for room"))
    return rows


def percent(value: float) -> str:
    """A fraction in per cent, with one decimal where it is small.

    Example:
        >>> percent(0.1234), percent(0.034), percent(float("nan"))
        ('12 %', '3.4 %', 'none')
    """
    if value is None or math.isnan(value):
        return "none"
    return f"{100 * value:.0f} %" if value >= 0.0995 else f"{100 * value:.1f} %"


def times(value: float) -> str:
    """A multiple, in words where it is one.

    Example:
        >>> times(1.27), times(0.42), times(1.004)
        ('1.3 times', '0.42 times', 'just')
    """
    if math.isnan(value):
        return "an unknown multiple of"
    if abs(value - 1) < 0.015:
        return "just"
    return f"{value:.1f} times" if value >= 1 else f"{value:.2f} times"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", MINUS)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is there."""
    seen = np.isfinite(values)
    return np.where(seen, values, 0).sum(axis=axis) / np.where(seen.any(axis=axis), seen.sum(axis=axis), np.nan)
