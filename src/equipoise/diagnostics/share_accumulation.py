"""Table of attention shares by layer and head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..errors import ShapeError
from .share_spread_test import checked_share, deviation


def share_statistics(
    share: Float[Tensor, "*layer sample head modality"] | Mapping[str, Float[Tensor, "sample head modality"]],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Computes mean, standard deviation, minimum and maximum over samples of the attention shares of each head.

    Args:
        share: (sample, head, modality), (layer, sample, head, modality), or layer name -> (sample, head,
            modality), with a number of heads that may differ between layers. NaN marks samples without the modality,
            which are excluded.
        names: of the modalities, in the order of the last dimension.

    Returns:
        Rows {"layer", "head", "modality", "samples", "mean", "std", "min", "max"}, JSON-able: "layer" is its index or
        name, "samples" the number of samples with the modality, "std" the population standard deviation. Values are
        None without any sample.

    Raises:
        ShapeError: no sample, another shape, or a number of names that differs from the modalities.

    A mean share is the amount of attention, not evidence that the prediction depends on it.

    Example:
        >>> import torch
        >>> rows = share_statistics(torch.tensor([[[0.25, 0.75]], [[0.75, 0.25]]]), ("audio", "image"))
        >>> [rows[0][key] for key in ("layer", "head", "modality", "samples", "mean", "std", "min", "max")]
        [0, 0, 'audio', 2, 0.5, 0.25, 0.25, 0.75]
    """
    if isinstance(share, Mapping):
        layers: list[tuple[Any, Tensor]] = list(share.items())
    else:
        layers = list(enumerate(share if share.ndim == 4 else [share]))
    return [row for layer, part in layers for row in _rows(layer, part, names)]


def _rows(layer: Any, share: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    share = checked_share(share, "share_statistics")
    if share.shape[-1] != len(names):
        raise ShapeError(
            "share_statistics names",
            expected=f"one name for each modality = {share.shape[-1]}",
            got=f"{len(names)}: {', '.join(names)}",
        )
    absent = share.isnan()
    parts = {
        "samples": (~absent).sum(dim=0),
        "mean": share.nanmean(dim=0),
        "std": deviation(share),
        "min": share.masked_fill(absent, math.inf).amin(dim=0),
        "max": share.masked_fill(absent, -math.inf).amax(dim=0),
    }
    lists = {key: part.tolist() for key, part in parts.items()}
    rows = []
    for head in range(share.shape[1]):
        for column, name in enumerate(names):
            values = {key: part[head][column] for key, part in lists.items()}
            if not values["samples"]:
                values = dict.fromkeys(values) | {"samples": 0}
            rows.append({"layer": layer, "head": head, "modality": name, **values})
    return rows
