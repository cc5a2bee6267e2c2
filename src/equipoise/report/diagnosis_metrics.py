"""Names of a diagnosis's figures: which test each belongs to, how a reader says it, and with how many decimals."""

from __future__ import annotations

from collections.abc import Iterable

from .text_format import MINUS, SCORES, format_delta, format_p, format_value, method_title

KINDS: dict[str, tuple[str, str, str]] = {
    "changed_noise": ("noise", "Answers that change, {} replaced by noise", "part"),
    "noise_attention_r": ("response", "Attention–noise correlation r", "number"),
    "noise_attention_r_own": ("response", "The same with noise of each sample's own mean and deviation", "number"),
    "noise_attention_r_same": ("response", "The same with attention to the modality itself", "number"),
    "noise_attention_p": ("response", "Its p-value", "p"),
    "area": ("corruption", "Mean over the levels of noise in {}", "score"),
    "shapley": ("shapley", "Shapley value of {}", "effect"),
    "quag": ("quag", "Attention averaged, {}", "score"),
    "share": ("attention", "Attention share of {}", "part"),
    "share_spread": ("attention", "Deviation of the share of {} over samples", "part"),
    "share_entropy": ("attention", "Entropy of the shares, 1 is even", "number"),
    "share_quality_r": ("attention", "Correlation of share and quality, {}", "number"),
    "air": ("keys", "AIR of {}", "number"),
    "key_range": ("keys", "Range of the mean cosines", "number"),
    "key_shift": ("keys", "Shift of the mean cosine of {} by noise", "number"),
    "attention_gap": ("gap", "Attention gap of {}, %", "number"),
    "consistency": ("consistency", "Consistency of {}", "number"),
    "pair_error": ("consistency", "Error of going there and back, {}", "number"),
    "cycle_error": ("consistency", "Error of going round, {}", "number"),
    "residual_first": ("collapse", "Part of the tokens that differs, first", "part"),
    "residual_last": ("collapse", "Part of the tokens that differs, last", "part"),
    "gradient": ("gradients", "Gradient norm, parameters of the {} encoder", "size"),
    "gradient_output": ("gradients", "Gradient norm, output of the {} encoder", "size"),
    "auroc": ("ood", "AUROC", "number"),
    "fpr95": ("ood", "FPR95, unknown as positives", "part"),
    "fpr95_id": ("ood", "FPR95, known as positives", "part"),
    "parameters": ("cost", "Parameters", "size"),
    "flops": ("cost", "Operations of one sample (FLOPs)", "size"),
    "parameters_thop": ("cost", "Parameters, as tables count", "size"),
    "flops_thop": ("cost", "FLOPs of one sample, as tables count", "size"),
}
"""Kind of metric, its name before the stroke -> (test, words for a reader, how it is written)."""

CONDITIONS = {
    "": ("score", "{score}"),
    "constant": ("score", "{score} of one answer for all"),
    "alone": ("score", "{score} of {name} alone"),
    "with": ("score", "{score} on the samples that have {name}"),
    "noise": ("noise", "{score}, {name} replaced by noise"),
    "mask": ("masking", "{score}, {name} taken away"),
}
"""What follows the name of a score -> (test, words)."""


def source_of(metric: str) -> str | None:
    """The test that a figure comes from; None for a figure that no test of ours gives.

    Example:
        >>> source_of("accuracy_mask/audio"), source_of("quag/crossmodal"), source_of("loss")
        ('masking', 'quag', None)
    """
    kind = metric.partition("/")[0]
    condition = _condition(kind)
    if condition is not None:
        return CONDITIONS[condition][0]
    return KINDS[kind][0] if kind in KINDS else None


def label(metric: str) -> str:
    """A figure's name as a reader says it.

    Example:
        >>> label("accuracy_mask/audio"), label("share/image"), label("air")
        ('Accuracy, audio taken away', 'Attention share of image', 'AIR of the first modality')
    """
    kind, _, name = metric.partition("/")
    condition = _condition(kind)
    if condition is not None:
        score = kind.removesuffix(f"_{condition}") if condition else kind
        return CONDITIONS[condition][1].format(score=method_title(score), name=name)
    return KINDS[kind][1].format(name or "the first modality") if kind in KINDS else method_title(metric)


def shown(metric: str, value: float, score: str = "accuracy") -> str:
    """A figure as it is printed; ``score`` is the metric of the model's task.

    Example:
        >>> shown("accuracy_mask/audio", 0.5), shown("shapley/audio", 0.25), shown("noise_attention_p", 0.2)
        ('50.0 %', '+25.0 points', 'p = 0.20')
    """
    kind = metric.partition("/")[0]
    way = KINDS[kind][2] if kind in KINDS else "score"
    if way == "part":
        return f"{100 * value:.1f} %"
    if way == "effect":
        return format_delta(score, value)
    if way == "p":
        return format_p(value)
    if way == "size":
        return format_value("size", value) if abs(value) >= 1e3 or float(value).is_integer() else f"{value:.3g}"
    if way == "number":
        return f"{value:z.2f}".replace("-", MINUS)
    return format_value(score if metric.startswith(("area", "quag")) else metric, value)


def is_score(metric: str) -> bool:
    """Whether a figure is the score under some condition, which can be tested against another one."""
    kind = metric.partition("/")[0]
    return _condition(kind) is not None or kind == "quag"


def ordered(metrics: Iterable[str], tests: Iterable[str]) -> list[str]:
    """The figures in the order of their tests, those of no test last."""
    places = {test: place for place, test in enumerate(tests)}
    return sorted(metrics, key=lambda metric: places.get(source_of(metric) or "", len(places)))


def _condition(kind: str) -> str | None:
    for score in SCORES:
        if kind == score:
            return ""
        if kind.startswith(f"{score}_") and kind.removeprefix(f"{score}_") in CONDITIONS:
            return kind.removeprefix(f"{score}_")
    return None
