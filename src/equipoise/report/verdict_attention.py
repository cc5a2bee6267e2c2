"""Rules on attention and confidence: does it look at quality, does it move, do tokens of two modalities meet?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..results.significance import SURE
from .text_format import LEVEL, format_p, format_signed
from .verdict_evidence import ERRORS, Judgment, Verdict, VerdictEvidence

FOLLOWS, BLIND = 0.3, 0.1
"""Attention-noise correlation from which attention follows quality, and below which it is blind to it."""
STILL = 0.01
"""Standard deviation of every share over samples below which attention divides all samples alike."""
FLAT = 0.05
"""Relative residual below which the tokens of a layer are as good as one."""
KNOWS, GUESSES = 0.8, 0.6
"""AUROC from which unknown inputs are told well, and below which hardly at all."""


def quality(found: VerdictEvidence) -> Iterator[Verdict]:
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
    shown = f"r = {format_signed(r)}" + ("" if p is None else f", {format_p(p)}")
    # How large r may be for all these samples tell: its error is at most that of no correlation.
    most = r + ERRORS / math.sqrt(2 * max(found.samples, 1))
    if p is not None and p >= SURE and most < FOLLOWS:
        text = f"Attention is blind to quality: it does not significantly leave {name} when that is noise ({shown})."
        yield Verdict("quality", "is blind to quality", text, figures, "response", "bad")
    elif p is not None and p >= SURE:
        text = f"No significant response of attention to noise in {name} ({shown})."
        yield Verdict("quality", "shows no significant response of attention to noise", text, figures, "response")
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
        text = f"Attention is blind to quality: it moves toward {name} when that is replaced by noise ({shown})."
        yield Verdict("quality", "is drawn to noise", text, figures, "response", "bad")


def level(found: VerdictEvidence) -> Iterator[Verdict]:
    """Does attention react to the level of the noise, or to the loss of content?"""
    r, own = found.get("noise_attention_r"), found.get("noise_attention_r_own")
    if r is None or own is None or r * own >= 0:
        return
    text = (
        f"With noise of the training data's mean and deviation r = {format_signed(r)}, with noise of each sample's own "
        f"r = {format_signed(own)}. {LEVEL}"
    )
    figures = {"noise_attention_r": r, "noise_attention_r_own": own}
    yield Verdict("level", "reacts to the level of noise", text, figures, "response", "bad")


def constant_attention(found: VerdictEvidence) -> Iterator[Verdict]:
    spread = {f"share_spread/{name}": found.get(f"share_spread/{name}") for name in found.names}
    known = {metric: value for metric, value in spread.items() if value is not None}
    if len(found.names) > 1 and known and max(known.values()) < STILL:
        text = (
            f"Attention divides all samples alike: no share moves by more than {100 * max(known.values()):.2f} points "
            "(standard deviation) from sample to sample. It is dynamic in name only."
        )
        yield Verdict("still", "divides all samples alike", text, known, "attention", "bad")


def needs_cross_modal(found: VerdictEvidence) -> Iterator[Verdict]:
    """Do tokens of one modality read the other?"""
    compared = found.compare("quag/crossmodal", found.score)
    changed = (found.details.get("quag") or {}).get("changed") or {}
    # Where no layer has tokens of one modality that read another, nothing was averaged.
    if compared is None or not changed.get("crossmodal", True):
        return
    figures = {found.score: compared.base, "quag/crossmodal": compared.value}
    text = (
        f"{found.say(compared.base)} as it is, {found.say(compared.value)} with attention across modalities averaged "
        f"({found.proof(compared)})"
    )
    if compared.worse and found.informed is not False:
        text = f"Needs to know which token of one modality reads which of another: {text}."
        yield Verdict("quag", "needs attention across modalities", text, figures, "quag", "good")
    elif compared.worse:
        text = f"Attention across modalities changes a score that is no better than the constant answer's: {text}."
        yield Verdict("quag", "depends without benefit on attention across modalities", text, figures, "quag")
    else:
        text = f"No significant need for attention between tokens of different modalities: {text}."
        yield Verdict("quag", "shows no significant need for attention across modalities", text, figures, "quag")


def ood_detection(found: VerdictEvidence) -> Iterator[Verdict]:
    auroc = found.get("auroc")
    if auroc is None:
        return
    outside = int((found.details.get("ood") or {}).get("outside") or 1)
    # Of the rank statistic where both kinds are alike: how far from 1/2 chance takes it.
    error = math.sqrt((found.samples + outside + 1) / (12 * max(found.samples, 1) * max(outside, 1)))
    p = math.erfc(abs(auroc - 0.5) / (error * math.sqrt(2)))
    shown = f"AUROC {auroc:.2f}, {format_p(p)}, {found.samples} known and {outside} unknown samples"
    figures = {"auroc": auroc}
    if p >= SURE:
        text = f"Its confidence does not significantly tell these unknown inputs from known ones ({shown})."
        yield Verdict("outside", "does not notice unknown inputs", text, figures, "ood", "bad")
    elif auroc < 0.5:
        text = f"It is more sure of these unknown inputs than of known ones ({shown})."
        yield Verdict("outside", "is surer of unknown inputs", text, figures, "ood", "bad")
    else:
        well = "well" if auroc >= KNOWS else "hardly" if auroc < GUESSES else "in part"
        ok: Judgment = "good" if auroc >= KNOWS else "bad" if auroc < GUESSES else "neutral"
        text = f"Its confidence tells these unknown inputs {well} ({shown})."
        yield Verdict("outside", f"tells unknown inputs {well}", text, figures, "ood", ok)


def collapse(found: VerdictEvidence) -> Iterator[Verdict]:
    last = found.get("residual_last")
    if last is not None and last < FLAT:
        text = f"Its tokens become one with depth: only {100 * last:.1f} % of their size is not common to all."
        yield Verdict("collapse", "makes its tokens one", text, {"residual_last": last}, "collapse", "bad")
