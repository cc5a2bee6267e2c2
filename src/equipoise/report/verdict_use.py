"""Rules on use: which modalities the score needs, what is left without one, and whether one alone is better."""

from __future__ import annotations

from collections.abc import Iterator

from .evidence import ERRORS, Evidence, Judgement, Verdict
from .wording import counted, listed

SMALL = 0.02
"""Largest effect, as a fraction, that may hide in the error of a modality that is said to be ignored."""
GRACE = 0.02
"""How far below the other modalities alone a model may fall, as a fraction, when one is destroyed."""


def chance(found: Evidence) -> Iterator[Verdict]:
    """A model that has learnt nothing makes every other question idle."""
    score, constant = found.get(found.score), found.get(f"{found.score}_constant")
    if score is None or constant is None or (score > constant and found.measurable(score, constant)):
        return
    yield Verdict(
        "chance", "does no better than one answer for everybody",
        f"It does no measurably better ({found.say(score)}) than the same answer for every sample "
        f"({found.say(constant)}; {found.reach(score, constant)}). What follows says little.",
        {found.score: score, f"{found.score}_constant": constant}, "score", "bad",
    )  # fmt: skip


def use(found: Evidence) -> Iterator[Verdict]:
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
    words = {"mask": "without it", "noise": "with noise in its place"}
    shown = listed([f"{found.say(v)} {words[kind]} ({found.differ(v - full)})" for kind, v in left.items()])
    text = f"{found.say(full)} as it is, {shown}"
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
    reach = found.reach(full, min(left.values()))
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


def fallback(found: Evidence) -> Iterator[Verdict]:
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
            text = f"Whether it falls back is open: {text}; {found.reach(left, wanted)}."
            yield Verdict(f"fallback/{name}", f"may fall back from {name}", text, figures, "noise")


def golden(found: Evidence) -> Iterator[Verdict]:
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
        text = f"No measurable difference to the best single modality: {text}; {found.reach(full, alone[best])}."
        yield Verdict("golden", "is no better than its best single modality", text, figures, "score")
    elif full < alone[best]:
        text = f"Worse than its best single modality: {text}."
        yield Verdict("golden", "is worse than its best single modality", text, figures, "score", "bad")
    else:
        text = f"Better than its best single modality: {text}."
        yield Verdict("golden", "is better than its best single modality", text, figures, "score", "good")
