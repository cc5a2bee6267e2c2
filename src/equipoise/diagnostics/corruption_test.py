"""How the score falls as one modality is damaged by degrees, and whether attention follows (spec 8.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, unknown_name
from .input_corruption import Kind, check_corruption, corrupt
from .noise_test import input_statistics
from .prediction_collection import collect_predictions, input_of
from .task_scores import score_name

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class CorruptionCurve:
    """The score at every level of damage.

    Attributes:
        modality: the one that was damaged.
        kind: of the noise.
        levels: from 0 to 1.
        accuracy: score at each level: accuracy, or minus the mean absolute error of a regression.
        drop: score without damage minus the score at each level.
        area: mean score over the levels; higher is more robust.
        share: mean attention to the damaged modality at each level; None for a model without attention.
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
) -> CorruptionCurve:
    """Damages one modality's inputs more and more, at test time alone, and measures the score.

    A model that uses its modalities well falls to what the others say, and its attention leaves the damaged one. All
    levels have the same random numbers, so a curve is smoother than its points are sure; for its spread take several
    seeds.

    Args:
        model: a FusionModel.
        loader: batches, dicts with every modality and targets, that can be gone through several times and come in the
            same order.
        modality: the one that is damaged.
        kind: of the noise, see ``corrupt``.
        levels: how much; 0 leaves the inputs as they are, bit for bit.
        seed: of the noise; that of a batch hangs on the seed and the batch's number alone.
        std: deviation that ``additive``, ``mix`` and ``prob`` scale their noise with; by default that of the loader's
            own inputs.

    Returns:
        CorruptionCurve.

    Raises:
        ConfigError: an unknown modality or kind, no level or one outside [0, 1], a model without task. ShapeError: no
            batch, no targets, batches that lack the modality. NonFiniteError: answers that are NaN.

    Reference: RollingQ (ICML 2025), Table 3; spec 8.4.
    Differs from the paper in: it says "Gaussian, following MultiBench", which has two other models; all are here, and
    the default is the plain one.
    """
    names = tuple(getattr(model, "names", ()))
    if names and modality not in names:
        raise unknown_name("corruption_curve", "modality", modality, names)
    if not levels:
        raise ConfigError("corruption_curve", expected="one or more levels", got="none")
    for level in levels:
        check_corruption(kind, level, "corruption_curve")
    batches: Callable[[], Batches] = loader if callable(loader) else lambda: loader  # type: ignore[assignment]
    if std is None and not kind.startswith("multibench"):
        std = input_statistics(_damaged(batches(), modality, 0.0, kind, seed, 1.0), modality, who="corruption_curve")[1]
    found = {}
    for level in dict.fromkeys((0.0, *levels)):
        seen = collect_predictions(model, _damaged(batches(), modality, level, kind, seed, 1.0 if std is None else std))
        score = score_name(model, seen.logits, seen.target, "corruption_curve")
        found[level] = score, None if seen.share is None else float(seen.share[..., names.index(modality)].mean())
    scores = tuple(found[level][0] for level in levels)
    shares = tuple(found[level][1] for level in levels)
    return CorruptionCurve(
        modality=modality,
        kind=kind,
        levels=tuple(float(level) for level in levels),
        accuracy=scores,
        drop=tuple(found[0.0][0] - score for score in scores),
        area=sum(scores) / len(scores),
        share=None if None in shares else shares,  # type: ignore[arg-type]
    )


def _damaged(
    batches: Batches, modality: str, level: float, kind: Kind, seed: int, std: float
) -> Iterator[Mapping[str, Any]]:
    for number, batch in enumerate(batches):
        values = input_of(batch, modality, "corruption_curve")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        yield {**batch, modality: corrupt(values, level, kind, generator, std)}
