"""Rules on attention and confidence: response to input quality, variation across samples, cross-modal attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..results.significance import SURE
from .text_format import LEVEL, depends_on_level, format_p, format_signed
from .verdict_evidence import ERRORS, Judgment, Verdict, VerdictEvidence

FOLLOWS, BLIND = 0.3, 0.1
"""Attention–noise correlation from which attention responds to input quality, and below which it does not."""
STILL = 0.01
"""Standard deviation of the shares over samples below which attention is called nearly constant."""
FLAT = 0.05
"""Relative residual below which the tokens of a layer count as collapsed."""
KNOWS, GUESSES = 0.8, 0.6
"""AUROC from which detection is called good, and below which it is called poor."""


def quality(evidence: VerdictEvidence) -> Iterator[Verdict]:
    """Whether attention moves away from a modality that is replaced by noise."""
    if "noise_attention_r" not in evidence.metrics:
        return
    r, p = evidence.get("noise_attention_r"), evidence.get("noise_attention_p")
    name = (evidence.details.get("response") or {}).get("modality") or "the modality"
    if r is None:
        text = (
            "Attention does not respond to input quality: "
            f"the attention to {name} is the same for clean input and noise."
        )
        yield Verdict("quality", "does not respond to input quality", text, {}, "response", "bad")
        return
    figures = {"noise_attention_r": r} | ({} if p is None else {"noise_attention_p": p})
    shown = f"r = {format_signed(r)}" + ("" if p is None else f", {format_p(p)}")
    # Upper bound of the confidence interval of r; the standard error is largest at r = 0.
    upper = r + ERRORS / math.sqrt(2 * max(evidence.samples, 1))
    if p is not None and p >= SURE and upper < FOLLOWS:
        text = f"Attention does not respond to input quality: no significant shift away from noise in {name} ({shown})."
        yield Verdict("quality", "does not respond to input quality", text, figures, "response", "bad")
    elif p is not None and p >= SURE:
        text = f"No significant response of attention to noise in {name} ({shown})."
        yield Verdict("quality", "shows no significant response of attention to noise", text, figures, "response")
    elif r >= FOLLOWS:
        text = (
            "Attention responds to input quality: "
            f"it moves away from {name} when {name} is replaced by noise ({shown})."
        )
        yield Verdict("quality", "responds to input quality", text, figures, "response", "good")
    elif r >= BLIND:
        text = f"Attention responds weakly to input quality: it moves slightly away from noise in {name} ({shown})."
        yield Verdict("quality", "responds weakly to input quality", text, figures, "response")
    elif r > -BLIND:
        text = f"Attention does not respond to input quality: it does not move away from noise in {name} ({shown})."
        yield Verdict("quality", "does not respond to input quality", text, figures, "response", "bad")
    else:
        text = f"Attention does not respond to input quality: it moves toward noise in {name} ({shown})."
        yield Verdict("quality", "attends more to noise", text, figures, "response", "bad")


def level(evidence: VerdictEvidence) -> Iterator[Verdict]:
    """Whether attention responds to the level of the noise rather than to the loss of content."""
    r, own_level = evidence.get("noise_attention_r"), evidence.get("noise_attention_r_own")
    if r is None or own_level is None or not depends_on_level(r, own_level):
        return
    text = (
        f"With noise of the mean and standard deviation of the training data r = {format_signed(r)}; "
        f"with those of each sample r = {format_signed(own_level)}. {LEVEL}"
    )
    figures = {"noise_attention_r": r, "noise_attention_r_own": own_level}
    yield Verdict("level", "responds to the level of the noise", text, figures, "response", "bad")


def constant_attention(evidence: VerdictEvidence) -> Iterator[Verdict]:
    spread = {f"share_spread/{name}": evidence.get(f"share_spread/{name}") for name in evidence.names}
    defined = {metric: value for metric, value in spread.items() if value is not None}
    if len(evidence.names) > 1 and defined and max(defined.values()) < STILL:
        text = (
            f"Attention is nearly constant: the standard deviation of every share across samples is at most "
            f"{100 * max(defined.values()):.2f} points, so the fusion is effectively static."
        )
        yield Verdict("constant_attention", "has nearly constant attention", text, defined, "attention", "bad")


def needs_cross_modal(evidence: VerdictEvidence) -> Iterator[Verdict]:
    """Whether the score depends on attention between tokens of different modalities."""
    compared = evidence.compare("quag/crossmodal", evidence.score)
    changed = (evidence.details.get("quag") or {}).get("changed") or {}
    # Without a layer in which tokens of one modality attend to another, nothing was averaged.
    if compared is None or not changed.get("crossmodal", True):
        return
    figures = {evidence.score: compared.base, "quag/crossmodal": compared.value}
    text = (
        f"{evidence.say(compared.base)} unmodified, {evidence.say(compared.value)} with cross-modal attention averaged "
        f"({evidence.proof(compared)})"
    )
    if compared.worse and evidence.informed is not False:
        text = f"Relies on cross-modal attention between single tokens: {text}."
        yield Verdict("quag", "relies on cross-modal attention", text, figures, "quag", "good")
    elif compared.worse:
        text = (
            "Cross-modal attention affects the score, "
            f"which is not significantly above the constant prediction: {text}."
        )
        yield Verdict("quag", "depends without benefit on cross-modal attention", text, figures, "quag")
    else:
        text = f"No significant effect of cross-modal attention between single tokens: {text}."
        yield Verdict("quag", "shows no significant effect of cross-modal attention", text, figures, "quag")


def ood_detection(evidence: VerdictEvidence) -> Iterator[Verdict]:
    metric = "ood_auroc" if evidence.score == "auroc" else "auroc"
    auroc = evidence.get(metric)
    if auroc is None:
        return
    outside = int((evidence.details.get("ood") or {}).get("outside") or 1)
    # Standard error of the rank statistic under the null hypothesis of equal distributions.
    error = math.sqrt((evidence.samples + outside + 1) / (12 * max(evidence.samples, 1) * max(outside, 1)))
    p = math.erfc(abs(auroc - 0.5) / (error * math.sqrt(2)))
    counts = f"{evidence.samples} in-distribution and {outside} out-of-distribution samples"
    shown = f"AUROC {auroc:.2f}, {format_p(p)}, {counts}"
    figures = {metric: auroc}
    if p >= SURE:
        text = f"Confidence does not significantly separate out-of-distribution from in-distribution inputs ({shown})."
        yield Verdict("ood", "does not detect out-of-distribution inputs", text, figures, "ood", "bad")
    elif auroc < 0.5:
        text = f"Confidence is higher on out-of-distribution than on in-distribution inputs ({shown})."
        yield Verdict("ood", "is more confident on out-of-distribution inputs", text, figures, "ood", "bad")
    else:
        well = "well" if auroc >= KNOWS else "poorly" if auroc < GUESSES else "partly"
        ok: Judgment = "good" if auroc >= KNOWS else "bad" if auroc < GUESSES else "neutral"
        text = (
            f"Out-of-distribution inputs are {well} separated from in-distribution inputs by the confidence ({shown})."
        )
        yield Verdict("ood", f"detects out-of-distribution inputs {well}", text, figures, "ood", ok)


def collapse(evidence: VerdictEvidence) -> Iterator[Verdict]:
    last = evidence.get("residual_last")
    if last is not None and last < FLAT:
        text = (
            f"Token representations collapse with depth: the relative residual of the last block is {100 * last:.1f} %."
        )
        yield Verdict(
            "collapse", "has collapsed token representations", text, {"residual_last": last}, "collapse", "bad"
        )
