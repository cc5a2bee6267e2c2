"""Rules on the information in the outputs of the encoders: what fusion can gain, and what the model uses of it."""

from __future__ import annotations

from collections.abc import Iterator

from ..results.result_rows import finite_or_none
from .verdict_evidence import ERRORS, Verdict, VerdictEvidence

NEGLIGIBLE = 0.05
"""Bits below which a difference of information is within the accuracy of the estimate."""


def information_gain(evidence: VerdictEvidence) -> Iterator[Verdict]:
    """Whether all modalities together have more information than the best one: a property of the encoded data."""
    joint, gain = evidence.get("information_joint"), evidence.get("information_gain")
    if joint is None or gain is None:
        return
    figures = {"information_joint": joint, "information_gain": gain}
    if _matters(evidence, gain, "gain_error"):
        text = (
            f"Fusion can add {gain:.2f} bits to the best modality, of {joint:.2f} bits in the outputs of all encoders."
        )
        yield Verdict("information_gain", "can gain from fusion", text, figures, "information")
        return
    text = (
        f"The best modality has all of the {joint:.2f} bits in the outputs of the encoders, within {NEGLIGIBLE} bits "
        "or the 95 % interval: fusion has nothing to add, because of the data or of the encoders."
    )
    yield Verdict("information_gain", "cannot gain from fusion", text, figures, "information")


def information_use(evidence: VerdictEvidence) -> Iterator[Verdict]:
    """Whether the predictions have the information that the outputs of the encoders have."""
    joint, used = evidence.get("information_joint"), evidence.get("information_used")
    if joint is None or used is None:
        return
    figures = {"information_joint": joint, "information_used": used}
    shown = f"{used:.2f} of {joint:.2f} bits"
    if _matters(evidence, joint - used, "unused_error"):
        text = f"Predictions contain {shown} in the outputs of the encoders: the fusion loses the rest."
        yield Verdict("information_use", "does not use all information", text, figures, "information", "bad")
        return
    text = f"Predictions contain {shown} in the outputs of the encoders: the fusion loses no information."
    yield Verdict("information_use", "uses all information of its encoders", text, figures, "information", "good")


def _matters(evidence: VerdictEvidence, difference: float, error: str) -> bool:
    """Whether a difference exceeds its 95 % interval and the accuracy of the estimate."""
    deviation = finite_or_none((evidence.details.get("information") or {}).get(error)) or 0.0
    return difference > max(NEGLIGIBLE, ERRORS * deviation)
