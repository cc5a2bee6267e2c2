"""Metrics of matching maps: matching, transfer to an untrained pair, consistency, classification accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...consistency import consistency_score, cycle_error, supermatrix, synchronize
from ...diagnostics.task_scores import correct
from ...errors import DataError, NonFiniteError
from .item_maps import composed_maps
from .modality_pairs import Pair, unordered_pairs


class SampledItemSets(NamedTuple):
    """Maps and ground truth of a batch of scenes.

    Attributes:
        maps: ordered pair -> (batch, item, item).
        match_index: ordered pair -> (batch, item) index of each item's match.
        has_match: ordered pair -> (batch, item) True if item and match are both present.
        complete: (batch,) True for scenes without missing items.
        class_correct: name -> (n,) probability that an item is classified correctly (fractional for ties).
    """

    maps: dict[Pair, Tensor]
    match_index: dict[Pair, Int[Tensor, "batch item"]]
    has_match: dict[Pair, Bool[Tensor, "batch item"]]
    complete: Bool[Tensor, " batch"]
    class_correct: dict[str, Float[Tensor, " n"]]


def evaluate_matching(
    batches: Iterable[SampledItemSets], names: Sequence[str], trained: Sequence[Pair], transfer: Pair
) -> dict[str, float]:
    """Computes the metrics of matching maps; all are fractions of the items that have a match.

    * ``matching/a-b``: items whose match has the largest entry in their row, mean of both directions; if n entries
      share the maximum, including the match, the item counts 1 / n. ``matching``: mean over the trained pairs.
    * ``transfer``: matching of the untrained pair; ``transfer_composed`` through the third modality, P_ik P_kj;
      ``transfer_synchronized`` after ``synchronize`` has made all maps consistent permutations.
    * ``chance``: expected value of random guessing.
    * ``consistency``, ``cycle_error``: of the supermatrix of all maps, see `equipoise.consistency`.
    * ``accuracy``, ``accuracy/a``: items that are classified correctly.

    Raises:
        DataError: every scene has missing items. NonFiniteError: NaN in a map.
    """
    values_by_metric: dict[Any, list[Tensor]] = defaultdict(list)
    items = 1
    for scenes in batches:
        for pair, values in scenes.maps.items():
            values_by_metric["matching", *sorted(pair, key=names.index)].append(_correct(scenes, pair, values))
        complete = {pair: values[scenes.complete] for pair, values in scenes.maps.items()}
        matrix = supermatrix(complete, names=names)
        synchronized = synchronize(matrix, num_modalities=len(names))
        items = matrix.shape[-1] // len(names)
        for pair in (transfer, (transfer[1], transfer[0])):
            values_by_metric["transfer_composed"].append(_correct(scenes, pair, composed_maps(scenes.maps, *pair)))
            rows, columns = (slice(items * names.index(n), items * (names.index(n) + 1)) for n in pair)
            values_by_metric["transfer_synchronized"].append(
                _correct(scenes, pair, synchronized[:, rows, columns], scenes.complete)
            )
        values_by_metric["consistency"].append(consistency_score(matrix, num_modalities=len(names)))
        values_by_metric["cycle_error"].append(cycle_error(matrix, num_modalities=len(names)))
        for name, class_correct in scenes.class_correct.items():
            values_by_metric["accuracy", name].append(class_correct)
    if not sum(len(values) for values in values_by_metric["consistency"]):
        raise DataError("evaluate", expected="a scene without missing items", got="none")
    rates = {key: float(torch.cat(values).float().mean()) for key, values in values_by_metric.items()}
    return {**_metric_names(rates, names, trained, transfer), "chance": 1 / items}


def _metric_names(
    rates: dict[Any, float], names: Sequence[str], trained: Sequence[Pair], transfer: Pair
) -> dict[str, float]:
    """Renames the rates to the names of the metrics."""
    accuracies = [rates["accuracy", name] for name in names]
    return {
        "transfer": rates["matching", *transfer],
        **{name: rates[name] for name in ("transfer_composed", "transfer_synchronized")},
        "matching": sum(rates["matching", *pair] for pair in trained) / len(trained),
        "accuracy": sum(accuracies) / len(accuracies),
        **{name: rates[name] for name in ("consistency", "cycle_error")},
        **{f"matching/{one}-{other}": rates["matching", one, other] for one, other in unordered_pairs(names)},
        **{f"accuracy/{name}": rate for name, rate in zip(names, accuracies, strict=True)},
    }


def _correct(
    scenes: SampledItemSets,
    pair: Pair,
    values: Float[Tensor, "scene row column"],
    subset: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " item"]:
    """Probability that the largest entry of a row, ties broken at random, is the match, for items with a match.

    If ``subset`` is given, ``values`` holds only the scenes where it is True.
    """
    match_index, has_match = scenes.match_index[pair], scenes.has_match[pair]
    if subset is not None:
        match_index, has_match = match_index[subset], has_match[subset]
    result = correct(values, match_index)[has_match]
    if bool(result.isnan().any()):
        raise NonFiniteError(
            "evaluate", expected=f"a map from {pair[0]} to {pair[1]} without NaN",
            got=f"NaN for {int(result.isnan().sum())} items", fix="Check the inputs for NaN, then the weights.",
        )  # fmt: skip
    return result
