"""Paired tests of two scores on the same samples, the significance level, and per-sample outcomes as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SURE = 0.05
"""Significance level of two-sided p-values in all sentences, tables and figures."""
RESAMPLES = 1_999
"""Resamples of the bootstrap; p-values are multiples of 1 / 2000."""
LARGE = 20_000
"""Number of samples above which the bootstrap is replaced by its limit, the normal distribution."""

Outcomes = str | list[float | None]
"""Outcome of each sample: a string of "1" (correct), "0" (wrong) and "-" (not scored); or numbers and None in a list;
or numbers and "-" in a string, with a comma after each."""


def pack_outcomes(values: Any) -> Outcomes:
    """Returns per-sample outcomes as JSON values; NaN marks a sample that is not scored.

    Example:
        >>> pack_outcomes([1.0, 0.0, float("nan")]), pack_outcomes([0.5, 1.0])
        ('10-', [0.5, 1.0])
    """
    array = np.asarray(values, dtype=float).reshape(-1)
    if np.isin(array[~np.isnan(array)], (0.0, 1.0)).all():
        return "".join("-" if value != value else str(int(value)) for value in array.tolist())
    return [None if value != value else float(f"{value:.7g}") for value in array.tolist()]


def pack_text(values: Any) -> str:
    """Returns outcomes as one string, which stays on one line in indented JSON.

    Example:
        >>> pack_text([1.0, 0.0, float("nan")]), pack_text([0.5, float("nan")])
        ('10-', '0.5,-,')
    """
    packed = pack_outcomes(values)
    return packed if isinstance(packed, str) else "".join("-," if v is None else f"{v:.7g}," for v in packed)


def unpack_outcomes(outcomes: Outcomes) -> np.ndarray:
    """Inverts ``pack_outcomes`` and ``pack_text``.

    Example:
        >>> unpack_outcomes("10-").tolist(), unpack_outcomes([0.5, None]).tolist(), unpack_outcomes("0.5,-,").tolist()
        ([1.0, 0.0, nan], [0.5, nan], [0.5, nan])
    """
    if isinstance(outcomes, str):
        parts = outcomes.split(",")[:-1] if "," in outcomes else outcomes
        return np.array([math.nan if part == "-" else float(part) for part in parts])
    return np.array([math.nan if value is None else float(value) for value in outcomes])


def paired_p(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the two-sided p-value of no difference between two scores, which are means over the same samples.

    Binary outcomes are compared by McNemar's test, all others by a bootstrap over samples, which keeps the labels of
    a sample together. The order of the samples does not matter.

    Example:
        >>> round(paired_p(np.array([1, 1, 1, 1, 1, 0.0]), np.array([0, 0, 0, 0, 0, 0.0])), 5)
        0.03125
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return mcnemar(int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum()))
    return bootstrap_p(first - second)


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the mid-p value of McNemar's test: binomial over the samples that exactly one of the two has correct.

    p = P(at least as extreme) - P(observed) / 2 under Binomial(b + c, 1/2), two-sided.

    Example:
        >>> mcnemar(0, 0), mcnemar(3, 3), round(mcnemar(0, 5), 5)
        (1.0, 1.0, 0.03125)

    Reference: Fagerland, Lydersen, Laake, "The McNemar test for binary matched-pairs data" (BMC Med. Res. Methodol.,
    2013).
    """
    from scipy import stats

    total, fewer = only_first + only_second, min(only_first, only_second)
    if 2 * fewer == total:
        return 1.0
    return float(stats.binomtest(fewer, total).pvalue - stats.binom.pmf(fewer, total, 0.5))


def bootstrap_p(differences: Sequence[float] | np.ndarray) -> float:
    """Returns the two-sided p-value of a zero mean by the symmetric bootstrap-t over samples.

    p = fraction of resamples with abs(mean* - mean) / se* >= abs(mean) / se; resamples with zero variance count as
    extreme. If all differences are equal, p is that of the sign test, 2^(1 - n).

    Example:
        >>> bootstrap_p([0.0, 0.0]), bootstrap_p([0.5] * 6), bootstrap_p([0.1, -0.1])
        (1.0, 0.03125, 1.0)

    Reference: Hall, "On symmetric bootstrap confidence intervals" (J. R. Stat. Soc. B 1988).
    """
    values = np.sort(np.asarray(differences, dtype=float))
    n, mean = len(values), float(values.mean()) if len(values) else 0.0
    size = float(np.abs(values).max(initial=0.0))
    if n == 0 or abs(mean) <= 1e-12 * size or size == 0:
        return 1.0
    spread = float(values.std())
    if spread <= 1e-12 * size:
        return min(1.0, 2.0 ** (1 - n))
    statistic = abs(mean) / spread
    if n > LARGE:
        return math.erfc(statistic * math.sqrt(n / 2))
    draws = np.random.default_rng(0)
    batch = max(1, 2_000_000 // n)
    extreme = 0
    for start in range(0, RESAMPLES, batch):
        resampled = values[draws.integers(n, size=(min(batch, RESAMPLES - start), n))]
        distance, deviation = np.abs(resampled.mean(axis=1) - mean), resampled.std(axis=1)
        extreme += int((distance >= statistic * deviation * (1 - 1e-12)).sum())
    return (extreme + 1) / (RESAMPLES + 1)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p-values corrected by Holm's method for the number of tests.

    p_(i) of the sorted values becomes the maximum over j <= i of (n - j + 1) p_(j), at most 1: the probability that at
    least one of the true null hypotheses is rejected is at most the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Reference: Holm, "A simple sequentially rejective multiple test procedure" (Scand. J. Stat. 1979).
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    result, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        result[index] = highest
    return result


def grouped_p(differences: np.ndarray, groups: np.ndarray) -> float | None:
    """Returns the two-sided p-value of a zero mean, with groups of samples (speakers, subjects) as a random factor.

    With n samples, G groups and the mean d, the t-statistic has G - 1 degrees of freedom and the standard error of
    clusters: r_g = sum of (d_i - d) over the samples of group g,  se^2 = G / (G - 1) sum_g r_g^2 / n^2.

    Returns:
        None for a single group, and if the means of all groups are equal.

    With few groups of very different sizes the standard error, and with it p, tends to be too small.

    Example:
        >>> round(grouped_p(np.array([1, 1, 0, 1, 1, 1.0]), np.array([0, 0, 1, 1, 2, 2])), 3)
        0.038

    Reference: Liang, Zeger, "Longitudinal data analysis using generalized linear models" (Biometrika 1986).
    """
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    names, member = np.unique(groups, return_inverse=True)
    mean, count = values.mean(), len(names)
    # The rounding error of a sum grows with the values.
    smallest = 1e-12 * len(values) * float(np.abs(values).max())
    sums = np.bincount(member, weights=values - mean)
    if count < 2 or float(np.abs(sums).max()) <= smallest:
        return 1.0 if count > 1 and len(values) * abs(mean) <= smallest else None
    error = math.sqrt(count / (count - 1) * float(np.square(sums).sum())) / len(values)
    return float(2 * stats.t.sf(abs(mean) / error, count - 1))


def unpaired_p(first: float, second: float, *variances: float) -> float | None:
    """Returns the two-sided p-value of a normal test of two means, given their squared standard errors.

    Used if per-sample outcomes are unknown. None if a variance is unknown.

    Example:
        >>> round(unpaired_p(0.6, 0.5, 0.001, 0.0016), 3), unpaired_p(0.5, 0.5, 0.0, 0.0)
        (0.05, 1.0)
    """
    total = sum(variances)
    if math.isnan(total):
        return None
    if first == second:
        return 1.0
    return 0.0 if total == 0 else math.erfc(abs(first - second) / math.sqrt(2 * total))


def resampled_p(difference: float, first: np.ndarray, second: np.ndarray) -> float | None:
    """Two-sided p-value of no difference between two metrics of the same samples, by the paired bootstrap.

    p = part of the resamples whose difference deviates from the observed one by at least its size. None if fewer than
    half of the resamples have both metrics.

    Args:
        difference: of the metrics of all samples, first - second.
        first, second: the metrics of the same resamples, see ``bootstrap.resampled_values``.

    Example:
        >>> rows = np.linspace(0, 0.1, 999)
        >>> resampled_p(0.5, rows + 0.5, rows), resampled_p(0.0, rows, rows)
        (0.001, 1.0)

    Reference: Efron, Tibshirani, "An introduction to the bootstrap" (1993), chapter 16.
    """
    valid = np.isfinite(first) & np.isfinite(second)
    if 2 * int(valid.sum()) < len(valid) or not valid.any() or not math.isfinite(difference):
        return None
    if difference == 0:
        return 1.0
    deviation = np.abs(first[valid] - second[valid] - difference)
    extreme = int((deviation >= abs(difference) * (1 - 1e-9)).sum())
    return (extreme + 1) / (len(deviation) + 1)


def pack_resamples(values: Any) -> str:
    """Returns the metrics of resamples as text of five digits, which ``unpack_outcomes`` reads.

    Example:
        >>> pack_resamples([0.123456789, float("nan"), 1.0])
        '0.12346,-,1,'
    """
    return "".join("-," if value != value else f"{value:.5g}," for value in np.asarray(values, dtype=float).tolist())
