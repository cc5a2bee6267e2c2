"""Score under the damages of the catalog, compared with the best modality that is still intact."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.corruptions import CORRUPTIONS, SEVERITIES, InputKind, corrupt_batch, corruption_names, infer_kind
from ..data.corruptions.catalog import check_corruptions
from ..errors import ConfigError, require_extra, unknown_name
from ..io.atomic_files import atomic_write
from ..io.table_display import html_table, to_pandas
from ..results.task_metrics import Metric
from .modality_ablation import ablated_logits
from .noise_test import input_statistics
from .prediction_collection import check_batch, collect_predictions, input_of
from .task_scores import score_name

Batches = Iterable[Mapping[str, Any]]
MOST_LOGITS = 64_000_000
"""Logits of all damages that are in memory at once; above, the loader is read several times."""


@dataclass(frozen=True)
class Robustness:
    """Scores under damage of one modality at a time.

    Attributes:
        clean: score without damage: accuracy, or minus the mean absolute error of a regression, or ``metric``.
        alone: modality -> score of it alone; empty for a single modality.
        scores: (modality, corruption, severity) -> score.
        names: modality names.
    """

    clean: float
    alone: dict[str, float]
    scores: dict[tuple[str, str, int], float]
    names: tuple[str, ...]

    def best_intact(self, modality: str) -> float:
        """Returns the score of the best other modality alone; NaN if there is no other."""
        return max((score for name, score in self.alone.items() if name != modality), default=math.nan)

    def mean(self, modality: str | None = None, corruption: str | None = None) -> float:
        """Returns the mean score over the damages of a modality, of a kind, or of all; NaN if there are none."""
        chosen = [
            score for (name, kind, _), score in self.scores.items()
            if modality in (None, name) and corruption in (None, kind)
        ]  # fmt: skip
        return sum(chosen) / len(chosen) if chosen else math.nan

    @property
    def share_near_intact(self) -> float:
        """Fraction of the damages under which the score is at most 0.02 below the best intact modality."""
        near = [score >= self.best_intact(name) - 0.02 for (name, _, _), score in self.scores.items() if self.alone]
        return sum(near) / len(near) if near else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each damage: score, drop from the clean score, distance to the best intact modality."""
        return [
            {
                "modality": modality, "corruption": corruption, "severity": severity, "score": score,
                "drop": self.clean - score, "best_intact": self.best_intact(modality),
                "distance": score - self.best_intact(modality),
            }
            for (modality, corruption, severity), score in self.scores.items()
        ]  # fmt: skip

    def table(self) -> str:
        """Returns a text table: a row for each modality and corruption, a column for each severity, and the mean."""
        severities = sorted({severity for _, _, severity in self.scores})
        head = ["modality", "corruption", *map(str, severities), "mean", "best intact"]
        lines = [head]
        for modality, corruption in dict.fromkeys(key[:2] for key in self.scores):
            values = [self.scores[modality, corruption, severity] for severity in severities]
            values += [self.mean(modality, corruption), self.best_intact(modality)]
            lines.append([modality, corruption, *map(_number, values)])
        lines.append(["all", "all", *[""] * len(severities), _number(self.mean()), ""])
        lines.append(["none", "clean", *[""] * len(severities), _number(self.clean), ""])
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines
        )  # fmt: skip

    def to_pandas(self) -> Any:
        """Returns the rows as a ``pandas.DataFrame``.

        Raises:
            ConfigError: pandas is not installed.
        """
        return to_pandas(self.rows(), "Robustness")

    def _repr_html_(self) -> str:
        severities = sorted({severity for _, _, severity in self.scores})
        rows = []
        for modality, corruption in dict.fromkeys(key[:2] for key in self.scores):
            row: dict[str, Any] = {"modality": modality, "corruption": corruption}
            row |= {str(severity): self.scores.get((modality, corruption, severity)) for severity in severities}
            rows.append({**row, "mean": self.mean(modality, corruption), "best intact": self.best_intact(modality)})
        return html_table([*rows, {"modality": "none", "corruption": "clean", "mean": self.clean}])

    def figure(self) -> Any:
        """Returns a matplotlib figure of the score under each corruption, clean, and of the best intact modality.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        with require_extra("Robustness.figure"):
            from ..report.robustness_figure import draw_robustness

            return draw_robustness(self.rows(), self.clean, self.names)

    def save_figure(self, path: str | os.PathLike[str]) -> Path:
        """Writes the figure as an SVG file, atomically.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        with require_extra("Robustness.save_figure"):
            from ..report.plot_style import to_svg

            text = to_svg(self.figure(), "robustness", "Score under damage of each modality")
        if "xmlns=" not in text.split(">", 1)[0]:
            text = text.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
        return atomic_write(Path(path), text)


def robustness(
    model: nn.Module, loader: Batches | Callable[[], Batches], *, modalities: Sequence[str] | None = None,
    corruptions: Sequence[str] | None = None, severities: Sequence[int] = SEVERITIES,
    kinds: Mapping[str, InputKind] | None = None, statistics: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0, metric: str | Metric | None = None,
) -> Robustness:  # fmt: skip
    """Measures the score of a trained model with each modality damaged in each way of the catalog.

    A robust fusion is never worse than the best modality that is still intact: ``distance`` of a row is its score minus
    that of the best other modality alone.

    Args:
        model: a FusionModel, ``eq.Reliability``, or a module with names, encode and fuse that returns Output.
        loader: batches, dicts with every modality and targets, that can be iterated several times in the same order; or
            a function that returns them.
        modalities: the modalities to damage; by default all.
        corruptions: names of ``equipoise.diagnostics.corruptions``; by default all that fit the kind of input.
        severities: some of 1 to 5.
        kinds: modality -> kind of input; by default as ``infer_kind`` returns: name spectrograms.
        statistics: modality -> (mean, std) of the training inputs, as in ``Dataset.noise``; by default those of the
            inputs of the loader.
        seed: of the damage, which depends on the seed, the batch and the corruption alone.
        metric: name of a metric of ``equipoise.results`` that replaces the score of the task.

    Returns:
        Robustness. The model runs once for each modality, corruption and severity; encoders of modalities that are not
        damaged run once for each pass over the loader: there is one pass, or more if the logits under all damages
        together would take more than 256 MB.

    Raises:
        ConfigError: an unknown modality, corruption or severity, no corruption that fits, or a model without task.
        ShapeError: no batch, no targets, or inputs of an unknown kind. NonFiniteError: a prediction is NaN.

    Severities of different corruptions are not equally hard; compare models, not corruptions. A model trained with a
    corruption is tested on its training condition: report the others separately.

    Example:
        >>> import torch
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), num_outputs=2)
        >>> batch = {"audio": torch.randn(20, 7, 3), "image": torch.randn(20, 5), "target": torch.arange(20) % 2}
        >>> found = robustness(model, [batch], corruptions=["zeros", "missing"], severities=[5])
        >>> [row["corruption"] for row in found.rows()]
        ['zeros', 'missing', 'zeros', 'missing']
    """
    who = "robustness"
    names = tuple(getattr(model, "names", ()))
    chosen = names if modalities is None else tuple(modalities)
    for name in (*chosen, *(kinds or ()), *(statistics or ())):
        if names and name not in names:
            raise unknown_name(who, "modality", str(name), names)
    check_corruptions(corruptions or (), who)
    severities = list(dict.fromkeys(severities))
    if not severities or any(isinstance(one, bool) or one not in SEVERITIES for one in severities):
        raise ConfigError(who, expected="severities from 1 to 5", got=repr(severities))
    if isinstance(loader, Iterator):
        raise ConfigError(
            who, expected="batches that can be read several times", got=type(loader).__name__,
            fix="Pass a list, a DataLoader, or a function that returns an iterator.",
        )  # fmt: skip
    batches: Callable[[], Batches] = loader if callable(loader) else lambda: loader  # type: ignore[assignment]
    clean = collect_predictions(model, batches())
    score = score_name(model, clean.logits, clean.target, who, metric)
    first = check_batch(next(iter(batches())), who)
    damages: list[_Damage] = []
    for name in chosen:
        values = input_of(first, name, who)
        kind = (kinds or {}).get(name) or infer_kind(values, f"{who} '{name}'")
        fitting = [one for one in corruption_names(kind) if corruptions is None or one in corruptions]
        moments = (statistics or {}).get(name, (0.0, 1.0))
        if name not in (statistics or {}) and kind != "tokens":
            moments = input_statistics(batches(), name, who=who)
        damages += [_Damage(name, one, severity, kind, moments) for one in fitting for severity in severities]
    scores: dict[tuple[str, str, int], float] = {}
    together = max(1, MOST_LOGITS // max(1, clean.logits.numel()))
    for start in range(0, len(damages), together):
        part, sizes = damages[start : start + together], list[int]()
        with _reused_encodings(model) as start_batch:
            predictions = collect_predictions(model, _damaged(batches(), part, seed, sizes, start_batch))
        logits, target = predictions.logits.split(sizes), predictions.target.split(sizes)
        for number, one in enumerate(part):
            own = slice(number, None, len(part))
            scores[one.modality, one.corruption, one.severity] = score_name(
                model, torch.cat(logits[own]), torch.cat(target[own]), who, metric
            )
    if not scores:
        raise ConfigError(
            who, expected=f"corruptions that fit an input of the model, some of {', '.join(CORRUPTIONS)}",
            got=", ".join(corruptions or ()) or "no modality",
        )  # fmt: skip
    return Robustness(score, _alone(model, batches(), names, metric), scores, names)


def _alone(model: nn.Module, batches: Batches, names: tuple[str, ...], metric: str | Metric | None) -> dict[str, float]:
    """Score of each modality, with all others masked; empty for models that cannot be ablated."""
    if len(names) < 2 or not (hasattr(model, "encode") and hasattr(model, "fuse")):
        return {}
    predictions = ablated_logits(model, batches, [[other for other in names if other != name] for name in names])
    return {
        name: score_name(model, part, predictions.target, "robustness", metric)
        for name, part in zip(names, predictions.logits.unbind(dim=1), strict=True)
    }


class _Damage(NamedTuple):
    """A corruption of one modality at one severity; kind and (mean, std) of its input."""

    modality: str
    corruption: str
    severity: int
    kind: InputKind
    statistics: tuple[float, float]


def _damaged(
    batches: Batches, damages: Sequence[_Damage], seed: int, sizes: list[int], start_batch: Callable[[], None]
) -> Iterator[Mapping[str, Any]]:
    """Yields each batch once for each damage, and appends the number of samples of each to ``sizes``."""
    for number, batch in enumerate(batches):
        start_batch()
        for one in damages:
            damaged = corrupt_batch(
                batch, one.modality, one.corruption, severity=one.severity, kind=one.kind, statistics=one.statistics,
                seed=seed * 1_000_003 + number,
            )  # fmt: skip
            sizes.append(len(damaged[one.modality]))
            yield damaged


@contextlib.contextmanager
def _reused_encodings(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Context manager: an encoder that gets the same tensor again, and nothing else, returns its last output.

    Yields a function that clears these outputs, to be called before each batch: a loader may fill the same tensors.
    """
    encoders = getattr(model, "encoders", None)
    chosen = dict.fromkeys(encoders.values()) if isinstance(encoders, nn.ModuleDict) else {}
    replaced = {encoder: vars(encoder).get("forward") for encoder in chosen}
    outputs: list[list[Any]] = []
    for encoder in replaced:
        outputs.append([])
        encoder.forward = _last_output_again(encoder.forward, outputs[-1])

    def start_batch() -> None:
        for last in outputs:
            last.clear()

    try:
        yield start_batch
    finally:
        for encoder, forward in replaced.items():
            del encoder.forward
            if forward is not None:
                encoder.forward = forward


def _last_output_again(forward: Callable[..., Any], last: list[Any]) -> Callable[..., Any]:
    """Wraps ``forward``; ``last`` holds its last input and output, or nothing."""

    @functools.wraps(forward)
    def call(values: Any, **options: Any) -> Any:
        if options:
            return forward(values, **options)
        if not last or last[0] is not values:
            last[:] = values, forward(values)
        return last[1]

    return call


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
