"""Score and attention under increasing corruption of one modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, unknown_name
from ..results.task_metrics import Metric
from .input_corruption import Kind, check_corruption, corrupt
from .noise_test import input_statistics
from .prediction_collection import collect_predictions, input_of, is_ids, named_batches, permute_ids, valid_of
from .task_scores import score_name

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class CorruptionCurve:
    """The score at each level of corruption.

    Attributes:
        modality: the corrupted modality.
        kind: of the corruption.
        levels: from 0 to 1.
        accuracy: score at each level: accuracy, or minus the mean absolute error of a regression, or ``metric``.
        drop: score without corruption minus the score at each level.
        area: mean score over the levels; higher is more robust.
        share: mean attention to the corrupted modality at each level; None for a model without attention.
    """

    modality: str
    kind: Kind
    levels: tuple[float, ...]
    accuracy: tuple[float, ...]
    drop: tuple[float, ...]
    area: float
    share: tuple[float, ...] | None


def corruption_curve(
    model: nn.Module,
    loader: Batches | Callable[[], Batches],
    *,
    modality: str,
    kind: Kind = "additive",
    levels: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    seed: int = 0,
    std: float | None = None,
    metric: str | Metric | None = None,
) -> CorruptionCurve:
    """Corrupts the inputs of one modality at increasing levels at test time and measures the score.

    The score of a robust model decreases to that of the other modalities, and its attention moves away from the
    corrupted one. All levels use the same random numbers, so the curve is smoother than the uncertainty of its points;
    use several seeds to estimate it.

    Args:
        model: a FusionModel.
        loader: batches, dicts with every modality and targets, that can be iterated several times in the same order.
        modality: the modality to corrupt.
        kind: of the corruption, see ``corrupt``; word ids are replaced by others of the batch with probability level.
        levels: from 0 to 1; level 0 returns the inputs unchanged, bit for bit.
        seed: of the noise, which depends only on the seed and the index of the batch.
        std: standard deviation that scales the noise of ``additive``, ``mix`` and ``prob``; by default that of the
            inputs of the loader.
        metric: name of a metric of ``equipoise.results`` that replaces the score of the task.

    Returns:
        CorruptionCurve.

    Raises:
        ConfigError: an unknown modality or kind, no level, a level outside [0, 1], or a model without task. ShapeError:
            no batch, no targets, or a batch without the modality. NonFiniteError: a prediction is NaN.

    Reference: RollingQ (ICML 2025), Table 3.
    Differs from the paper in: the paper says "Gaussian, following MultiBench", which defines two other kinds; all are
    available, and the default is additive Gaussian noise.
    """
    names = tuple(getattr(model, "names", ()))
    if names and modality not in names:
        raise unknown_name("corruption_curve", "modality", modality, names)
    if not levels:
        raise ConfigError("corruption_curve", expected="one or more levels", got="none")
    for level in levels:
        check_corruption(kind, level, "corruption_curve")
    make_loader: Callable[[], Batches] = loader if callable(loader) else lambda: loader  # type: ignore[assignment]

    def batches() -> Batches:
        return named_batches(model, make_loader())

    if std is None and not kind.startswith("multibench"):
        std = input_statistics(
            _corrupted_batches(batches(), modality, 0.0, kind, seed, 1.0), modality, who="corruption_curve"
        )[1]
    results = {}
    for level in dict.fromkeys((0.0, *levels)):
        predictions = collect_predictions(
            model, _corrupted_batches(batches(), modality, level, kind, seed, 1.0 if std is None else std)
        )
        score = score_name(model, predictions.logits, predictions.target, "corruption_curve", metric)
        results[level] = (
            score,
            None if predictions.share is None else float(predictions.share[..., names.index(modality)].mean()),
        )
    scores = tuple(results[level][0] for level in levels)
    shares = tuple(results[level][1] for level in levels)
    return CorruptionCurve(
        modality=modality,
        kind=kind,
        levels=tuple(float(level) for level in levels),
        accuracy=scores,
        drop=tuple(results[0.0][0] - score for score in scores),
        area=sum(scores) / len(scores),
        share=None if None in shares else shares,  # type: ignore[arg-type]
    )


def _corrupted_batches(
    batches: Batches, modality: str, level: float, kind: Kind, seed: int, std: float
) -> Iterator[Mapping[str, Any]]:
    for number, batch in enumerate(batches):
        values = input_of(batch, modality, "corruption_curve")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        if is_ids(values):
            # A fraction of the words is replaced by other words of the batch, whatever the kind.
            other = permute_ids(values, generator, valid=valid_of(batch, modality, values))
            chosen = torch.rand(values.shape, generator=generator) < level
            yield {**batch, modality: torch.where(chosen.to(values.device), other, values)}
        else:
            yield {**batch, modality: corrupt(values, level, kind, generator, std)}
