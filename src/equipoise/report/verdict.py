"""From the figures of a diagnosis to plain sentences: which modalities a model uses, and whether it looks at quality."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..record import number
from .wording import FRACTIONS, SCORES, amount, change, counted, listed, probability, signed

Judgement = Literal["good", "bad", "neutral"]

ERRORS = 2.0
"""Standard errors below which a difference of scores is called "no measurable effect"."""
SMALL = 0.02
"""Largest effect, as a fraction, that may hide in the error of a modality that is said to be ignored."""
GRACE = 0.02
"""How far below the other modalities alone a model may fall, as a fraction, when one is destroyed."""
FOLLOWS, BLIND = 0.3, 0.1
"""Attention-noise correlation from which attention follows quality, and below which it is blind to it."""
SURE = 0.05
"""p-value above which a correlation is not told from 0; the convention of the other report too."""
STILL = 0.01
"""Standard deviation of every share over samples below which attention divides all samples alike."""
FLAT = 0.05
"""Relative residual below which the tokens of a layer are as good as one."""
KNOWS, GUESSES = 0.8, 0.6
"""AUROC from which unknown inputs are told well, and below which hardly at all."""


@dataclass(frozen=True)
class Verdict:
    """One sentence, and what it stands on.

    Attributes:
        key: the rule, and the modality it speaks of, as in "use/audio".
        claim: the sentence in a few words, for a headline.
        text: the whole sentence, with its figures.
        figures: metric name -> value.
        test: name of the test that shows it.
        ok: "good", "bad", or "neutral" where it is a matter of taste or cannot be told.
    """

    key: str
    claim: str
    text: str
    figures: dict[str, float] = field(default_factory=dict)
    test: str = "score"
    ok: Judgement = "neutral"


class Evidence:
    """Read access to the figures of one diagnosis, and how sure its scores are.

    Args:
        content: what ``Diagnosis.to_dict`` gives: names, task, samples, metrics and details.

    The standard error of a score is binomial, sqrt(p (1 - p) / n), or for a regression the standard deviation of the
    samples' errors over sqrt(n). That of a difference adds the two squares, although both scores are of the same
    samples, so it is rather too large than too small: what is called measurable is.

    Example:
        >>> found = Evidence({"names": ["a"], "task": "classification", "samples": 100, "metrics": {"accuracy": 0.5}})
        >>> round(found.error(0.5, 0.5), 4), found.measurable(0.5, 0.6), found.measurable(0.5, 0.7)
        (0.0707, False, True)
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.names = tuple(content["names"])
        self.samples = int(content["samples"])
        self.metrics: Mapping[str, Any] = content["metrics"]
        self.details: Mapping[str, Any] = content.get("details") or {}
        self.score = next((name for name in SCORES if name in self.metrics), "accuracy")
        self.fraction = self.score.startswith(FRACTIONS)
        self._deviation = number((self.details.get("score") or {}).get("deviation"))

    def get(self, metric: str) -> float | None:
        """The figure, or None where it is missing or no number."""
        return number(self.metrics.get(metric))

    def of(self, kind: str, name: str) -> float | None:
        """The score under a condition: ``of("noise", "audio")``."""
        return self.get(f"{self.score}_{kind}/{name}")

    def error(self, *scores: float) -> float:
        """Standard error of the difference of two scores, or of one score; NaN where nothing tells."""
        if self.fraction:
            squares = [max(p * (1 - p), 0.0) / max(self.samples, 1) for p in scores]
        elif self._deviation is None:
            return math.nan
        else:
            squares = [self._deviation**2 / max(self.samples, 1)] * len(scores)
        return math.sqrt(sum(squares))

    def measurable(self, a: float, b: float) -> bool:
        """Whether two scores differ by more than ``ERRORS`` standard errors."""
        error = self.error(a, b)
        return not math.isnan(error) and abs(a - b) > ERRORS * error

    def say(self, value: float) -> str:
        return amount(self.score, value)

    def differ(self, value: float) -> str:
        return change(self.score, value)

    def least(self, *scores: float) -> str:
        """How small an effect these samples could show."""
        reach = ERRORS * self.error(*scores)
        size = f"{100 * reach:.1f} points" if self.fraction else f"{reach:.2g}"
        return f"{counted(self.samples, 'sample')} show effects from {size} on"


def verdicts(content: Mapping[str, Any]) -> list[Verdict]:
    """What the figures of a diagnosis say, most important first; what was not measured is not spoken of.

    Example:
        >>> metrics = {"accuracy": 0.9, "accuracy_mask/a": 0.5, "accuracy_mask/b": 0.6}
        >>> found = {"names": ["a", "b"], "task": "classification", "samples": 1000, "metrics": metrics}
        >>> [(verdict.key, verdict.claim, verdict.ok) for verdict in verdicts(found)][0]
        ('use', 'uses both modalities', 'good')
    """
    found = Evidence(content)
    rules = (_chance, _use, _quality, _fallback, _golden, _still, _quag, _outside, _collapse)
    return [verdict for rule in rules for verdict in rule(found)]


def headline(name: str, said: list[Verdict]) -> str:
    """The title of a page: the name, and the claims on use and on quality.

    Example:
        >>> headline("joint", [Verdict("use", "uses both modalities", ""), Verdict("quality", "is blind to quality", "")])
        'joint uses both modalities and is blind to quality'
    """
    by_key = {verdict.key: verdict.claim for verdict in said}
    if "chance" in by_key:
        return f"{name} {by_key['chance']}"
    claims = [by_key[key] for key in ("use", "quality") if key in by_key]
    return f"{name} {listed(claims)}" if claims else f"{name}, examined"


def _chance(found: Evidence) -> Iterator[Verdict]:
    """A model that has learnt nothing makes every other question idle."""
    score, constant = found.get(found.score), found.get(f"{found.score}_constant")
    if score is None or constant is None or (score > constant and found.measurable(score, constant)):
        return
    yield Verdict(
        "chance", "does no better than one answer for everybody",
        f"It does no measurably better ({found.say(score)}) than the same answer for every sample "
        f"({found.say(constant)}); {found.least(score, constant)}. What follows says little.",
        {found.score: score, f"{found.score}_constant": constant}, "score", "bad",
    )  # fmt: skip


def _use(found: Evidence) -> Iterator[Verdict]:
    single = [_one(found, name) for name in found.names] if len(found.names) > 1 else []
    known = [verdict for verdict in single if verdict is not None]
    if not known:
        return
    if len(known) == len(found.names):
        yield _together(found, known)
    yield from known


def _one(found: Evidence, name: str) -> Verdict | None:
    """Does the score need this modality?"""
    full, key = found.get(found.score), f"use/{name}"
    left = {kind: value for kind in ("mask", "noise") if (value := found.of(kind, name)) is not None}
    if full is None or not left:
        return None
    figures = {found.score: full} | {f"{found.score}_{kind}/{name}": value for kind, value in left.items()}
    words = {"mask": "taken away", "noise": "replaced by noise"}
    shown = listed([f"{words[kind]} {found.say(v)} ({found.differ(v - full)})" for kind, v in left.items()])
    text = f"{found.say(full)} with it, {shown}"
    test = "masking" if "mask" in left else "noise"
    sure = {kind: value - full for kind, value in left.items() if found.measurable(full, value)}
    if any(effect < 0 for effect in sure.values()):
        test = min(sure, key=lambda kind: sure[kind]).replace("mask", "masking")
        return Verdict(key, f"uses {name}", f"Uses {name}: {text}.", figures, test, "good")
    if sure:
        return Verdict(key, f"is better without {name}", f"Is better without {name}: {text}.", figures, test, "bad")
    changed = found.get(f"changed_noise/{name}")
    if changed == 0:
        figures[f"changed_noise/{name}"] = 0.0
        text = f"Ignores {name}: of {counted(found.samples, 'answer')} none changes when it is replaced by noise."
        return Verdict(key, f"ignores {name}", text, figures, "noise", "bad")
    reach = found.least(full, min(left.values()))
    if found.fraction and ERRORS * found.error(full, min(left.values())) <= SMALL:
        text = f"Ignores {name}, as far as the score goes: {text}; {reach}."
        return Verdict(key, f"ignores {name}", text, figures, test, "bad")
    text = f"No measurable effect of {name}: {text}; {reach}."
    return Verdict(key, f"shows no measurable effect of {name}", text, figures, test)


def _together(found: Evidence, single: list[Verdict]) -> Verdict:
    """All modalities in one sentence."""
    names = found.names
    used, ignored, harmful, unclear = (
        [name for name, verdict in zip(names, single, strict=True) if verdict.claim.startswith(start)]
        for start in ("uses", "ignores", "is better", "shows")
    )
    every = "both modalities" if len(names) == 2 else f"all {len(names)} modalities"
    if len(used) == len(names):
        return _lean(found) or Verdict(
            "use", f"uses {every}", f"Uses {every}: the score falls measurably without any of them.",
            _drops(found), single[0].test, "good",
        )  # fmt: skip
    parts = [f"uses {listed(used)}"] if used else []
    parts += [f"ignores {listed(ignored)}"] if ignored else []
    parts += [f"is better without {listed(harmful)}"] if harmful else []
    parts += [f"shows no measurable effect of {listed(unclear)}"] if unclear else []
    claim = listed(parts)
    ok: Judgement = "bad" if ignored or harmful else "neutral"
    why = next(v for v in single if not v.claim.startswith("uses"))
    return Verdict("use", claim, f"It {claim}.", _drops(found), why.test, ok)


def _drops(found: Evidence) -> dict[str, float]:
    kept = {f"{found.score}_{kind}/{name}": found.of(kind, name) for kind in ("mask", "noise") for name in found.names}
    kept[found.score] = found.get(found.score)
    return {metric: value for metric, value in kept.items() if value is not None}


def _lean(found: Evidence) -> Verdict | None:
    """One modality that most of the score is owed to, where that is more than luck."""
    worth = {name: value for name in found.names if (value := found.get(f"shapley/{name}")) is not None}
    total = sum(max(value, 0.0) for value in worth.values())
    if len(worth) < len(found.names) or total <= 0:
        return None
    first, second = sorted(worth, key=lambda name: -worth[name])[:2]
    part, left = worth[first] / total, [found.of("mask", name) for name in (first, second)]
    if part < leans_from(len(worth)) or None in left or not found.measurable(left[0], left[1]):  # type: ignore[arg-type]
        return None
    figures = {f"shapley/{name}": value for name, value in worth.items()}
    text = (
        f"Leans on {first}: it is owed {100 * part:.0f} % of what the modalities add to the score (Shapley), though "
        f"every one of them is used."
    )
    return Verdict("use", f"leans on {first}", text, figures, "shapley")


def leans_from(modalities: int) -> float:
    """Part of the Shapley values from which a model leans on one modality: half of the way from equal to all.

    Example:
        >>> leans_from(2), round(leans_from(3), 3)
        (0.75, 0.667)
    """
    return 0.5 + 0.5 / modalities


def _quality(found: Evidence) -> Iterator[Verdict]:
    """Does attention leave what is destroyed?"""
    if "noise_attention_r" not in found.metrics:
        return
    r, p = found.get("noise_attention_r"), found.get("noise_attention_p")
    name = (found.details.get("response") or {}).get("modality") or "the modality"
    if r is None:
        text = f"Attention is blind to quality: what goes to {name} never changes, destroyed or not."
        yield Verdict("quality", "is blind to quality", text, {}, "response", "bad")
        return
    figures = {"noise_attention_r": r} | ({} if p is None else {"noise_attention_p": p})
    shown = f"r = {signed(r)}" + ("" if p is None else f", {probability(p)}")
    if p is not None and p >= SURE:
        text = f"No measurable answer of attention to noise in {name} ({shown})."
        yield Verdict("quality", "shows no measurable answer of attention to noise", text, figures, "response")
    elif r >= FOLLOWS:
        text = f"Attention follows quality: it leaves {name} when that is replaced by noise ({shown})."
        yield Verdict("quality", "follows quality", text, figures, "response", "good")
    elif r >= BLIND:
        text = f"Attention hardly follows quality: it leaves {name} a little when that is replaced by noise ({shown})."
        yield Verdict("quality", "hardly follows quality", text, figures, "response")
    elif r > -BLIND:
        text = f"Attention is blind to quality: it does not leave {name} when that is replaced by noise ({shown})."
        yield Verdict("quality", "is blind to quality", text, figures, "response", "bad")
    else:
        text = f"Attention is blind to quality: it moves towards {name} when that is replaced by noise ({shown})."
        yield Verdict("quality", "is drawn to noise", text, figures, "response", "bad")


def _fallback(found: Evidence) -> Iterator[Verdict]:
    """When one modality is destroyed, is the model as good as the others are?"""
    for name in found.names if len(found.names) > 1 else ():
        left = found.of("noise", name)
        others = {rest: found.of("alone", rest) for rest in found.names if rest != name}
        known = {rest: value for rest, value in others.items() if value is not None}
        best, metric, wanted = "", f"{found.score}_mask/{name}", found.of("mask", name)
        if known:
            best = max(known, key=lambda rest: known[rest])
            metric, wanted = f"{found.score}_alone/{best}", known[best]
        if left is None or wanted is None:
            continue
        alone = f"what {best} alone reaches" if best else f"what it reaches without {name}"
        figures = {f"{found.score}_noise/{name}": left, metric: wanted}
        below, sure = wanted - left, found.measurable(left, wanted)
        text = f"with {name} destroyed it keeps {found.say(left)}; {alone} is {found.say(wanted)}"
        if below <= (GRACE if found.fraction else 0.0) or (not found.fraction and not sure):
            yield Verdict(f"fallback/{name}", f"falls back gracefully from {name}",
                          f"Falls back gracefully: {text}.", figures, "noise", "good")  # fmt: skip
        elif sure:
            yield Verdict(f"fallback/{name}", f"does not fall back from {name}",
                          f"Does not fall back: {text} ({found.differ(-below)}).", figures, "noise", "bad")  # fmt: skip
        else:
            text = f"Whether it falls back is open: {text}; {found.least(left, wanted)}."
            yield Verdict(f"fallback/{name}", f"may fall back from {name}", text, figures, "noise")


def _golden(found: Evidence) -> Iterator[Verdict]:
    """A multimodal model must never be worse than its best single modality."""
    full = found.get(found.score)
    alone = {name: value for name in found.names if (value := found.of("alone", name)) is not None}
    if full is None or not alone or len(found.names) < 2:
        return
    best = max(alone, key=lambda name: alone[name])
    figures = {found.score: full, f"{found.score}_alone/{best}": alone[best]}
    models = (found.details.get("score") or {}).get("alone_from") == "models"
    source = "a model of it alone" if models else "its own head, a floor of what a model of it alone reaches"
    text = f"{found.say(full)} against {found.say(alone[best])} of {best} alone ({source})"
    if not found.measurable(full, alone[best]):
        text = f"No measurable difference to the best single modality: {text}; {found.least(full, alone[best])}."
        yield Verdict("golden", "is no better than its best single modality", text, figures, "score")
    elif full < alone[best]:
        text = f"Worse than its best single modality: {text}."
        yield Verdict("golden", "is worse than its best single modality", text, figures, "score", "bad")
    else:
        text = f"Better than its best single modality: {text}."
        yield Verdict("golden", "is better than its best single modality", text, figures, "score", "good")


def _still(found: Evidence) -> Iterator[Verdict]:
    spread = {f"share_spread/{name}": found.get(f"share_spread/{name}") for name in found.names}
    known = {metric: value for metric, value in spread.items() if value is not None}
    if len(found.names) > 1 and known and max(known.values()) < STILL:
        text = (
            f"Attention divides all samples alike: no share moves by more than {100 * max(known.values()):.2f} points "
            "(standard deviation) from sample to sample. It is dynamic in name only."
        )
        yield Verdict("still", "divides all samples alike", text, known, "attention", "bad")


def _quag(found: Evidence) -> Iterator[Verdict]:
    """Do tokens of one modality read the other?"""
    full, crossed = found.get(found.score), found.get("quag/crossmodal")
    if full is None or crossed is None:
        return
    figures = {found.score: full, "quag/crossmodal": crossed}
    text = f"{found.say(full)} as it is, {found.say(crossed)} with attention across modalities averaged"
    if found.measurable(full, crossed) and crossed < full:
        text = f"Needs which token of one modality reads which of another: {text}."
        yield Verdict("quag", "needs attention across modalities", text, figures, "quag", "good")
    else:
        text = f"No measurable need of attention between tokens of different modalities: {text}; "
        yield Verdict("quag", "shows no measurable need of attention across modalities",
                      f"{text}{found.least(full, crossed)}.", figures, "quag")  # fmt: skip


def _outside(found: Evidence) -> Iterator[Verdict]:
    auroc = found.get("auroc")
    if auroc is None:
        return
    outside = int((found.details.get("ood") or {}).get("outside") or 1)
    # Of the rank statistic where both kinds are alike: how far from 1/2 chance takes it.
    error = math.sqrt((found.samples + outside + 1) / (12 * max(found.samples, 1) * max(outside, 1)))
    figures, shown = {"auroc": auroc}, f"AUROC {auroc:.2f}, {found.samples} known and {outside} unknown samples"
    if abs(auroc - 0.5) <= ERRORS * error:
        text = f"Its confidence does not tell these unknown inputs from known ones measurably ({shown})."
        yield Verdict("outside", "does not notice unknown inputs", text, figures, "ood", "bad")
    elif auroc < 0.5:
        text = f"It is more sure of these unknown inputs than of known ones ({shown})."
        yield Verdict("outside", "is surer of unknown inputs", text, figures, "ood", "bad")
    else:
        well = "well" if auroc >= KNOWS else "hardly" if auroc < GUESSES else "in part"
        ok: Judgement = "good" if auroc >= KNOWS else "bad" if auroc < GUESSES else "neutral"
        text = f"Its confidence tells these unknown inputs {well} ({shown})."
        yield Verdict("outside", f"tells unknown inputs {well}", text, figures, "ood", ok)


def _collapse(found: Evidence) -> Iterator[Verdict]:
    last = found.get("residual_last")
    if last is not None and last < FLAT:
        text = f"Its tokens become one with depth: only {100 * last:.1f} % of their size is not common to all."
        yield Verdict("collapse", "makes its tokens one", text, {"residual_last": last}, "collapse", "bad")
