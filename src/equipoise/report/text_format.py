"""Formats numbers and names for figures, tables and sentences."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..results.task_metrics import METRICS, Metric

MINUS = "\N{MINUS SIGN}"

SCORES = {"accuracy": "accuracy", "negative_error": "mean absolute error", "recall@1": "recall at 1"}
"""Score -> label. Higher is better; the protocol names the ``score``, otherwise the first of these in a results file is
used. Negative errors are stored, and displayed as errors."""

LABELS = {**{metric.name: metric.title for metric in METRICS.values()}, **SCORES}
"""Score or named metric -> label."""

CONDITIONS = ("constant", "alone", "with", "noise", "mask", "corrupted")
"""Last words of the name of a score under a condition, as in ``accuracy_noise/audio``."""

FRACTIONS = ("accuracy", "val_accuracy", "share", "recall@", "matching", "transfer", "pointing", "chance")
"""Prefixes of metric names, or of their last part, that are fractions in [0, 1] and displayed in percent."""

PAIR_SCORES = ("text", "image", "group", "caption")
"""First parts of the names of Winoground scores, which are fractions."""

TITLES = {
    **{name: f"{name.capitalize()} score" for name in PAIR_SCORES},
    "noise_attention_r": "Attention–noise correlation r",
    "noise_attention_r_own": "Attention–noise correlation r, per-sample noise",
    "air": "AIR",
    "flops": "FLOPs",
    "seconds_per_epoch": "Seconds per epoch",
    **{name: words[:1].upper() + words[1:] for name, words in LABELS.items()},
    **{f"val_{name}": f"Validation {words}" for name, words in LABELS.items()},
}


LEVEL = (
    "The signs differ: attention responds to the level of the noise rather than to the loss of content, so the first r "
    "does not measure the response to input quality."
)
"""Sentence for opposite responses to noise of the training statistics and of the statistics of each sample."""


def depends_on_level(r: float, own_level: float) -> bool:
    """Returns whether the two responses have opposite signs and differ by 0.1 or more: two values near 0 agree.

    Example:
        >>> depends_on_level(-0.29, 0.19), depends_on_level(0.01, -0.004)
        (True, False)
    """
    return r * own_level < 0 and abs(r - own_level) >= 0.1


def method_title(metric: str) -> str:
    """The display name of a metric.

    Example:
        >>> [method_title(m) for m in ("accuracy_noise/audio", "image_to_text/recall@1", "accuracy_shuffled/color")]
        ['Accuracy, audio replaced by noise', 'Image to text: recall at 1', 'Accuracy shuffled: color']
    """
    kind, _, modality = metric.partition("/")
    if modality and kind.endswith("_noise") and (score := kind.removesuffix("_noise")) in LABELS:
        return f"{method_title(score)}, {modality} replaced by noise"
    if modality and kind.endswith("_corrupted") and (score := kind.removesuffix("_corrupted")) in LABELS:
        return f"{method_title(score)}, {modality} damaged"
    if modality and kind == "share":
        return f"Attention share of {modality}"
    if modality and metric not in TITLES:
        return f"{method_title(kind)}: {SCORES.get(modality, modality.replace('_', ' '))}"
    if metric not in TITLES and is_negated(metric):
        return metric.replace("negative_", "", 1).replace("_", " ").capitalize()
    return TITLES.get(metric, metric.replace("_", " ").capitalize())


def main_score(protocol: Mapping[str, Any], metrics: Collection[str]) -> str:
    """The main metric: the one that the protocol names, otherwise the first of ``SCORES`` among the metrics.

    Example:
        >>> main_score({}, ["parameters", "negative_error"])
        'negative_error'
        >>> main_score({"score": "transfer"}, ["accuracy", "transfer"])
        'transfer'
    """
    score = protocol.get("score")
    return score if isinstance(score, str) else next((name for name in SCORES if name in metrics), "accuracy")


def metric_label(score: str) -> str:
    """The name of a metric inside a sentence.

    Example:
        >>> metric_label("negative_error"), metric_label("recall@1"), metric_label("f1_macro"), metric_label("transfer")
        ('mean absolute error', 'recall at 1', 'macro F1', 'transfer')
    """
    return LABELS.get(score, method_title(score)[:1].lower() + method_title(score)[1:])


def named_metric(metric: str) -> Metric | None:
    """The metric of ``METRICS`` that a name in results belongs to, also under a condition.

    Example:
        >>> names = ("acc2_nonzero", "val_acc2", "mae_noise/audio", "air")
        >>> [found and found.name for found in map(named_metric, names)]
        ['acc2_nonzero', 'acc2', 'mae', None]
    """
    kind = metric.partition("/")[0].removeprefix("val_")
    if kind not in METRICS and kind.rpartition("_")[2] in CONDITIONS:
        kind = kind.rpartition("_")[0]
    return METRICS.get(kind)


def is_negated(metric: str) -> bool:
    """Whether a metric is stored as a negative error and displayed without the sign.

    Example:
        >>> is_negated("negative_error_noise/audio"), is_negated("val_negative_mse"), is_negated("mae")
        (True, True, False)
    """
    return any(part.removeprefix("val_").startswith("negative_") for part in metric.split("/"))


def is_error(metric: str) -> bool:
    """Whether a metric is displayed as an error (lower is better).

    Example:
        >>> is_error("negative_error_noise/audio"), is_error("rmse_noise/audio"), is_error("accuracy")
        (True, True, False)
    """
    known_metric = named_metric(metric)
    return is_negated(metric) or (known_metric is not None and not known_metric.higher)


def gain(metric: str, value: float) -> float:
    """A stored value, or a difference of two, with the sign that makes larger values better.

    Example:
        >>> gain("mae", 0.5), gain("negative_error", -0.5), gain("accuracy", 0.5)
        (-0.5, -0.5, 0.5)
    """
    return -value if is_error(metric) and not is_negated(metric) else value


def as_read(metric: str, value: float) -> float:
    """A stored value, or a difference of two, with its displayed sign.

    Example:
        >>> as_read("negative_error", -0.5), as_read("accuracy", 0.5)
        (0.5, 0.5)
    """
    return -value if is_negated(metric) else value


def is_fraction(metric: str) -> bool:
    """Whether a metric is a fraction in [0, 1], displayed in percent.

    Example:
        >>> is_fraction("accuracy_noise/audio"), is_fraction("image_to_text/recall@5"), is_fraction("share_spread")
        (True, True, False)
        >>> is_fraction("group/color"), is_fraction("image_to_text/rank")
        (True, False)
    """
    known_metric = named_metric(metric)
    if known_metric is not None and known_metric.percent:
        return True
    parts = metric.split("/")
    if parts[0] in PAIR_SCORES:
        return True
    return any(part.startswith(FRACTIONS) for part in (parts[0], parts[-1])) and not parts[0].startswith("share_")


def format_signed(value: float, decimals: int = 2) -> str:
    """A number with its sign (U+2212 for minus).

    Example:
        >>> format_signed(0.516), format_signed(-0.2, 1), format_signed(-0.001)
        ('+0.52', '−0.2', '0.00')
    """
    text = f"{value:+.{decimals}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def format_value(metric: str, value: float, *, unit: bool = True) -> str:
    """A value with the decimals of its metric; errors have three significant digits and no minus.

    Example:
        >>> format_value("accuracy", 0.7512), format_value("parameters", 123456)
        ('75.1 %', '123 k')
        >>> format_value("noise_attention_r", -0.2)
        '−0.20'
        >>> format_value("negative_error", -0.01234), format_value("negative_error", -2.0)
        ('0.0123', '2.00')
    """
    if is_fraction(metric):
        return f"{100 * value:.1f}".replace("-", MINUS) + (" %" if unit else "")
    value = as_read(metric, value)
    if is_error(metric) and 1e-4 <= abs(value) < 1e3:
        return f"{value:#.3g}".rstrip(".").replace("-", MINUS)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}".replace("-", MINUS)
    return f"{value:z.2f}".replace("-", MINUS)


def with_spread(metric: str, mean: float, sd: float | None) -> str:
    """A mean and its standard deviation without unit.

    Example:
        >>> with_spread("accuracy", 0.5, 0.01), with_spread("negative_error", -0.5, 0.0125)
        ('50.0 ± 1.0', '0.500 ± 0.013')
    """
    text = format_value(metric, mean, unit=False)
    if sd is None:
        return text
    if is_error(metric) and text.replace(".", "").isdigit():
        # Use the number of decimals of the mean.
        return f"{text} ± {sd:.{len(text.partition('.')[2])}f}"
    return f"{text} ± {format_value(metric, as_read(metric, sd), unit=False)}"


def format_delta(metric: str, value: float) -> str:
    """A difference of two values of a metric, in percentage points for fractions.

    Example:
        >>> [format_delta("accuracy", 0.021), format_delta("air", -0.3), format_delta("parameters", 2048)]
        ['+2.1 points', '−0.30', '+2.05 k']
        >>> format_delta("negative_error", 0.0012)
        '−0.0012'
    """
    if is_fraction(metric):
        return format_signed(100 * value, 1) + " points"
    value = as_read(metric, value)
    if is_error(metric) and 1e-4 <= abs(value) < 0.1:
        return f"{value:+#.2g}".replace("-", MINUS)
    return format_signed(value) if abs(value) < 1e3 else ("+" if value > 0 else "") + format_value(metric, value)


def format_p(p: float) -> str:
    """A p-value with two or three decimals.

    Example:
        >>> format_p(0.00004), format_p(0.0312), format_p(0.4)
        ('p < 0.001', 'p = 0.031', 'p = 0.40')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def join_and(parts: list[str]) -> str:
    """Joins items with commas and "and".

    Example:
        >>> join_and(["a", "b", "c"])
        'a, b and c'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def pluralize(number: int, noun: str) -> str:
    """A number and its noun in singular or plural.

    Example:
        >>> pluralize(1, "seed"), pluralize(5, "seed")
        ('1 seed', '5 seeds')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
