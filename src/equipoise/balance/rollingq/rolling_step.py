"""RollingQ's formula: computes the rotation from the mean query and the mean keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError, ShapeError, unknown_name
from ...geometry import PARALLEL, VANISHING, cosine, rotation_between, rotation_random, rotation_svd

RotationName = Literal["minimal", "svd", "random"]
ROTATIONS = ("minimal", "svd", "random")


@dataclass(frozen=True, eq=False)
class RollingStep:
    """Result of one RollingQ step.

    Attributes:
        air: name -> attention imbalance: this modality's cosine minus the mean of the others'; sums to 0. For two
            modalities the first one's is the paper's AIR.
        spread: largest minus smallest cosine; for two modalities ``|AIR|``. It is compared with the threshold beta.
        weights: name -> alpha, in (0, 1), sums to 1; largest for the modality with the least attention.
        anchor: (d,) the rebalanced query, of the mean query's length.
        rotation: (d, d) for row vectors: ``query @ rotation = anchor``; the identity if no rotation is possible.
        reason: reason for which there is no rotation; empty if there is one.
    """

    air: dict[str, float]
    spread: float
    weights: dict[str, float]
    anchor: Float[Tensor, " d"]
    rotation: Float[Tensor, "d d"]
    reason: str = ""

    @property
    def rotates(self) -> bool:
        return not self.reason


def rolling_query(
    query: Float[Tensor, " d"],
    keys: Mapping[str, Float[Tensor, " d"]],
    *,
    rho: float,
    imbalance: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    rotation: RotationName = "minimal",
    seed: int = 0,
) -> RollingStep:
    """Rotates the mean query toward an anchor with the largest weight on the modality with the least attention.

    With c_m the cosine of the query to modality m's mean key and u_m that key's direction::

        AIR_m = c_m - mean_{n != m} c_n
        alpha = softmax_m(-2 rho c_m)            (two modalities: alpha_1 = (1 + tanh(-rho AIR)) / 2)
        anchor = |query| * unit(sum_m alpha_m u_m)
        query @ R = anchor,  R the smallest such rotation

    Args:
        query: (d,) mean query E[Q], d >= 2.
        keys: name -> (d,) mean key E[K_m]; two or more modalities.
        rho: strength >= 0; 0 gives the bisector, large values the mean key of the least attended modality.
        imbalance: name -> c_m to use instead of the cosines of the means, such as the mean over samples of cosines or
            another indicator.
        weights: name -> alpha to use instead of the formula, non-negative, of sum 1; ``rho`` is then ignored.
        rotation: ``"svd"`` as in the released code, for comparison; see ``rotation_svd``. ``"random"``, a control,
            rotates by the same angle in a random direction, so that the anchor ignores the keys; see
            ``rotation_random``.
        seed: of the direction of ``"random"``.

    Returns:
        RollingStep; computed in float64, tensors in the dtype of ``query``.

    Raises:
        ShapeError: d = 1, keys of another width, integers, NaN. ConfigError: fewer than two modalities, negative rho,
            an unknown rotation, weights or imbalance of other modalities, invalid weights.

    Reference: RollingQ (ICML 2025), eq. 9 to 13.
    Differs from the paper in: the anchor is rescaled to the query's length (eq. 10 shortens it, and a rotation cannot);
    any number of modalities; the rotation does not change directions orthogonal to query and anchor.

    Example:
        >>> step = rolling_query(torch.tensor([3.0, 4.0, 0.0]),
        ...     {"audio": torch.tensor([2.0, 0.0, 0.0]), "video": torch.tensor([0.0, 0.0, 5.0])}, rho=1.0)
        >>> round(step.air["audio"], 4), round(step.weights["audio"], 4), step.anchor
        (0.6, 0.2315, tensor([1.4420, 0.0000, 4.7876]))
    """
    if rotation not in ROTATIONS:
        raise unknown_name("rolling_query", "rotation", str(rotation), ROTATIONS)
    q, means = _check_inputs(query, keys, rho)
    names = tuple(means)
    if imbalance is None:
        imbalance = {name: float(cosine(q, key)) for name, key in means.items()}
    c = _check_numbers("imbalance", imbalance, names)
    air = (c - (c.sum() - c) / (len(names) - 1)).tolist()
    alpha = torch.softmax(-2.0 * rho * c, dim=0) if weights is None else _check_weights(weights, names)
    stack = torch.stack(list(means.values()))
    lengths = stack.norm(dim=-1, keepdim=True)
    units = stack / lengths.clamp(min=VANISHING)
    mixed = alpha.to(units.device) @ units
    reason = _obstacle(q, lengths[:, 0], alpha, mixed, names)
    anchor, matrix = q, torch.eye(len(q), dtype=torch.float64, device=q.device)
    if not reason:
        anchor = mixed / mixed.norm() * q.norm()
        if rotation == "random":
            matrix = rotation_random(q, anchor, seed=seed)
            anchor = q @ matrix
        else:
            matrix = (rotation_svd if rotation == "svd" else rotation_between)(q, anchor)
    return RollingStep(
        air=dict(zip(names, air, strict=True)),
        spread=float(c.max() - c.min()),
        weights=dict(zip(names, alpha.tolist(), strict=True)),
        anchor=anchor.to(query.device, query.dtype),
        rotation=matrix.to(query.device, query.dtype),
        reason=reason,
    )


def _check_inputs(query: Tensor, keys: Mapping[str, Tensor], rho: float) -> tuple[Tensor, dict[str, Tensor]]:
    if len(keys) < 2:
        raise ConfigError("rolling_query", expected="two or more modalities", got=f"keys of {list(keys)}")
    if not isinstance(rho, Real) or not 0 <= rho < math.inf:
        raise ConfigError("rolling_query", expected="rho >= 0 and finite", got=f"rho = {rho!r}")
    if query.ndim != 1 or len(query) < 2:
        raise ShapeError(
            "rolling_query",
            expected="a mean query of shape (d,) with d >= 2",
            got=f"shape {tuple(query.shape)}",
            fix="Average over samples first; call it once per head.",
        )
    device = query.device if query.device.type in ("cpu", "cuda") else torch.device("cpu")
    vectors = {}
    for name, vector in {"": query, **keys}.items():
        who = f"rolling_query '{name}'" if name else "rolling_query query"
        if vector.shape != query.shape:
            raise ShapeError(who, expected=f"shape (d,) = ({len(query)},)", got=f"shape {tuple(vector.shape)}")
        if not vector.is_floating_point():
            raise ShapeError(who, expected="floating point numbers", got=str(vector.dtype), fix="Use vector.float().")
        if not bool(torch.isfinite(vector).all()):
            raise ShapeError(who, expected="finite numbers", got="NaN or infinity", fix="Check the batch for NaN.")
        vectors[name] = vector.detach().to(device).double()
    return vectors.pop(""), vectors


def _check_numbers(what: str, values: Mapping[str, float], names: tuple[str, ...]) -> Tensor:
    """Returns (modality,) numbers; raises ConfigError unless there is one finite number for each name."""
    if set(values) != set(names):
        raise ConfigError(
            f"rolling_query {what}",
            expected=f"one number for each of {', '.join(names)}",
            got=f"numbers for {list(values)}",
        )
    numbers = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
    if not bool(numbers.isfinite().all()):
        raise ConfigError(f"rolling_query {what}", expected="finite numbers", got=str(dict(values)))
    return numbers


def _check_weights(weights: Mapping[str, float], names: tuple[str, ...]) -> Tensor:
    alpha = _check_numbers("weights", weights, names)
    if bool((alpha < 0).any()) or not math.isclose(float(alpha.sum()), 1.0, abs_tol=1e-6):
        raise ConfigError(
            "rolling_query weights",
            expected="weights >= 0 that sum to 1",
            got=f"{dict(weights)}",
            fix="Divide them by their sum.",
        )
    return alpha


def _obstacle(q: Tensor, lengths: Tensor, alpha: Tensor, mixed: Tensor, names: tuple[str, ...]) -> str:
    if float(q.norm()) < VANISHING:
        return "the mean query is zero"
    for name, length, weight in zip(names, lengths.tolist(), alpha.tolist(), strict=True):
        if length < VANISHING and weight > 0:
            return f"the mean key of '{name}' is zero"
    if float(mixed.norm()) < VANISHING:
        return "the mean keys cancel each other"
    if float(1 - cosine(q, mixed)) <= PARALLEL:
        return "the query already points at the anchor"
    return ""
