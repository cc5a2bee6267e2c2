"""Rules on modality use, robustness to noise in a modality, and the comparison with unimodal baselines.

No finding is positive if the score is not significantly above that of the constant prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from .text_format import join_and, metric_label, pluralize
from .verdict_evidence import Comparison, Judgment, Verdict, VerdictEvidence

SMALL = 0.02
"""A modality is called ignored if the 95 % interval of its effect is within this size, as a fraction."""
GRACE = 0.02
"""Tolerance of the robustness rule: how far the score under noise may be below that of the other modalities alone, as a
fraction, or relative to the error of the constant prediction."""

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


def chance(evidence: VerdictEvidence) -> Iterator[Verdict]:
    """Whether the model is at chance level, where the other tests are not meaningful."""
    compared = evidence.compare(evidence.score, evidence.constant)
    if compared is None or compared.better:
        return
    yield Verdict(
        "chance", "is no better than a constant prediction",
        f"Not significantly better than a constant prediction: {evidence.say(compared.value)} compared with "
        f"{evidence.say(compared.base)} ({evidence.proof(compared)}). The other findings are of limited value.",
        {evidence.score: compared.value, evidence.constant: compared.base}, "score", "bad",
    )  # fmt: skip


def modality_use(evidence: VerdictEvidence) -> Iterator[Verdict]:
    single = [_one(evidence, name) for name in evidence.names] if len(evidence.names) > 1 else []
    defined = [one for one in single if one is not None]
    if not defined:
        return
    if len(defined) == len(evidence.names):
        yield _together(evidence, defined)
    for one in defined:
        yield one.verdict


def _one(evidence: VerdictEvidence, name: str) -> _Use | None:
    """Effect on the score of masking a modality or replacing it by noise."""
    compared = {
        kind: one
        for kind in ("mask", "noise")
        if (one := evidence.compare(evidence.named(kind, name), evidence.score)) is not None
    }
    if not compared:
        return None
    full = next(iter(compared.values())).base
    figures = {evidence.score: full} | {evidence.named(kind, name): one.value for kind, one in compared.items()}
    words = {"mask": "without it", "noise": "with it replaced by noise"}
    shown = join_and(
        [f"{evidence.say(one.value)} {words[kind]} ({evidence.proof(one)})" for kind, one in compared.items()]
    )
    text = f"{evidence.say(full)} unmodified, {shown}"
    worst = min(compared, key=lambda kind: (not compared[kind].worse, compared[kind].gain))
    test = {"mask": "masking", "noise": "noise"}[worst]

    def finding(kind: Kind, sentence: str, ok: Judgment = "neutral", test: str = test) -> _Use:
        return _Use(kind, Verdict(f"use/{name}", f"{CLAIMS[kind]} {name}", sentence, figures, test, ok))

    if compared[worst].worse:
        if evidence.informed is False:
            return finding(
                "idle",
                f"The score depends on {name}, but is not significantly above that of the constant prediction: {text}.",
            )
        return finding("used", f"Uses {name}: {text}.", "good")
    if any(one.better for one in compared.values()):
        test = next({"mask": "masking"}.get(kind, kind) for kind, one in compared.items() if one.better)
        return finding("harmful", f"The score is higher without {name}: {text}.", "bad", test)
    if evidence.get(f"changed_noise/{name}") == 0:
        figures[f"changed_noise/{name}"] = 0.0
        text = (
            f"Ignores {name}: none of {pluralize(evidence.samples, 'prediction')} changes when it is replaced by noise."
        )
        return finding("ignored", text, "bad", "noise")
    if evidence.fraction and all(one.within(SMALL) for one in compared.values()):
        return finding("ignored", f"Ignores {name}, as measured by the score: {text}.", "bad")
    return finding("unclear", f"No significant effect of {name}: {text}.")


def _together(evidence: VerdictEvidence, single: list[_Use]) -> Verdict:
    """One finding on all modalities."""
    names = evidence.names
    groups: dict[Kind, list[str]] = {
        kind: [name for name, one in zip(names, single, strict=True) if one.kind == kind] for kind in CLAIMS
    }
    all_names = "both modalities" if len(names) == 2 else f"all {len(names)} modalities"
    if len(groups["used"]) == len(names):
        return _dominance(evidence) or Verdict(
            "use", f"uses {all_names}", f"Uses {all_names}: the score is significantly worse without any one of them.",
            _drops(evidence), single[0].verdict.test, "good",
        )  # fmt: skip
    claim = join_and([f"{CLAIMS[kind]} {join_and(group)}" for kind, group in groups.items() if group])
    ok: Judgment = "bad" if groups["ignored"] or groups["harmful"] else "neutral"
    why = next(one.verdict for one in single if one.kind != "used")
    return Verdict("use", claim, f"The model {claim}.", _drops(evidence), why.test, ok)


def _drops(evidence: VerdictEvidence) -> dict[str, float]:
    scores = {
        evidence.named(kind, name): evidence.of(kind, name) for kind in ("mask", "noise") for name in evidence.names
    }
    scores[evidence.score] = evidence.get(evidence.score)
    return {metric: value for metric, value in scores.items() if value is not None}


def _dominance(evidence: VerdictEvidence) -> Verdict | None:
    """A finding on a modality that contributes most of the score, if this is significant."""
    sign = -1.0 if evidence.lower else 1.0
    worth = {name: sign * value for name in evidence.names if (value := evidence.get(f"shapley/{name}")) is not None}
    total = sum(max(value, 0.0) for value in worth.values())
    if len(worth) < len(evidence.names) or total <= 0:
        return None
    first, second = sorted(worth, key=lambda name: -worth[name])[:2]
    part, compared = (
        worth[first] / total,
        evidence.compare(evidence.named("mask", first), evidence.named("mask", second)),
    )
    if part < dominant_modality(len(worth)) or compared is None or not compared.worse:
        return None
    figures = {f"shapley/{name}": sign * value for name, value in worth.items()}
    text = (
        f"Relies mostly on {first}: it accounts for {100 * part:.0f} % of the contribution of all modalities to the "
        f"score (Shapley values), although every modality is used."
    )
    return Verdict("use", f"relies mostly on {first}", text, figures, "shapley")


def dominant_modality(modalities: int) -> float:
    """Fraction of the Shapley values from which one modality is called dominant: halfway between 1 / N and 1.

    Example:
        >>> dominant_modality(2), round(dominant_modality(3), 3)
        (0.75, 0.667)
    """
    return 0.5 + 0.5 / modalities


def robustness_fallback(evidence: VerdictEvidence) -> Iterator[Verdict]:
    """Whether the model keeps the score of the other modalities when one is replaced by noise."""
    for name in evidence.names if len(evidence.names) > 1 else ():
        noise = evidence.named("noise", name)
        best = _best_alone(evidence, noise, [rest for rest in evidence.names if rest != name])
        expected = evidence.named("alone", best) if best else evidence.named("mask", name)
        compared = evidence.compare(noise, expected)
        if compared is None:
            continue
        figures = {noise: compared.value, expected: compared.base}
        alone = f"{best} alone reaches" if best else f"masking {name} gives"
        text = (
            f"with {name} replaced by noise the {metric_label(evidence.score)} is {evidence.say(compared.value)}, "
            f"{alone} {evidence.say(compared.base)} ({evidence.proof(compared)})"
        )
        left, other = evidence.compare(noise, evidence.constant), evidence.compare(expected, evidence.constant)
        at_constant = False
        if left is not None and not left.better:
            at_constant = True
            figures[evidence.constant] = left.base
            text += f", the constant prediction {evidence.say(left.base)}"
        if at_constant and other is not None and not other.better:
            claim, sentence, ok = "has no informative alternative to", "No informative alternative", "neutral"
        elif not at_constant and compared.gain >= -_grace(evidence):
            claim, sentence, ok = "is robust to noise in", "Robust to noise", "good"
        elif compared.worse:
            claim, sentence, ok = "is not robust to noise in", "Not robust to noise", "bad"
        else:
            sentence, ok = "Robustness to noise is undetermined", "neutral"
            claim = "has undetermined robustness to noise in"
        yield Verdict(f"robustness/{name}", f"{claim} {name}", f"{sentence}: {text}.", figures, "noise", ok)  # type: ignore[arg-type]


def _grace(evidence: VerdictEvidence) -> float:
    return GRACE if evidence.fraction else GRACE * abs(evidence.get(evidence.constant) or 0.0)


def _best_alone(evidence: VerdictEvidence, metric: str, names: list[str]) -> str:
    """The modality with the best unimodal score relative to ``metric``, on the samples that have it; "" without any."""
    gaps: dict[str, Comparison] = {
        name: one for name in names if (one := evidence.compare(evidence.named("alone", name), metric)) is not None
    }
    return max(gaps, key=lambda name: gaps[name].gain) if gaps else ""


def vs_best_unimodal(evidence: VerdictEvidence) -> Iterator[Verdict]:
    """Comparison with the best unimodal baseline, which a multimodal model should exceed."""
    best = _best_alone(evidence, evidence.score, list(evidence.names)) if len(evidence.names) > 1 else ""
    alone = evidence.named("alone", best)
    compared = evidence.compare(evidence.score, alone) if best else None
    if compared is None:
        return
    models = (evidence.details.get("score") or {}).get("alone_from") == "models"
    source = "separate unimodal model" if models else "unimodal head, a lower bound of a separate unimodal model"
    text = f"{evidence.say(compared.value)} compared with {evidence.say(compared.base)} of {best} alone"
    text += f" ({source}; {evidence.proof(compared)})"
    ok: Judgment = "neutral"
    if compared.worse:
        claim, ok = "worse than its best unimodal baseline", "bad"
    elif not compared.better:
        claim, text = (
            "no better than its best unimodal baseline",
            f"No significant difference to the best unimodal baseline: {text}",
        )
    elif evidence.informed is False:
        claim, text = (
            "better than its best unimodal baseline, but not than a constant prediction",
            (
                f"Better than the best unimodal baseline, but not significantly better than the constant prediction: "
                f"{text}"
            ),
        )
    else:
        claim, ok = "better than its best unimodal baseline", "good"
    if ok != "neutral":
        text = f"{claim[0].upper()}{claim[1:]}: {text}"
    yield Verdict(
        "unimodal_baseline",
        f"is {claim}",
        f"{text}.",
        {evidence.score: compared.value, alone: compared.base},
        "score",
        ok,
    )
