"""Findings of a diagnosis in sentences: modality use, response to input quality, robustness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .text_format import join_and
from .verdict_attention import collapse, constant_attention, level, needs_cross_modal, ood_detection, quality
from .verdict_evidence import Verdict as Verdict
from .verdict_evidence import VerdictEvidence
from .verdict_information import information_gain, information_use
from .verdict_use import chance, modality_use, robustness_fallback, vs_best_unimodal


def verdicts(content: Mapping[str, Any]) -> list[Verdict]:
    """The findings that the metrics of a diagnosis support, most important first.

    Example:
        >>> metrics = {"accuracy": 0.9, "accuracy_mask/a": 0.5, "accuracy_mask/b": 0.6}
        >>> found = {"names": ["a", "b"], "task": "classification", "samples": 1000, "metrics": metrics}
        >>> [(verdict.key, verdict.claim, verdict.ok) for verdict in verdicts(found)][0]
        ('use', 'uses both modalities', 'good')
    """
    evidence = VerdictEvidence(content)
    rules = (
        chance,
        modality_use,
        quality,
        level,
        robustness_fallback,
        vs_best_unimodal,
        information_gain,
        information_use,
        constant_attention,
        needs_cross_modal,
        ood_detection,
        collapse,
    )
    return [verdict for rule in rules for verdict in rule(evidence)]


def headline(name: str, findings: Sequence[Verdict]) -> str:
    """The title of a page: the name of the model and the claims on use and on input quality.

    Example:
        >>> findings = [Verdict("use", "uses both modalities", ""), Verdict("quality", "responds to input quality", "")]
        >>> headline("joint", findings)
        'joint uses both modalities and responds to input quality'
    """
    by_key = {verdict.key: verdict.claim for verdict in findings}
    if "chance" in by_key:
        return f"{name} {by_key['chance']}"
    claims = [by_key[key] for key in ("use", "quality") if key in by_key]
    return f"{name} {join_and(claims)}" if claims else f"Diagnosis of {name}"
