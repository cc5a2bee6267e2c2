"""How good maps are on a split: matching, transfer to a pair that was never trained, agreement, accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..consistency import consistency_score, cycle_error, synchronize
from .maps import Pair, composed
from .pairs import unordered

if TYPE_CHECKING:
    from .correspondence import Correspondence

BATCH = 256


def judged(model: Correspondence, source: Any, split: str) -> dict[str, float]:
    """Figures of a model in evaluation mode, all of them fractions; of items that have a partner.

    * ``matching/a-b``: items whose largest entry in the map is their partner's, mean of both ways.
    * ``transfer``: the same of the pair that is judged as never trained; ``transfer_composed`` by way of the third
      modality, P_ik P_kj; ``transfer_synchronized`` after ``synchronize`` has made all maps agree.
    * ``chance``: what guessing gets.
    * ``consistency``, ``cycle_error``: of the maps together, see spec 6.3.
    * ``accuracy``, ``accuracy/a``: items whose class the probe tells.
    """
    seen: dict[Any, list[Tensor]] = {}

    def note(key: Any, values: Tensor) -> None:
        seen.setdefault(key, []).append(values.float().cpu())

    a, b = model.transfer
    for batch in source.batches(split, BATCH, seed=0, epoch=0, train=False):
        found, target = model(batch), batch["target"]
        for pair in found.maps:
            note(("matching", *_sorted(pair, model)), _right(model, found, target, pair, found.maps[pair]))
        for pair in ((a, b), (b, a)):
            note("transfer_composed", _right(model, found, target, pair, composed(found.maps, *pair)))
        matrix = model.supermatrix(found)
        note("consistency", consistency_score(matrix, num_modalities=len(model.names)))
        note("cycle_error", cycle_error(matrix, num_modalities=len(model.names)))
        agreed = _blocks(synchronize(matrix, num_modalities=len(model.names)), model)
        for pair in ((a, b), (b, a)):
            note("transfer_synchronized", _right(model, found, target, pair, agreed[pair]))
        for name, logits in model.probed(found).items():
            right = logits.argmax(dim=-1) == target[:, model.names.index(name)]
            note(("accuracy", name), right[found.present[name]])
        items = target.shape[-1]
    rates = {key: float(torch.cat(values).mean()) for key, values in seen.items()}
    pairs = unordered(model.names)
    return {
        "transfer": rates["matching", a, b],
        **{name: rates[name] for name in ("transfer_composed", "transfer_synchronized")},
        "chance": 1 / items,
        **{f"matching/{one}-{other}": rates["matching", one, other] for one, other in pairs},
        "matching": sum(rates["matching", *pair] for pair in model.pairs) / len(model.pairs),
        **{name: rates[name] for name in ("consistency", "cycle_error")},
        "accuracy": sum(rates["accuracy", name] for name in model.names) / len(model.names),
        **{f"accuracy/{name}": rates["accuracy", name] for name in model.names},
    }


def _right(model, found, target, pair: Pair, values: Tensor) -> Tensor:
    place, has = model.partners(found, target, *pair)
    return (values.argmax(dim=-1) == place)[has]


def _blocks(matrix: Tensor, model) -> dict[Pair, Tensor]:
    size = matrix.shape[-1] // len(model.names)
    rows = [row.split(size, dim=-1) for row in matrix.split(size, dim=-2)]
    return {(one, other): rows[i][j] for i, one in enumerate(model.names) for j, other in enumerate(model.names)}


def _sorted(pair: Pair, model) -> Pair:
    first, second = sorted(pair, key=model.names.index)
    return first, second
