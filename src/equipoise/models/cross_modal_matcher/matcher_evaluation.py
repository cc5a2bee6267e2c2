"""How good maps are: matching, transfer to a pair that was never trained, agreement, accuracy."""

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
    """What is judged of a batch.

    Attributes:
        maps: ordered pair -> (batch, item, item).
        place: ordered pair -> (batch, item) where each item's partner stands.
        has: ordered pair -> (batch, item) whether item and partner are there.
        whole: (batch,) scenes that lack nothing.
        told: name -> (some,) the probability that an item's class is told right.
    """

    maps: dict[Pair, Tensor]
    place: dict[Pair, Int[Tensor, "batch item"]]
    has: dict[Pair, Bool[Tensor, "batch item"]]
    whole: Bool[Tensor, " batch"]
    told: dict[str, Float[Tensor, " some"]]


def evaluate_matching(
    batches: Iterable[SampledItemSets], names: Sequence[str], trained: Sequence[Pair], transfer: Pair
) -> dict[str, float]:
    """Figures of maps, all of them fractions, of items that have a partner.

    * ``matching/a-b``: items whose largest entry in the map is their partner's, mean of both ways; where n entries
      share the maximum, the partner's among them, 1 / n. ``matching``: the mean over the trained pairs.
    * ``transfer``: the same of the pair that is judged as never trained; ``transfer_composed`` by way of the third
      modality, P_ik P_kj; ``transfer_synchronized`` after ``synchronize`` has made all maps one-to-one and agree.
    * ``chance``: what guessing gets.
    * ``consistency``, ``cycle_error``: of all maps together, see spec 6.3.
    * ``accuracy``, ``accuracy/a``: items whose class is told right.

    Raises:
        DataError: no scene in which nothing is missing. NonFiniteError: NaN in a map.
    """
    seen: dict[Any, list[Tensor]] = defaultdict(list)
    items = 1
    for scenes in batches:
        for pair, values in scenes.maps.items():
            seen["matching", *sorted(pair, key=names.index)].append(_right(scenes, pair, values))
        whole = {pair: values[scenes.whole] for pair, values in scenes.maps.items()}
        matrix = supermatrix(whole, names=names)
        agreed = synchronize(matrix, num_modalities=len(names))
        items = matrix.shape[-1] // len(names)
        for pair in (transfer, (transfer[1], transfer[0])):
            seen["transfer_composed"].append(_right(scenes, pair, composed_maps(scenes.maps, *pair)))
            rows, columns = (slice(items * names.index(n), items * (names.index(n) + 1)) for n in pair)
            seen["transfer_synchronized"].append(_right(scenes, pair, agreed[:, rows, columns], scenes.whole))
        seen["consistency"].append(consistency_score(matrix, num_modalities=len(names)))
        seen["cycle_error"].append(cycle_error(matrix, num_modalities=len(names)))
        for name, right in scenes.told.items():
            seen["accuracy", name].append(right)
    if not sum(len(values) for values in seen["consistency"]):
        raise DataError("evaluate", expected="a scene without missing items", got="none")
    rates = {key: float(torch.cat(values).float().mean()) for key, values in seen.items()}
    return {**_named(rates, names, trained, transfer), "chance": 1 / items}


def _named(rates: dict[Any, float], names: Sequence[str], trained: Sequence[Pair], transfer: Pair) -> dict[str, float]:
    """The rates by the names of metrics."""
    told = [rates["accuracy", name] for name in names]
    return {
        "transfer": rates["matching", *transfer],
        **{name: rates[name] for name in ("transfer_composed", "transfer_synchronized")},
        "matching": sum(rates["matching", *pair] for pair in trained) / len(trained),
        "accuracy": sum(told) / len(told),
        **{name: rates[name] for name in ("consistency", "cycle_error")},
        **{f"matching/{one}-{other}": rates["matching", one, other] for one, other in unordered_pairs(names)},
        **{f"accuracy/{name}": rate for name, rate in zip(names, told, strict=True)},
    }


def _right(
    scenes: SampledItemSets,
    pair: Pair,
    values: Float[Tensor, "scene row column"],
    some: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " item"]:
    """For every item that has a partner, the probability that the largest entry of its row, drawn among equal ones, is
    the partner's; ``values`` are of ``some`` scenes alone."""
    place, has = scenes.place[pair], scenes.has[pair]
    if some is not None:
        place, has = place[some], has[some]
    right = correct(values, place)[has]
    if bool(right.isnan().any()):
        raise NonFiniteError(
            "evaluate", expected=f"a map from {pair[0]} to {pair[1]} without NaN",
            got=f"NaN for {int(right.isnan().sum())} items", fix="Look for NaN in the inputs, then in the weights.",
        )  # fmt: skip
    return right
