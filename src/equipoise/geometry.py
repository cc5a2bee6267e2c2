"""Directions and rotations as pure functions, computed in float64 for inputs of any type."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import ShapeError

PARALLEL = 1e-12
"""1 - cosine below which two directions are treated as equal."""
VANISHING = 1e-12
"""Length below which the direction of a vector is undefined."""
SINGULAR = 1e-3
"""Smallest singular value of an average of rotations from which a rotation is still recovered."""


def cosine(a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Computes the cosine similarity in float32 or higher precision; 0 for vectors of zero length.

    Example:
        >>> cosine(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0]))
        tensor(0.6000)
    """
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return ((a * b).sum(dim=-1) / norms.clamp(min=VANISHING)).clamp(-1.0, 1.0)


def membership(
    modality: Int[Tensor, "... key"], num_modalities: int, batch: int, valid: Bool[Tensor, "batch key"] | None = None
) -> Bool[Tensor, "batch modality key"]:
    """Converts labels (key,) or (batch, key) to a boolean membership tensor; invalid keys belong to no modality.

    Example:
        >>> membership(torch.tensor([-1, 0, 1, 1]), 2, batch=1).int()
        tensor([[[0, 1, 0, 0],
                 [0, 0, 1, 1]]], dtype=torch.int32)
    """
    member = modality[..., None, :] == torch.arange(num_modalities, device=modality.device)[:, None]
    member = member.expand(batch, -1, -1)
    return member if valid is None else member & valid[:, None]


def mean_keys(
    key: Float[Tensor, "batch head key dim"], member: Bool[Tensor, "batch modality key"]
) -> tuple[Float[Tensor, "batch head modality dim"], Float[Tensor, "batch modality"]]:
    """Computes the mean key and the number of keys of each modality; the mean is zero if a modality has no keys.

    Example:
        >>> member = torch.tensor([[[True, False, False], [False, True, True]]])
        >>> mean_keys(torch.tensor([[[[1.0], [2.0], [4.0]]]]), member)
        (tensor([[[[1.],
                  [3.]]]]), tensor([[1., 2.]]))
    """
    weight = member.to(key.dtype)
    counts = weight.sum(dim=-1)
    return (weight[:, None] @ key) / counts.clamp(min=1)[:, None, :, None], counts


def rotation_between(
    source: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d d"]:
    """Computes the minimal rotation that maps one direction to another: ``unit(source) @ R = unit(target)``.

    With x, y the unit vectors, c = x . y and z the unit part of y orthogonal to x::

        R = I + (c - 1) (x^T x + z^T z) + s (x^T z - z^T x),   s = |y - c x|

    This rotates within the plane of x and y and is the identity on its orthogonal complement. It equals
    ``I - G + G^2 / (1 + c)``, ``G = y^T x - x^T y``, but is numerically stable where 1 + c is small.

    Args:
        source: (..., d), any positive length.
        target: (..., d), any positive length.

    Returns:
        (..., d, d) in the type of ``source``, orthogonal with determinant +1, for row vectors. Equal directions give
        the identity; opposite directions, up to rounding, give a rotation by 180 degrees in the plane of x and the
        axis along which x is smallest. Both inputs are detached.

    Raises:
        ShapeError: the shapes differ, d = 1, a vector has length zero or contains NaN.

    Reference: RollingQ (ICML 2025), eq. 12.
    Differs from the paper in: the released code uses an SVD of a rank-1 matrix, which rotates all other directions
    arbitrarily (``rotation_svd``); here they are unchanged.

    Example:
        >>> R = rotation_between(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        >>> torch.tensor([3.0, 0.0]) @ R
        tensor([0., 3.])
    """
    x, y = _directions("rotation_between", source, target)
    c = (x * y).sum(dim=-1, keepdim=True)
    rest = y - c * x
    rest = rest - (rest * x).sum(dim=-1, keepdim=True) * x
    sine = rest.norm(dim=-1, keepdim=True)
    # For vectors that are opposite up to rounding, the plane of x and y would be determined by rounding errors.
    rounding = 8 * max(torch.finfo(source.dtype).eps, torch.finfo(target.dtype).eps)
    opposite = (sine <= max(VANISHING, rounding)) & (c < 0)
    z = torch.where(opposite, _any_orthogonal(x), rest / sine.clamp(min=1e-300))
    c = torch.where(opposite, -1.0, c)[..., None]
    sine = torch.where(opposite, 0.0, sine)[..., None]
    # R - I has rank 2: a product of (d, 2) and (2, d) is cheaper than sums of d x d matrices.
    plane = torch.stack([x, z], dim=-2)
    turned = (c - 1) * plane + sine * torch.stack([z, -x], dim=-2)
    same = ((x - y).square().sum(dim=-1) / 2 <= PARALLEL)[..., None, None]
    rotation = plane.mT @ torch.where(same, 0.0, turned)
    rotation.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return rotation.to(source.device, source.dtype)


def rotation_svd(source: Float[Tensor, " d"], target: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
    """Computes the rotation as the released RollingQ code does, for comparison: U V^T of the rank-1 matrix y^T x.

    It satisfies ``unit(source) @ R = unit(target)``, but on the d - 1 other directions it depends on the arbitrary null
    space that the linear algebra library returns. Arguments and errors as for ``rotation_between``, without batches.

    Example:
        >>> R = rotation_svd(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
        >>> bool((R @ R.T - torch.eye(3)).abs().max() < 1e-6)
        True
    """
    x, y = _directions("rotation_svd", source, target)
    u, _, vt = torch.linalg.svd(_outer(y, x))
    column = u @ vt
    if torch.linalg.det(column) < 0:
        u[..., -1] = -u[..., -1]
        column = u @ vt
    return column.mT.to(source.device, source.dtype)


def orthogonalize(rotation: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d d"]:
    """Performs one Newton-Schulz step toward the nearest orthogonal matrix: R (3 I - R^T R) / 2.

    Example:
        >>> R = orthogonalize(torch.eye(2) * 1.001)
        >>> bool((R - torch.eye(2)).abs().max() < 1e-5)
        True
    """
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return rotation @ (3 * eye - rotation.mT @ rotation) / 2


def rotation_random(source: Float[Tensor, " d"], target: Float[Tensor, " d"], *, seed: int) -> Float[Tensor, "d d"]:
    """Computes a rotation of the source by the angle between source and target, in a random plane: a control.

    The plane contains the source and a direction that is uniformly distributed over those orthogonal to it.

    Example:
        >>> R = rotation_random(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0]), seed=0)
        >>> round(float((torch.tensor([1.0, 0.0, 0.0]) @ R)[0]), 6)      # 90 degrees from the source
        0.0
    """
    x, y = _directions("rotation_random", source, target)
    c = (x * y).sum()
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(x.device)
    noise -= (noise @ x) * x
    turned = c * x + (1 - c * c).clamp(min=0).sqrt() * noise / noise.norm()
    return rotation_between(x, turned).to(source.device, source.dtype)


def nearest_rotation(matrix: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d d"]:
    """Computes the rotation nearest to ``matrix`` in the Frobenius norm, the orthogonal factor U V^T of its SVD.

    A matrix that is orthogonal up to rounding is returned unchanged. An average of rotations is not orthogonal; for
    rotations by angles a and b in one plane, averaged with equal weights, the result is the rotation by (a + b) / 2.
    Where the matrix is singular or a reflection (two rotations half a turn apart cancel), the result is NaN.

    Args:
        matrix: (..., d, d).

    Returns:
        (..., d, d), in the type of ``matrix``, float32 at least, computed in float64 where the device has it.

    Example:
        >>> R = nearest_rotation(torch.tensor([[0.5, 0.5], [-0.5, 0.5]]))
        >>> bool((R * 2**0.5 - torch.tensor([[1.0, 1.0], [-1.0, 1.0]])).abs().max() < 1e-6)
        True
    """
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    exact = matrix.to(dtype if matrix.device.type == "mps" else torch.float64)
    eye = torch.eye(matrix.shape[-1], dtype=exact.dtype, device=exact.device)
    error = (exact.mT @ exact - eye).abs().amax(dim=(-2, -1), keepdim=True)
    # The SVD raises an error for numbers that are not finite, and is replaced by NaN where they are.
    u, values, vt = torch.linalg.svd(exact.nan_to_num(0.0, 0.0, 0.0))
    valid = (values[..., -1:, None] > SINGULAR) & (torch.linalg.det(u @ vt)[..., None, None] > 0) & error.isfinite()
    rounding = 64 * torch.finfo(dtype).eps
    return torch.where(valid, torch.where(error <= rounding, exact, u @ vt), torch.nan).to(dtype)


def _directions(who: str, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if source.shape != target.shape or source.ndim < 1:
        raise ShapeError(
            who,
            expected="source and target of one shape (..., d)",
            got=f"{tuple(source.shape)} and {tuple(target.shape)}",
        )
    if not (source.is_floating_point() and target.is_floating_point()):
        raise ShapeError(
            who, expected="floating point vectors", got=f"{source.dtype} and {target.dtype}", fix="Use vector.float()."
        )
    if source.shape[-1] < 2:
        raise ShapeError(
            who, expected="d >= 2", got=f"d = {source.shape[-1]}",
            fix="There is no rotation in one dimension; use a head width of at least 2.",
        )  # fmt: skip
    # Some accelerators have no float64: move the tensor to the CPU before the conversion.
    device = source.device if source.device.type in ("cpu", "cuda") else torch.device("cpu")
    pair = []
    for name, vector in (("source", source), ("target", target)):
        vector = vector.detach().to(device).double()
        length = vector.norm(dim=-1, keepdim=True)
        if not bool((torch.isfinite(length) & (length > VANISHING)).all()):
            raise ShapeError(
                who,
                expected=f"a finite {name} of positive length",
                got=f"length {length.flatten().tolist()[:8]}",
                fix="A zero vector has no direction to rotate; skip this step.",
            )
        pair.append(vector / length)
    return pair[0], pair[1]


def _any_orthogonal(x: Tensor) -> Tensor:
    """Returns a deterministic unit vector orthogonal to x: the projection of the axis along which x is smallest."""
    axis = torch.nn.functional.one_hot(x.abs().argmin(dim=-1), x.shape[-1]).to(x.dtype)
    z = axis - (axis * x).sum(dim=-1, keepdim=True) * x
    return z / z.norm(dim=-1, keepdim=True)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]
