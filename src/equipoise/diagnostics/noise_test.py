"""Response of attention to noise: Pearson correlation of the replacement by noise and the attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, require_extra, unknown_name
from .prediction_collection import (
    CollectedPredictions,
    NoiseSource,
    collect_predictions,
    input_of,
    named_batches,
    valid_of,
)

Loader = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class NoiseResponse:
    """Response of attention to noise in one modality.

    Attributes:
        modality: the modality that was replaced.
        r: Pearson correlation of the replacement (0 or 1) with the attention to the *other* modalities, over clean and
            replaced samples together; positive if attention moves away from the noise. NaN if attention is constant.
        r_same: the opposite sign convention, with the attention to the replaced modality itself.
        p: two-sided p-value of r, 2n - 2 degrees of freedom.
        clean, noise: (sample,) attention to the other modalities without and with noise, mean over heads.
    """

    modality: str
    r: float
    r_same: float
    p: float
    clean: Float[Tensor, " sample"]
    noise: Float[Tensor, " sample"]


def pearson(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> tuple[float, float]:
    """Pearson correlation and its two-sided p-value with t = r sqrt((n - 2) / (1 - r^2)).

    NaN for fewer than three points, if a value is NaN, and for values that are constant up to rounding.

    Example:
        >>> r, p = pearson(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> round(r, 4), round(p, 4)
        (0.8944, 0.1056)
    """
    with require_extra("noise_response"):
        from scipy.stats import t as student

    if len(x) < 3 or any(_constant(values) for values in (x, y)):
        return math.nan, math.nan
    x, y = (v.double() - v.double().mean() for v in (x, y))
    scale = float(x.norm() * y.norm())
    if not math.isfinite(scale) or scale == 0:
        return math.nan, math.nan
    r = max(-1.0, min(1.0, float(x @ y) / scale))
    if abs(r) == 1.0:
        return r, 0.0
    t = r * math.sqrt((len(x) - 2) / (1 - r * r))
    return r, float(2 * student.sf(abs(t), len(x) - 2))


def _constant(values: Tensor) -> bool:
    """Whether the values are equal up to rounding; False if one is NaN."""
    eps = torch.finfo(values.dtype if values.is_floating_point() else torch.float64).eps
    return bool(values.max() - values.min() <= 8 * eps * values.abs().max())


def most_attended(predictions: CollectedPredictions) -> str:
    """The modality whose mean key has the largest average cosine with the class query.

    Without keys, the modality with the largest share.
    """
    ranked = predictions.share if predictions.cosine is None else predictions.cosine
    if ranked is None:
        raise ConfigError("most_attended", expected="a model with attention over its modalities", got="none")
    return predictions.names[int(ranked.nanmean(dim=(0, 1)).argmax())]


def response_from_shares(clean: CollectedPredictions, noisy: CollectedPredictions, modality: str) -> NoiseResponse:
    """Computes the response from two passes over the same samples; samples without the modality are excluded.

    Raises:
        ConfigError: the model has no attention.
    """
    if clean.share is None or noisy.share is None:
        raise _static(clean)
    column = clean.names.index(modality)
    has = slice(None) if clean.cosine is None else ~clean.cosine[..., column].isnan().any(dim=1)
    shares = [part.share[has].mean(dim=1) for part in (clean, noisy)]  # type: ignore[index]
    modality_shares = [share[:, column] for share in shares]
    # Sum the other columns instead of subtracting from 1, so that an exact 0 stays 0.
    rest = [index for index in range(len(clean.names)) if index != column]
    others = [share[:, rest].sum(dim=1) for share in shares]
    replaced = torch.cat([torch.zeros(len(modality_shares[0])), torch.ones(len(modality_shares[1]))])
    r, p = pearson(replaced, torch.cat(others))
    if math.isnan(r):
        warnings.warn(
            f"noise_response: the attention to modalities other than '{modality}' is constant; r is NaN.", stacklevel=3
        )
    return NoiseResponse(modality, r, pearson(replaced, torch.cat(modality_shares))[0], p, others[0], others[1])


def _static(clean: CollectedPredictions) -> ConfigError:
    if clean.missing:
        return ConfigError(
            "noise_response", expected="attention over several modalities", got=clean.missing,
            fix="Name the module with the attention: eq.adapt(fusion=...); compare the scores under noise instead.",
        )  # fmt: skip
    return ConfigError(
        "noise_response",
        expected="a model with attention over its modalities",
        got="a static fusion",
        fix="Static fusions use the same weights for all samples; compare the scores under noise instead.",
    )


def noise_response(
    model: nn.Module,
    loader: Loader | Callable[[], Loader],
    *,
    modality: str | None = None,
    noise: Mapping[str, tuple[float, float]] | Literal["sample"] = "sample",
    seed: int = 0,
) -> NoiseResponse:
    """Replaces a modality by Gaussian noise and measures whether attention moves away from it.

    z = 1 for the replaced copy of a sample, 0 for the clean one; s = attention to the other modalities;
    r = Pearson(z, s) over all 2n copies. Samples without the modality are excluded. r measures attention, not use, and
    should be reported together with the score under noise.

    Noise of the training statistics also differs from the samples in its level if the test data have another level than
    the training data. If r changes its sign with ``noise="sample"``, attention responds to the level of the input
    rather than to the loss of content. ``results.json`` has both: ``noise_attention_r`` with training statistics and
    ``noise_attention_r_own`` with the statistics of each sample.

    Args:
        model: a FusionModel with attention, or any other model after ``eq.adapt``.
        loader: batches, dicts with every modality, that can be iterated twice in the same order; targets are not
            needed.
        modality: the modality to replace; by default the one whose keys are closest to the query. Select it on
            validation data if results on test data are reported.
        noise: ``"sample"``: noise with the mean and standard deviation of the valid values of each sample, 0 and 1
            for samples with a single value; or name -> (mean, std) of the training inputs, as in ``Dataset.noise`` or
            computed by ``input_statistics``.
        seed: of the noise.

    Returns:
        NoiseResponse.

    Raises:
        ConfigError: a model without attention or without names, or an unknown modality. ShapeError: a batch that is not
            a dict or lacks the modality.

    Reference: RollingQ (ICML 2025), Table 2 and Figures 1c, 4d.
    Differs from the paper in: the paper specifies neither the attention that is correlated (both signs are returned)
    nor the statistics of its noise.
    """
    make_loader: Callable[[], Loader] = loader if callable(loader) else lambda: loader  # type: ignore[assignment]

    def batches() -> Loader:
        return named_batches(model, make_loader())

    clean = collect_predictions(model, batches())
    if clean.share is None:
        raise _static(clean)
    modality = modality or most_attended(clean)
    if modality not in clean.names:
        raise unknown_name("noise_response", "modality", modality, clean.names)
    if isinstance(noise, Mapping):
        if modality not in noise:
            raise unknown_name("noise_response", "entry of noise", modality, noise)
        drawn = NoiseSource(modality, *noise[modality], seed=seed)
    elif noise == "sample":
        drawn = NoiseSource(modality, seed=seed, distribution="per_sample")
    else:
        raise ConfigError(
            "noise_response", expected="noise = 'sample', or a dict: modality name -> (mean, std)", got=repr(noise),
            fix="For the training statistics pass noise=dataset.noise.",
        )  # fmt: skip
    return response_from_shares(
        clean, collect_predictions(model, _require_modality(batches(), modality), noise=drawn), modality
    )


def _require_modality(batches: Loader, modality: str) -> Iterator[Mapping[str, Any]]:
    for batch in batches:
        input_of(batch, modality, "noise_response")
        yield batch


def input_statistics(batches: Loader, modality: str, *, who: str) -> tuple[float, float]:
    """(mean, standard deviation) over all valid values of the inputs of a modality; ``who`` is used in errors."""
    count, total, squares = 0, 0.0, 0.0
    for batch in batches:
        values = input_of(batch, modality, who)
        values = values[valid_of(batch, modality, values).expand(values.shape)].cpu().double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
    mean = total / max(count, 1)
    return mean, math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))
