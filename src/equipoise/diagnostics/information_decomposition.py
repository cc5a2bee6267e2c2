"""Redundancy, uniqueness and synergy of two modalities, estimated from features and targets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, ShapeError, require_extra

Array = NDArray[np.float64]

PREDICTIONS = ""
"""Key of the predictions beside the modalities."""
LEAST = 20
"""Minimum number of samples that have all modalities."""
BINS = 4
"""Number of classes of equal size into which the target of a regression is divided."""
PROBE_WIDTH, DENSITY_WIDTH = 32, 8
"""Number of principal components for the probes, and for the densities."""
MOST = 5000
"""Maximum number of samples; of more, a random part is taken."""
COMPONENTS = 5
"""Maximum number of Gaussian components of a density, as in the released code."""


@dataclass(frozen=True)
class Interaction:
    """Decomposition of the information of two modalities on the target, in bits.

    Attributes:
        redundancy: information that each of both has.
        unique: (first, second) information that one has and the other has not.
        synergy: information that only both together have.
        bounds: the smallest and the largest redundancy that the information of each and of both allows. The
            decomposition depends on the measure of redundancy only as far as they differ.
    """

    redundancy: float
    unique: tuple[float, float]
    synergy: float
    bounds: tuple[float, float]

    @property
    def total(self) -> float:
        """Information of both together."""
        return self.redundancy + sum(self.unique) + self.synergy


@dataclass(frozen=True)
class InformationDecomposition:
    """Information of modalities on the target, in bits.

    Attributes:
        names: modalities.
        entropy: entropy of the target, the upper bound of all values.
        alone: name -> information of each modality.
        joint: information of all modalities together.
        pairs: (name, name) -> decomposition of two modalities.
        gain: ``joint`` minus the information of the best modality, what a fusion can add.
        gain_error: standard error of ``gain``.
        used: information in given predictions, by the same estimate; None without.
        unused_error: standard error of ``joint - used``; None without.
        samples: number of samples, which have all modalities; at most 5,000.
    """

    names: tuple[str, ...]
    entropy: float
    alone: dict[str, float]
    joint: float
    pairs: dict[tuple[str, str], Interaction]
    gain: float
    gain_error: float
    used: float | None
    unused_error: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as plain data, with pairs as ``"a+b"``."""
        pairs = {
            "+".join(pair): {
                "redundancy": part.redundancy, "unique": list(part.unique), "synergy": part.synergy,
                "bounds": list(part.bounds),
            }
            for pair, part in self.pairs.items()
        }  # fmt: skip
        return {**vars(self), "names": list(self.names), "pairs": pairs}

    def __str__(self) -> str:
        lines = [f"target {self.entropy:.2f} bits, all modalities {self.joint:.2f}"]
        lines += [f"{name} {value:.2f}" for name, value in self.alone.items()]
        for (one, other), part in self.pairs.items():
            lines.append(
                f"{one} and {other}: redundancy {part.redundancy:.2f}, unique {part.unique[0]:.2f} and "
                f"{part.unique[1]:.2f}, synergy {part.synergy:.2f}"
            )
        return "\n".join(lines + ([] if self.used is None else [f"used by the model {self.used:.2f}"]))


def pointwise_interaction(
    surprisals: tuple[Array, Array], information: tuple[Array, Array], joint: Array
) -> Interaction:
    """Returns the decomposition from pointwise values of two modalities, each (sample,) in bits.

    With h_m the surprisal of the features, i_m the pointwise information of modality m and i_12 that of both::

        r = min(h_1, h_2) - min(h_1 - i_1, h_2 - i_2),   u_m = i_m - r,   s = i_12 - r - u_1 - u_2

    and their means R, U_1, U_2 and S. R is then moved to the nearest value for which no mean is negative; U_1 + R,
    U_2 + R and the total do not change.

    Args:
        surprisals: (h_1, h_2).
        information: (i_1, i_2).
        joint: i_12.

    Example:
        >>> zero, one = np.zeros(2), np.ones(2)
        >>> pointwise_interaction((one, one), (zero, zero), one)
        Interaction(redundancy=0.0, unique=(0.0, 0.0), synergy=1.0, bounds=(0.0, 0.0))
    """
    (h_1, h_2), (i_1, i_2) = surprisals, information
    redundancy = float((np.minimum(h_1, h_2) - np.minimum(h_1 - i_1, h_2 - i_2)).mean())
    first, second, both = (float(part.mean()) for part in (i_1, i_2, joint))
    # R >= 0 and S = I_12 - I_1 - I_2 + R >= 0; R <= I_1 and R <= I_2.
    low, high = max(0.0, first + second - both), min(first, second)
    redundancy = min(max(redundancy, low), high)
    unique, synergy = (first - redundancy, second - redundancy), both - first - second + redundancy
    return Interaction(redundancy, unique, synergy, (low, high))


def decompose_information(
    features: Mapping[str, Tensor], target: Tensor, *, predictions: Tensor | None = None, folds: int = 5, seed: int = 0
) -> InformationDecomposition:
    """Estimates how much each modality, and each pair, tells about the target.

    The pointwise information log2 p(y | x) - log2 p(y) of a set of modalities is that of small networks (one hidden
    layer) on the principal components of its features, trained on the other folds. The networks of a set and of its
    subsets and the class frequencies are mixed with weights of maximum likelihood, so that no set has less information
    than its subsets, or less than 0. Surprisals are those of a Gaussian mixture on the same number of whitened
    components for each modality. See ``pointwise_interaction``.

    Args:
        features: name -> (sample, ...) floating-point features, NaN rows for samples without the modality.
        target: (sample,) classes, or numbers, which are divided into four classes of equal size.
        predictions: (sample, output) predictions of a model, for ``used``.
        folds: number of folds, >= 2.
        seed: of folds and networks.

    Raises:
        ConfigError: one modality, folds below 2, fewer than 20 samples with all modalities, or fewer than two classes
            with two samples. ShapeError: numbers of samples that differ, a target of another shape.
        MissingExtraError: scikit-learn is not installed.

    Values are lower bounds as far as the networks do not find the information: more samples give larger values, and
    differences of a few hundredths of a bit are noise. Redundancy depends on the measure: here, as in the paper, on
    densities, which are not invariant to the choice of features, and two independent modalities of equal information
    count as redundant and synergistic: compare ``bounds``.

    Reference: Yang, Wang and Hu, "Efficient Quantification of Multimodal Interaction at Sample Level" (ICML 2025),
    LSMI.
    Differs from the released code in: estimates on samples that the networks have not seen, frequencies of classes
    instead of log C, whitened components of equal number, scikit-learn's Gaussian mixture instead of KNIFE, which is
    trained by gradients; the shift of R, which in the code may leave negative values.

    Example:
        >>> import torch
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> found = decompose_information({"a": x[:, :1], "b": x[:, 1:]}, (x[:, 0] > 0).long(), folds=2)
        >>> found.alone["a"] > 0.8, found.alone["b"] < 0.1, found.pairs["a", "b"].unique[0] > 0.7
        (True, True, True)
    """
    names = tuple(features)
    if len(names) < 2 or folds < 2:
        raise ConfigError(
            "decompose_information", expected="two or more modalities and folds >= 2",
            got=f"{len(names)} modalities and folds = {folds}",
        )  # fmt: skip
    with require_extra("decompose_information"):
        import sklearn as _  # fail before any computation
    arrays = {name: _rows(value, len(target), f"features '{name}'") for name, value in features.items()}
    if predictions is not None:
        arrays[PREDICTIONS] = _rows(predictions, len(target), "predictions")
    complete = np.all([np.isfinite(rows).all(axis=1) for rows in arrays.values()], axis=0)
    labels = _classes(target)
    counts = np.bincount(labels[complete], minlength=2)
    complete &= (counts >= 2)[labels]
    if complete.sum() < LEAST or (counts >= 2).sum() < 2:
        raise ConfigError(
            "decompose_information", expected=f"{LEAST} samples with all modalities, of two classes",
            got=f"{int(complete.sum())} samples of {int((counts >= 2).sum())} classes",
        )  # fmt: skip
    chosen = np.flatnonzero(complete)
    if len(chosen) > MOST:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MOST, replace=False))
    _, labels = np.unique(labels[chosen], return_inverse=True)
    parts = {name: _whitened(rows[chosen]) for name, rows in arrays.items()}
    estimate = _Estimates(parts, labels, min(folds, int(np.bincount(labels).min())), seed)
    alone = {name: estimate.information((name,)) for name in names}
    joint = estimate.information(names)
    best = max(names, key=lambda name: alone[name].mean())
    width = min(DENSITY_WIDTH, *(parts[name].shape[1] for name in names))
    surprisal = {name: _surprisal(parts[name][:, :width], seed) for name in names}
    pairs = {
        (a, b): pointwise_interaction(
            (surprisal[a], surprisal[b]), (alone[a], alone[b]), estimate.information((a, b))
        )
        for a, b in combinations(names, 2)
    }  # fmt: skip
    used = None if predictions is None else estimate.information((PREDICTIONS,))
    return InformationDecomposition(
        names=names,
        entropy=float(-estimate.prior.mean()),
        alone={name: float(value.mean()) for name, value in alone.items()},
        joint=float(joint.mean()),
        pairs=pairs,
        gain=float((joint - alone[best]).mean()),
        gain_error=_error(joint - alone[best]),
        used=None if used is None else float(used.mean()),
        unused_error=None if used is None else _error(joint - used),
        samples=len(labels),
    )


class _Estimates:
    """Log probabilities of the true class from sets of modalities, on samples that were not trained on."""

    def __init__(self, parts: Mapping[str, Array], labels: NDArray[np.intp], folds: int, seed: int) -> None:
        self.parts, self.labels, self.folds, self.seed = parts, labels, folds, seed
        self.prior: Array = np.log2(np.bincount(labels) / len(labels))[labels]
        self._networks: dict[frozenset[str], Array] = {}

    def information(self, names: Sequence[str]) -> Array:
        """Returns (sample,) bits; the mixture includes the networks of all subsets."""
        subsets = [part for size in range(1, len(names) + 1) for part in combinations(names, size)]
        if len(names) > 3:
            subsets = [*((name,) for name in names), tuple(names)]
        return _mixture(np.stack([self.prior, *map(self._network, subsets)])) - self.prior

    def _network(self, names: Sequence[str]) -> Array:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.neural_network import MLPClassifier

        key = frozenset(names)
        if key not in self._networks:
            inputs = np.concatenate([self.parts[name] for name in names], axis=1)
            network = MLPClassifier((32,), solver="lbfgs", alpha=1.0, max_iter=200, random_state=self.seed)
            split = StratifiedKFold(self.folds, shuffle=True, random_state=self.seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                chances = cross_val_predict(network, inputs, self.labels, cv=split, method="predict_proba")
            true = np.asarray(chances)[np.arange(len(self.labels)), self.labels]
            self._networks[key] = np.log2(np.clip(true, 1e-12, None))
        return self._networks[key]


def _mixture(logs: Array) -> Array:
    """Returns the log2 of the mixture of probabilities, (expert, sample) as logs; weights of maximum likelihood."""
    chances = np.exp2(logs)
    weights = np.full(len(logs), 1 / len(logs))
    # Expectation maximization of a concave likelihood, which has no other maxima.
    for _ in range(500):
        shares = weights[:, None] * chances
        weights = (shares / shares.sum(axis=0)).mean(axis=1)
    best = np.log2(weights @ chances)
    single = logs[logs.mean(axis=1).argmax()]
    return best if best.mean() >= single.mean() else single


def _rows(value: Tensor, samples: int, who: str) -> Array:
    if value.ndim < 2 or len(value) != samples or not value.is_floating_point():
        raise ShapeError(
            f"decompose_information {who}",
            expected=f"floating-point values of shape ({samples}, ...), one row a sample",
            got=f"shape {tuple(value.shape)}, {value.dtype}",
        )
    return value.detach().cpu().double().flatten(1).numpy()


def _classes(target: Tensor) -> NDArray[np.intp]:
    """Returns the target as classes; numbers are divided into four of equal size."""
    target = target.detach().cpu()
    if target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if target.ndim != 1:
        raise ShapeError(
            "decompose_information", expected="a target of shape (sample,)", got=f"shape {tuple(target.shape)}",
            fix="Choose one label or one output: target[:, 0].",
        )  # fmt: skip
    if not target.is_floating_point():
        return np.unique(target.numpy(), return_inverse=True)[1]
    values = target.double().numpy()
    return np.searchsorted(np.quantile(values, np.arange(1, BINS) / BINS), values, side="left")


def _whitened(rows: Array) -> Array:
    """Returns principal components of unit variance, those of the largest variance first."""
    centered = rows - rows.mean(axis=0)
    deviation = centered.std(axis=0)
    scaled = centered / np.where(deviation > 0, deviation, 1.0)
    left, values, _ = np.linalg.svd(scaled, full_matrices=False)
    kept = values > 1e-6 * max(values[0], 1e-12)
    # Without variance there is one component of zeros.
    return (left[:, kept] * np.sqrt(len(rows)))[:, :PROBE_WIDTH] if kept.any() else np.zeros((len(rows), 1))


def _surprisal(rows: Array, seed: int) -> Array:
    """Returns -log2 of the density of each row under a Gaussian mixture."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    count = max(1, min(COMPONENTS, len(rows) // (10 * rows.shape[1])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        density = GaussianMixture(count, reg_covar=1e-2, random_state=seed).fit(rows)
    return -density.score_samples(rows) / np.log(2)


def _error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
