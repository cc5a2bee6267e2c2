"""Rules on use: which modalities the score needs, what is left without one, and whether one alone is better.

No rule calls it a success when a score is not significantly above that of the constant answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from .text_format import join_and, metric_label, pluralize
from .verdict_evidence import Comparison, Judgment, Verdict, VerdictEvidence

SMALL = 0.02
"""Largest effect, as a fraction, that the 95 % interval of a modality may reach that is said to be ignored."""
GRACE = 0.02
"""How far below the other modalities alone a model may fall when one is destroyed: a fraction, or for errors that part
of the constant answer's error."""

Kind = Literal["used", "idle", "ignored", "harmful", "unclear"]
CLAIMS: dict[Kind, str] = {
    "used": "uses",
    "idle": "depends without benefit on",
    "ignored": "ignores",
    "harmful": "is better without",
    "unclear": "shows no significant effect of",
}


class _Use(NamedTuple):
    kind: Kind
    verdict: Verdict


def chance(found: VerdictEvidence) -> Iterator[Verdict]:
    """A model that has learned nothing makes every other question idle."""
    compared = found.compare(found.score, found.constant)
    if compared is None or compared.better:
        return
    yield Verdict(
        "chance", "is no better than a constant answer",
        f"No better than the same answer for every sample: {found.say(compared.value)} against "
        f"{found.say(compared.base)} ({found.proof(compared)}). The other verdicts say little.",
        {found.score: compared.value, found.constant: compared.base}, "score", "bad",
    )  # fmt: skip


def modality_use(found: VerdictEvidence) -> Iterator[Verdict]:
    single = [_one(found, name) for name in found.names] if len(found.names) > 1 else []
    known = [one for one in single if one is not None]
    if not known:
        return
    if len(known) == len(found.names):
        yield _together(found, known)
    for one in known:
        yield one.verdict


def _one(found: VerdictEvidence, name: str) -> _Use | None:
    """Does the score need this modality?"""
    compared = {
        kind: one
        for kind in ("mask", "noise")
        if (one := found.compare(found.named(kind, name), found.score)) is not None
    }
    if not compared:
        return None
    full = next(iter(compared.values())).base
    figures = {found.score: full} | {found.named(kind, name): one.value for kind, one in compared.items()}
    words = {"mask": "without it", "noise": "with noise in its place"}
    shown = join_and([f"{found.say(one.value)} {words[kind]} ({found.proof(one)})" for kind, one in compared.items()])
    text = f"{found.say(full)} as it is, {shown}"
    worst = min(compared, key=lambda kind: (not compared[kind].worse, compared[kind].difference))
    test = {"mask": "masking", "noise": "noise"}[worst]

    def said(kind: Kind, sentence: str, ok: Judgment = "neutral", test: str = test) -> _Use:
        return _Use(kind, Verdict(f"use/{name}", f"{CLAIMS[kind]} {name}", sentence, figures, test, ok))

    if compared[worst].worse:
        if found.informed is False:
            return said(
                "idle",
                f"The score depends on {name}, but is not significantly above that of the constant answer: {text}.",
            )
        return said("used", f"Uses {name}: {text}.", "good")
    if any(one.better for one in compared.values()):
        test = next({"mask": "masking"}.get(kind, kind) for kind, one in compared.items() if one.better)
        return said("harmful", f"Is better without {name}: {text}.", "bad", test)
    if found.get(f"changed_noise/{name}") == 0:
        figures[f"changed_noise/{name}"] = 0.0
        text = f"Ignores {name}: none of {pluralize(found.samples, 'answer')} changes when it is replaced by noise."
        return said("ignored", text, "bad", "noise")
    if found.fraction and all(one.within(SMALL) for one in compared.values()):
        return said("ignored", f"Ignores {name}, as far as the score goes: {text}.", "bad")
    return said("unclear", f"No significant effect of {name}: {text}.")


def _together(found: VerdictEvidence, single: list[_Use]) -> Verdict:
    """All modalities in one sentence."""
    names = found.names
    groups: dict[Kind, list[str]] = {
        kind: [name for name, one in zip(names, single, strict=True) if one.kind == kind] for kind in CLAIMS
    }
    every = "both modalities" if len(names) == 2 else f"all {len(names)} modalities"
    if len(groups["used"]) == len(names):
        return _lean(found) or Verdict(
            "use", f"uses {every}", f"Uses {every}: the score is significantly worse without any one of them.",
            _drops(found), single[0].verdict.test, "good",
        )  # fmt: skip
    claim = join_and([f"{CLAIMS[kind]} {join_and(group)}" for kind, group in groups.items() if group])
    ok: Judgment = "bad" if groups["ignored"] or groups["harmful"] else "neutral"
    why = next(one.verdict for one in single if one.kind != "used")
    return Verdict("use", claim, f"It {claim}.", _drops(found), why.test, ok)


def _drops(found: VerdictEvidence) -> dict[str, float]:
    kept = {found.named(kind, name): found.of(kind, name) for kind in ("mask", "noise") for name in found.names}
    kept[found.score] = found.get(found.score)
    return {metric: value for metric, value in kept.items() if value is not None}


def _lean(found: VerdictEvidence) -> Verdict | None:
    """One modality that contributes most of the score, where that is significant."""
    worth = {name: value for name in found.names if (value := found.get(f"shapley/{name}")) is not None}
    total = sum(max(value, 0.0) for value in worth.values())
    if len(worth) < len(found.names) or total <= 0:
        return None
    first, second = sorted(worth, key=lambda name: -worth[name])[:2]
    part, compared = worth[first] / total, found.compare(found.named("mask", first), found.named("mask", second))
    if part < dominant_modality(len(worth)) or compared is None or not compared.worse:
        return None
    figures = {f"shapley/{name}": value for name, value in worth.items()}
    text = (
        f"Leans on {first}: it contributes {100 * part:.0f} % of what the modalities add to the score (Shapley "
        f"values), though every one of them is used."
    )
    return Verdict("use", f"leans on {first}", text, figures, "shapley")


def dominant_modality(modalities: int) -> float:
    """Part of the Shapley values from which a model leans on one modality: half of the way from equal to all.

    Example:
        >>> leans_from(2), round(leans_from(3), 3)
        (0.75, 0.667)
    """
    return 0.5 + 0.5 / modalities


def robustness_fallback(found: VerdictEvidence) -> Iterator[Verdict]:
    """When one modality is destroyed, is the model as good as the others are, and better than a constant answer?"""
    for name in found.names if len(found.names) > 1 else ():
        noise = found.named("noise", name)
        best = _best_alone(found, noise, [rest for rest in found.names if rest != name])
        wanted = found.named("alone", best) if best else found.named("mask", name)
        compared = found.compare(noise, wanted)
        if compared is None:
            continue
        figures = {noise: compared.value, wanted: compared.base}
        alone = f"{best} alone reaches" if best else f"without {name} it reaches"
        text = (
            f"with {name} replaced by noise the {metric_label(found.score)} is {found.say(compared.value)}, {alone} "
            f"{found.say(compared.base)} ({found.proof(compared)})"
        )
        left, other = found.compare(noise, found.constant), found.compare(wanted, found.constant)
        if left is not None and not left.better:
            figures[found.constant] = left.base
            text += f", the constant answer {found.say(left.base)}"
            if other is not None and not other.better:
                claim, sentence, ok = "has nothing to fall back on without", "Nothing to fall back on", "neutral"
            elif compared.worse:
                claim, sentence, ok = "does not fall back from", "Does not fall back", "bad"
            else:
                claim, sentence, ok = "may fall back from", "Whether it falls back is open", "neutral"
        elif compared.difference >= -_grace(found):
            claim, sentence, ok = "falls back gracefully from", "Falls back gracefully", "good"
        elif compared.worse:
            claim, sentence, ok = "does not fall back from", "Does not fall back", "bad"
        else:
            claim, sentence, ok = "may fall back from", "Whether it falls back is open", "neutral"
        yield Verdict(f"fallback/{name}", f"{claim} {name}", f"{sentence}: {text}.", figures, "noise", ok)  # type: ignore[arg-type]


def _grace(found: VerdictEvidence) -> float:
    return GRACE if found.fraction else GRACE * abs(found.get(found.constant) or 0.0)


def _best_alone(found: VerdictEvidence, metric: str, names: list[str]) -> str:
    """The modality whose score alone exceeds ``metric`` most, each on the samples that have it; "" for none known."""
    gaps: dict[str, Comparison] = {
        name: one for name in names if (one := found.compare(found.named("alone", name), metric)) is not None
    }
    return max(gaps, key=lambda name: gaps[name].difference) if gaps else ""


def vs_best_unimodal(found: VerdictEvidence) -> Iterator[Verdict]:
    """A multimodal model must never be worse than its best single modality."""
    best = _best_alone(found, found.score, list(found.names)) if len(found.names) > 1 else ""
    alone = found.named("alone", best)
    compared = found.compare(found.score, alone) if best else None
    if compared is None:
        return
    models = (found.details.get("score") or {}).get("alone_from") == "models"
    source = "a model of it alone" if models else "its own head, a floor of what a model of it alone reaches"
    text = f"{found.say(compared.value)} against {found.say(compared.base)} of {best} alone"
    text += f" ({source}; {found.proof(compared)})"
    ok: Judgment = "neutral"
    if compared.worse:
        claim, ok = "worse than its best single modality", "bad"
    elif not compared.better:
        claim, text = (
            "no better than its best single modality",
            f"No significant difference to its best single modality: {text}",
        )
    elif found.informed is False:
        claim, text = (
            "better than its best single modality, but not than a constant answer",
            (f"Better than its best single modality, but not significantly better than the constant answer: {text}"),
        )
    else:
        claim, ok = "better than its best single modality", "good"
    if ok != "neutral":
        text = f"{claim[0].upper()}{claim[1:]}: {text}"
    yield Verdict("golden", f"is {claim}", f"{text}.", {found.score: compared.value, alone: compared.base}, "score", ok)
