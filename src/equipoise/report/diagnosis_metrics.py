"""Metrics of a diagnosis: the test that each belongs to, its display name and its format."""

from __future__ import annotations

from collections.abc import Iterable

from .text_format import LABELS, MINUS, format_delta, format_p, format_value, method_title

KINDS: dict[str, tuple[str, str, str]] = {
    "changed_noise": ("noise", "Changed predictions, {} replaced by noise", "part"),
    "noise_attention_r": ("response", "Attention–noise correlation r", "number"),
    "noise_attention_r_own": ("response", "Attention–noise correlation r with per-sample noise", "number"),
    "noise_attention_r_same": (
        "response",
        "Attention–noise correlation r with attention to the replaced modality",
        "number",
    ),
    "noise_attention_p": ("response", "Attention–noise correlation, p-value", "p"),
    "area": ("corruption", "Mean score over the noise levels in {}", "score"),
    "robustness": ("robustness", "Mean score over damages of {}", "score"),
    "information": ("information", "Information of {} on the target, bits", "number"),
    "information_joint": ("information", "Information of all modalities on the target, bits", "number"),
    "information_gain": ("information", "Information beyond that of the best modality, bits", "number"),
    "information_used": ("information", "Information in the predictions, bits", "number"),
    "redundancy": ("information", "Redundancy of {}, bits", "number"),
    "unique": ("information", "Unique information, {}, bits", "number"),
    "synergy": ("information", "Synergy of {}, bits", "number"),
    "shapley": ("shapley", "Shapley value of {}", "effect"),
    "quag": ("quag", "Attention averaged, {}", "score"),
    "share": ("attention", "Attention share of {}", "part"),
    "share_spread": ("attention", "Standard deviation of the share of {} over samples", "part"),
    "share_entropy": ("attention", "Normalized entropy of the shares (1 is uniform)", "number"),
    "share_quality_r": ("attention", "Correlation of share and quality, {}", "number"),
    "air": ("keys", "AIR of {}", "number"),
    "key_range": ("keys", "Range of the mean cosines", "number"),
    "key_shift": ("keys", "Shift of the mean cosine of {} by noise", "number"),
    "attention_gap": ("gap", "Attention gap of {}, %", "number"),
    "consistency": ("consistency", "Consistency of {}", "number"),
    "pair_error": ("consistency", "Round-trip error, {}", "number"),
    "cycle_error": ("consistency", "Cycle error, {}", "number"),
    "residual_first": ("collapse", "Relative residual, first block", "part"),
    "residual_last": ("collapse", "Relative residual, last block", "part"),
    "gradient": ("gradients", "Gradient norm, parameters of the {} encoder", "size"),
    "gradient_output": ("gradients", "Gradient norm, output of the {} encoder", "size"),
    "auroc": ("ood", "AUROC", "number"),
    "ood_auroc": ("ood", "AUROC of the confidence", "number"),
    "fpr95": ("ood", "FPR95, out-of-distribution as positives", "part"),
    "fpr95_id": ("ood", "FPR95, in-distribution as positives", "part"),
    "parameters": ("cost", "Parameters", "size"),
    "flops": ("cost", "FLOPs per sample", "size"),
    "parameters_thop": ("cost", "Parameters (thop count)", "size"),
    "flops_thop": ("cost", "FLOPs per sample (thop count)", "size"),
}
"""Part of the metric name before "/" -> (test, display name, format)."""

CONDITIONS = {
    "": ("score", "{score}"),
    "constant": ("score", "{score} of a constant prediction"),
    "alone": ("score", "{score} of {name} alone"),
    "with": ("score", "{score} on samples with {name}"),
    "noise": ("noise", "{score}, {name} replaced by noise"),
    "mask": ("masking", "{score}, {name} masked"),
}
"""Suffix of a score -> (test, display name)."""


def source_of(metric: str, score: str = "accuracy") -> str | None:
    """The test that a metric belongs to; None for a metric of no test. ``score`` is the main metric.

    Example:
        >>> source_of("accuracy_mask/audio"), source_of("quag/crossmodal"), source_of("loss")
        ('masking', 'quag', None)
    """
    kind = metric.partition("/")[0]
    condition = _condition(kind, score)
    if condition is not None:
        return CONDITIONS[condition][0]
    return KINDS[kind][0] if kind in KINDS else None


def label(metric: str, score: str = "accuracy") -> str:
    """The display name of a metric; ``score`` is the main one.

    Example:
        >>> label("accuracy_mask/audio"), label("share/image"), label("air")
        ('Accuracy, audio masked', 'Attention share of image', 'AIR of the first modality')
    """
    kind, _, name = metric.partition("/")
    condition = _condition(kind, score)
    if condition is not None:
        base = kind.removesuffix(f"_{condition}") if condition else kind
        return CONDITIONS[condition][1].format(score=method_title(base), name=name)
    return KINDS[kind][1].format(name or "the first modality") if kind in KINDS else method_title(metric)


def shown(metric: str, value: float, score: str = "accuracy") -> str:
    """A formatted value; ``score`` is the main metric of the task.

    Example:
        >>> shown("accuracy_mask/audio", 0.5), shown("shapley/audio", 0.25), shown("noise_attention_p", 0.2)
        ('50.0 %', '+25.0 points', 'p = 0.20')
    """
    kind = metric.partition("/")[0]
    style = KINDS[kind][2] if kind in KINDS and _condition(kind, score) is None else "score"
    if style == "part":
        return f"{100 * value:.1f} %"
    if style == "effect":
        return format_delta(score, value)
    if style == "p":
        return format_p(value)
    if style == "size":
        return format_value("size", value) if abs(value) >= 1e3 or float(value).is_integer() else f"{value:.3g}"
    if style == "number":
        return f"{value:z.2f}".replace("-", MINUS)
    return format_value(score if metric.startswith(("area", "quag", "robustness")) else metric, value)


def is_score(metric: str, score: str = "accuracy") -> bool:
    """Whether a metric is the score under some condition, which can be compared with another one."""
    kind = metric.partition("/")[0]
    return _condition(kind, score) is not None or kind == "quag"


def ordered(metrics: Iterable[str], tests: Iterable[str], score: str = "accuracy") -> list[str]:
    """The metrics in the order of their tests; those of no test last. ``score`` is the main metric."""
    order = {test: index for index, test in enumerate(tests)}
    return sorted(metrics, key=lambda metric: order.get(source_of(metric, score) or "", len(order)))


def _condition(kind: str, main: str) -> str | None:
    for score in dict.fromkeys((main, *LABELS)):
        # The detection of out-of-distribution inputs has an AUROC of its own.
        if kind == score and (kind == main or kind not in KINDS):
            return ""
        if kind.startswith(f"{score}_") and kind.removeprefix(f"{score}_") in CONDITIONS:
            return kind.removeprefix(f"{score}_")
    return None
