"""How far apart the keys of two modalities lie, seen from the query, and what noise does to them (spec 2.8, 8.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, unknown_name
from ..optional_packages import require_extra
from .key_plot_data import key_distribution
from .noise_test import Loader, input_statistics
from .prediction_collection import NoiseSource, collect_predictions


@dataclass(frozen=True)
class KeyGap:
    """How far the cosines of two modalities lie apart.

    Attributes:
        first, second: the modalities.
        wasserstein: how far, on average, a cosine of one must move to make both distributions the same, in [0, 2].
        overlap: part of the histograms that they have in common, in [0, 1].
    """

    first: str
    second: str
    wasserstein: float | None
    overlap: float | None


@dataclass(frozen=True)
class KeyGeometry:
    """How the keys of each modality lie to the query; None where no sample has what is asked for.

    Attributes:
        distribution: name -> what ``key_distribution`` gives: histogram of the cosines, mean and standard deviation of
            cosine and key length.
        air: name -> AIR_m, the mean cosine less the mean of the other modalities' mean cosines.
        range: largest less smallest mean cosine; RollingQ rotates where it reaches beta.
        gaps: of every two modalities.
        replaced: the modality that noise replaced.
        shift: name -> mean cosine with noise less mean cosine without; empty without ``replaced``.
    """

    distribution: dict[str, dict[str, Any]]
    air: dict[str, float | None]
    range: float | None
    gaps: tuple[KeyGap, ...]
    replaced: str | None = None
    shift: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same, JSON-able."""
        modalities = {
            name: {**own, "air": self.air[name], "shift": self.shift.get(name)}
            for name, own in self.distribution.items()
        }
        gaps = [asdict(gap) for gap in self.gaps]
        return {"modalities": modalities, "range": self.range, "gaps": gaps, "replaced": self.replaced}


def wasserstein(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> float:
    """1-D Wasserstein distance: the area between the two cumulative distributions.

    NaN among the values are left out; NaN where nothing is left.

    Example:
        >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.5]))
        1.0
    """
    with require_extra("key_geometry"):
        from scipy.stats import wasserstein_distance

    kept = [values[~values.isnan()].detach().cpu().double().numpy() for values in (a.flatten(), b.flatten())]
    return float(wasserstein_distance(*kept)) if all(len(values) for values in kept) else math.nan


def overlap(hist_a: Sequence[float] | Tensor, hist_b: Sequence[float] | Tensor) -> float:
    """Overlap coefficient of two histograms over the same bins: sum_i min(a_i / sum(a), b_i / sum(b)).

    1 for the same distribution, 0 for none in common; NaN where one is empty. It falls with finer bins and fewer
    samples, so compare figures of one size alone.

    Raises:
        ShapeError: histograms that differ in their bins.

    Example:
        >>> overlap([2, 2, 0], [0, 1, 3])
        0.25
    """
    a, b = (torch.as_tensor(counts, dtype=torch.float64) for counts in (hist_a, hist_b))
    if a.ndim != 1 or a.shape != b.shape:
        raise ShapeError(
            "overlap", expected="two histograms over the same bins", got=f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    return float(torch.minimum(a / a.sum(), b / b.sum()).sum())


def imbalance(means: Mapping[str, float | None]) -> dict[str, float | None]:
    """AIR_m = c_m - mean of c_n over the other modalities; None are left out, and None where there is no other.

    They sum to 0; for two modalities AIR_1 = -AIR_2 is the paper's AIR.

    Reference: RollingQ (ICML 2025), eq. 9; spec 2.8.

    Example:
        >>> imbalance({"audio": 0.5, "image": 0.25, "text": None})
        {'audio': 0.25, 'image': -0.25, 'text': None}
    """
    found: dict[str, float | None] = {}
    for name, own in means.items():
        others = [mean for other, mean in means.items() if other != name and mean is not None]
        found[name] = own - sum(others) / len(others) if own is not None and others else None
    return found


def key_geometry(
    model: nn.Module,
    loader: Loader | Callable[[], Loader],
    *,
    replaced: str | None = None,
    noise: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
) -> KeyGeometry:
    """Where the mean key of each modality lies to the query, in every sample: angle, length, gaps, shift by noise.

    A softmax prefers the modality whose keys lie closer to the query, whatever they say. Modalities whose cosines do
    not overlap are told apart by where they lie alone; if noise in place of one leaves its mean cosine where it was,
    the query does not tell its content from noise, as far as the mean key shows.

    Args:
        model: a FusionModel with attention.
        loader: batches, dicts with every modality; with ``replaced`` they are gone through again, in the same order.
        replaced: modality that noise replaces in a second pass.
        noise: name -> (mean, std) of the noise; by default those of the loader's own inputs.
        seed: of the noise.

    Returns:
        KeyGeometry over all samples and heads alike; samples that lack a modality do not count for it.

    Raises:
        ConfigError: a model without attention or without names, an unknown modality. ShapeError: no batch, batches that
            are no dicts, or lack the modality that is replaced.

    Cosine and length of a mean key say nothing of single keys: one key close to the query may get all attention while
    the mean points away. Read it beside the share.

    Reference: RollingQ (ICML 2025), Figures 1d, 2, 5 and 6; spec 2.8 and 8.2.
    Differs from the paper in: the figures are given as numbers, for any number of modalities.
    """
    batches: Callable[[], Loader] = loader if callable(loader) else lambda: loader  # type: ignore[assignment]
    clean = collect_predictions(model, batches())
    if clean.cosine is None:
        fix = "Static fusions have no keys; compare accuracies under noise instead."
        raise ConfigError(
            "key_geometry", expected="a model with attention over its modalities", got="a static fusion", fix=fix
        )
    found = key_distribution(clean)
    means = {name: own["cosine_mean"] for name, own in found.items()}
    there = [mean for mean in means.values() if mean is not None]
    cosines = dict(zip(clean.names, clean.cosine.clamp(-1.0, 1.0).unbind(dim=-1), strict=True))
    gaps = []
    for first, second in combinations(clean.names, 2):
        common = overlap(*(found[name]["cosine"]["counts"] for name in (first, second)))
        gaps.append(KeyGap(first, second, _known(wasserstein(cosines[first], cosines[second])), _known(common)))
    shift: dict[str, float | None] = {}
    if replaced is not None:
        if replaced not in clean.names:
            raise unknown_name("key_geometry", "modality", replaced, clean.names)
        if noise and replaced not in noise:
            raise unknown_name("key_geometry", "entry of noise", replaced, noise)
        mean, std = noise[replaced] if noise else input_statistics(batches(), replaced, who="key_geometry")
        after = key_distribution(collect_predictions(model, batches(), noise=NoiseSource(replaced, mean, std, seed)))
        shift = {name: _difference(after[name]["cosine_mean"], means[name]) for name in means}
    return KeyGeometry(
        found, imbalance(means), max(there) - min(there) if there else None, tuple(gaps), replaced, shift
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
