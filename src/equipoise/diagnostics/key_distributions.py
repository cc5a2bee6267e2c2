"""Query–key geometry: cosines of the query with the mean key of each modality, their gaps, and the effect of noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, require_extra, unknown_name
from .key_plot_data import key_distribution
from .noise_test import Loader, input_statistics
from .prediction_collection import CollectedPredictions, NoiseSource, collect_predictions


@dataclass(frozen=True)
class KeyGap:
    """Distance between the cosine distributions of two modalities.

    Attributes:
        first, second: names of the modalities.
        wasserstein: Wasserstein distance of the distributions, in [0, 2].
        overlap: overlap coefficient of the histograms, in [0, 1].
    """

    first: str
    second: str
    wasserstein: float | None
    overlap: float | None


@dataclass(frozen=True)
class KeyGeometry:
    """Query–key geometry of each modality; values are None without any sample.

    Attributes:
        distribution: name -> result of ``key_distribution``: histogram of the cosines, mean and standard deviation of
            cosine and key norm.
        air: name -> AIR_m, the mean cosine minus the average of the mean cosines of the other modalities.
        range: largest minus smallest mean cosine; RollingQ rotates when it reaches beta.
        gaps: one for each pair of modalities.
        replaced: the modality that was replaced by noise.
        shift: name -> mean cosine with noise minus without; empty without ``replaced``.
    """

    distribution: dict[str, dict[str, Any]]
    air: dict[str, float | None]
    range: float | None
    gaps: tuple[KeyGap, ...]
    replaced: str | None = None
    shift: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the values in JSON-able form."""
        modalities = {
            name: {**statistics, "air": self.air[name], "shift": self.shift.get(name)}
            for name, statistics in self.distribution.items()
        }
        gaps = [asdict(gap) for gap in self.gaps]
        return {"modalities": modalities, "range": self.range, "gaps": gaps, "replaced": self.replaced}


def wasserstein(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> float:
    """1-D Wasserstein distance: the area between the two cumulative distributions.

    NaN values are excluded; the result is NaN if no value remains.

    Example:
        >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.5]))
        1.0
    """
    with require_extra("key_geometry"):
        from scipy.stats import wasserstein_distance

    samples = [values[~values.isnan()].detach().cpu().double().numpy() for values in (a.flatten(), b.flatten())]
    return float(wasserstein_distance(*samples)) if all(len(values) for values in samples) else math.nan


def overlap(hist_a: Sequence[float] | Tensor, hist_b: Sequence[float] | Tensor) -> float:
    """Overlap coefficient of two histograms over the same bins: sum_i min(a_i / sum(a), b_i / sum(b)).

    1 for equal distributions, 0 for disjoint ones; NaN if one is empty. It decreases with finer bins and fewer samples,
    so compare only values with the same number of both.

    Raises:
        ShapeError: the histograms have different bins.

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
    """Computes AIR_m = c_m - mean of c_n over the other modalities; None is ignored, and the result without others.

    The values sum to 0; for two modalities AIR_1 = -AIR_2 is the AIR of the paper.

    Reference: RollingQ (ICML 2025), eq. 9.

    Example:
        >>> imbalance({"audio": 0.5, "image": 0.25, "text": None})
        {'audio': 0.25, 'image': -0.25, 'text': None}
    """
    rates: dict[str, float | None] = {}
    for name, mean in means.items():
        others = [mean for other, mean in means.items() if other != name and mean is not None]
        rates[name] = mean - sum(others) / len(others) if mean is not None and others else None
    return rates


def key_geometry(
    model: nn.Module,
    loader: Loader | Callable[[], Loader],
    *,
    replaced: str | None = None,
    noise: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
) -> KeyGeometry:
    """Measures angle and norm of the mean key of each modality relative to the query, their gaps and effects of noise.

    A modality whose keys have a larger cosine with the query receives more attention regardless of its content. If the
    cosines of two modalities do not overlap, the query separates them by position alone; if noise does not change the
    mean cosine of a modality, the query does not distinguish its content from noise, as measured by the mean key.

    Args:
        model: a FusionModel with attention.
        loader: batches, dicts with every modality; iterated a second time in the same order if ``replaced`` is given.
        replaced: modality to replace by noise in a second pass.
        noise: name -> (mean, std) of the noise; by default those of the inputs of the loader.
        seed: of the noise.

    Returns:
        KeyGeometry over all samples and heads; samples without a modality are excluded for it.

    Raises:
        ConfigError: a model without attention or without names, an unknown modality. ShapeError: no batch, or a batch
            that is not a dict or lacks the replaced modality.

    The mean key does not describe single keys: one key close to the query may receive all attention although the mean
    key is far from it. Compare with the attention share.

    Reference: RollingQ (ICML 2025), Figures 1d, 2, 5 and 6.
    Differs from the paper in: the plots are summarized as numbers, for any number of modalities.
    """
    batches: Callable[[], Loader] = loader if callable(loader) else lambda: loader  # type: ignore[assignment]
    clean = collect_predictions(model, batches())
    if replaced is None or clean.cosine is None:
        return geometry_of(clean)
    if replaced not in clean.names:
        raise unknown_name("key_geometry", "modality", replaced, clean.names)
    if noise and replaced not in noise:
        raise unknown_name("key_geometry", "entry of noise", replaced, noise)
    mean, std = noise[replaced] if noise else input_statistics(batches(), replaced, who="key_geometry")
    source = NoiseSource(replaced, mean, std, seed)
    return geometry_of(clean, collect_predictions(model, batches(), noise=source), replaced)


def geometry_of(
    clean: CollectedPredictions, noisy: CollectedPredictions | None = None, replaced: str | None = None
) -> KeyGeometry:
    """Computes ``key_geometry`` from collected predictions, without and with noise in a modality."""
    if clean.cosine is None:
        fix = "Static fusions have no keys; compare the scores under noise instead."
        raise ConfigError(
            "key_geometry", expected="a model with attention over its modalities", got="a static fusion", fix=fix
        )
    distribution = key_distribution(clean)
    means = {name: statistics["cosine_mean"] for name, statistics in distribution.items()}
    defined = [mean for mean in means.values() if mean is not None]
    cosines = dict(zip(clean.names, clean.cosine.clamp(-1.0, 1.0).unbind(dim=-1), strict=True))
    gaps = []
    for first, second in combinations(clean.names, 2):
        common = overlap(*(distribution[name]["cosine"]["counts"] for name in (first, second)))
        gaps.append(KeyGap(first, second, _finite(wasserstein(cosines[first], cosines[second])), _finite(common)))
    shift: dict[str, float | None] = {}
    if noisy is not None:
        after = key_distribution(noisy)
        shift = {name: _difference(after[name]["cosine_mean"], means[name]) for name in means}
    return KeyGeometry(
        distribution, imbalance(means), max(defined) - min(defined) if defined else None, tuple(gaps), replaced, shift
    )


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
