"""Directions and rotations against.4: closed forms, properties, every degenerate case."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise.errors import ShapeError
from equipoise.geometry import cosine, mean_keys, membership, orthogonalize, rotation_between, rotation_svd
from helpers.tolerance import TOL
from oracles.fusion import rotation_column

EXACT = TOL[torch.float64]
DIMS = (2, 3, 5, 13)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector_pair(seed, d):
    return normal(seed, 2, d).unbind()


def normalize(v):
    return v / v.norm(dim=-1, keepdim=True)


def identity(d):
    return torch.eye(d, dtype=torch.float64)


def assert_rotates(rotation, source, target, **tolerance):
    d = source.shape[-1]
    torch.testing.assert_close(rotation @ rotation.mT, identity(d).expand_as(rotation), **tolerance)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(rotation.shape[:-2]).double(), **tolerance)
    turned = (normalize(source)[..., None, :] @ rotation)[..., 0, :]
    torch.testing.assert_close(turned, normalize(target), **tolerance)


directions = given(seed=st.integers(0, 2**31), d=st.sampled_from(DIMS))
few = settings(max_examples=40, deadline=None)


@few
@directions
def test_is_a_rotation_that_maps_source_to_target(seed, d):
    a, b = vector_pair(seed, d)
    assert_rotates(rotation_between(a, b), a, b, **EXACT)


@few
@directions
def test_equals_the_closed_form(seed, d):
    a, b = vector_pair(seed, d)
    assume(1 + float(cosine(a, b)) > 1e-2)
    torch.testing.assert_close(rotation_between(a, b), rotation_column(a, b).T, **EXACT)


@few
@directions
def test_orthogonal_complement_is_fixed(seed, d):
    a, b = vector_pair(seed, d)
    plane = torch.linalg.qr(torch.stack([a, b], dim=1)).Q
    other = normal(seed + 1, 7, d)
    other = other - other @ plane @ plane.T
    torch.testing.assert_close(other @ rotation_between(a, b), other, **EXACT)


@few
@directions
def test_reverse_rotation_is_the_inverse(seed, d):
    a, b = vector_pair(seed, d)
    torch.testing.assert_close(rotation_between(a, b) @ rotation_between(b, a), identity(d), **EXACT)


@few
@given(seed=st.integers(0, 2**31), d=st.sampled_from(DIMS), p=st.floats(-8, 8), q=st.floats(-8, 8))
def test_norms_do_not_matter(seed, d, p, q):
    a, b = vector_pair(seed, d)
    torch.testing.assert_close(rotation_between(a * 10**p, b * 10**q), rotation_between(a, b), **EXACT)


@few
@directions
def test_distance_from_identity_follows_from_the_angle(seed, d):
    a, b = vector_pair(seed, d)
    # The angle by atan2 of chord lengths, which is accurate at both ends.
    angle = 2 * math.atan2(float((normalize(a) - normalize(b)).norm()), float((normalize(a) + normalize(b)).norm()))
    distance = torch.linalg.matrix_norm(rotation_between(a, b) - identity(d))
    expected = torch.tensor(2 * math.sqrt(2) * math.sin(angle / 2), dtype=torch.float64)
    torch.testing.assert_close(distance, expected, **EXACT)


def test_hand_computed_quarter_turn():
    rotation = rotation_between(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 5.0, 0.0]))
    assert rotation.tolist() == [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_published_example_in_column_form():
    target = torch.tensor([1.4419838461, 0.0, 4.7875549697], dtype=torch.float64)
    rotation = eq.geometry.rotation_between(torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64), target)
    column = [[0.6733, -0.1444, -0.7252], [-0.6059, 0.4544, -0.6530], [0.4238, 0.8790, 0.2184]]
    # Four decimals are printed.
    torch.testing.assert_close(rotation.T, torch.tensor(column).double(), rtol=0.0, atol=5e-5)
    torch.testing.assert_close(torch.tensor([3.0, 4.0, 0.0]).double() @ rotation, target, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("d", DIMS)
def test_parallel_is_exactly_the_identity(d):
    a, _ = vector_pair(3, d)
    assert torch.equal(rotation_between(a, a * 7.0), identity(d))
    assert torch.equal(rotation_between(a, normalize(a) + 1e-9 * normalize(vector_pair(4, d)[0])), identity(d))


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("angle", [1e-2, 1e-4, 3e-6])
def test_near_parallel_vectors_are_accurate(d, angle):
    a, b = vector_pair(5, d)
    side = normalize(b - (b @ normalize(a)) * normalize(a))
    target = math.cos(angle) * normalize(a) + math.sin(angle) * side
    rotation = rotation_between(a, target)
    assert_rotates(rotation, a, target, **EXACT)
    torch.testing.assert_close(rotation, rotation_column(a, target).T, **EXACT)


@pytest.mark.parametrize("d", DIMS)
def test_antiparallel_vectors_rotate_by_180_degrees(d):
    a, _ = vector_pair(6, d)
    x = normalize(a)
    smallest = min(range(d), key=lambda i: abs(float(x[i])))
    z = normalize(identity(d)[smallest] - x[smallest] * x)
    half_turn = identity(d) - 2 * torch.outer(x, x) - 2 * torch.outer(z, z)
    rotation = rotation_between(a, -3.0 * a)
    torch.testing.assert_close(rotation, half_turn, **EXACT)
    assert_rotates(rotation, a, -a, **EXACT)
    assert torch.equal(rotation, rotation_between(a, -3.0 * a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", DIMS)
def test_antiparallel_vectors_within_rounding(d, dtype):
    for seed in range(5):
        a = vector_pair(seed, d)[0].to(dtype)
        target = -3.7 * a
        expected = rotation_between(a.double(), -a.double()).to(dtype)
        torch.testing.assert_close(rotation_between(a, target), expected, **TOL[dtype])
        torch.testing.assert_close(rotation_between(a.double(), target).to(dtype), expected, **TOL[dtype])


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-11, 1e-13])
def test_near_antiparallel_vectors_give_a_rotation(d, gap):
    a, b = vector_pair(7, d)
    side = normalize(b - (b @ normalize(a)) * normalize(a))
    target = -math.cos(gap) * normalize(a) + math.sin(gap) * side
    assert_rotates(rotation_between(a, target), a, target, **EXACT)


def test_batch_with_all_cases():
    a, b = vector_pair(8, 5)
    sources = torch.stack([a, a, a, b]).reshape(2, 2, 5)
    targets = torch.stack([b, a, -a, a]).reshape(2, 2, 5)
    rotations = rotation_between(sources, targets)
    assert rotations.shape == (2, 2, 5, 5)
    assert_rotates(rotations, sources, targets, **EXACT)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(rotations[i, j], rotation_between(sources[i, j], targets[i, j]), **EXACT)
    assert rotation_between(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_float64_and_returns_source_dtype(dtype):
    a, b = (v.to(dtype) for v in vector_pair(9, 13))
    rotation = rotation_between(a, b)
    assert rotation.dtype == dtype
    assert torch.equal(rotation, rotation_between(a.double(), b.double()).to(dtype))


def test_result_has_no_gradient():
    a, b = (v.requires_grad_() for v in vector_pair(10, 3))
    assert not rotation_between(a, b).requires_grad


@pytest.mark.parametrize("rotate", [rotation_between, rotation_svd])
@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.ones(1), torch.ones(1), r"expected d >= 2, got d = 1\. There is no rotation in one dimension"),
        (torch.zeros(3), torch.ones(3), r"expected a finite source of positive length, got length \[0\.0\]"),
        (torch.ones(3), torch.zeros(3), r"expected a finite target of positive length.*skip this step"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), r"a finite source.*nan"),
        (torch.ones(2), torch.tensor([torch.inf, 0.0]), r"a finite target.*inf"),
        (torch.ones(3), torch.ones(5), r"expected source and target of one shape \(\.\.\., d\), got \(3,\) and \(5,\)"),
        (torch.tensor(1.0), torch.tensor(1.0), r"one shape \(\.\.\., d\), got \(\) and \(\)"),
        (torch.tensor([1, 0]), torch.tensor([1, 1]), r"expected floating point vectors, got torch\.int64"),
    ],
)
def test_errors(rotate, source, target, message):
    with pytest.raises(ShapeError, match=rf"{rotate.__name__}: .*{message}"):
        rotate(source, target)


@pytest.mark.parametrize("d", DIMS)
def test_svd_form_is_a_rotation_without_fixed_complement(d):
    a, b = vector_pair(11, d)
    assert_rotates(rotation_svd(a, b), a, b, **EXACT)


def test_svd_form_is_far_from_the_smallest_rotation():
    a, b = vector_pair(12, 61)
    assert torch.linalg.matrix_norm(rotation_between(a, b) - identity(61)) <= 2 * math.sqrt(2)
    # A random rotation lies at about sqrt(2 d) = 11 from the identity.
    assert torch.linalg.matrix_norm(rotation_svd(a, b) - identity(61)) > 6.0


@few
@directions
def test_orthogonalize_squares_the_error(seed, d):
    a, b = vector_pair(seed, d)
    drifted = rotation_between(a, b) + 1e-4 * normal(seed + 1, d, d)

    def error(matrix):
        return float(torch.linalg.matrix_norm(matrix.mT @ matrix - identity(d)))

    # With E = R^T R - I one step leaves R^T R - I = -(3 E^2 + E^3) / 4.
    assert error(orthogonalize(drifted)) <= error(drifted) ** 2
    torch.testing.assert_close(orthogonalize(rotation_between(a, b)), rotation_between(a, b), **EXACT)


def test_hand_computed_cosine():
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([5.0, 0.0])) == pytest.approx(0.6)
    assert cosine(torch.zeros(3), torch.ones(3)) == 0.0
    v = torch.full((7,), 0.1)
    assert cosine(v, v) <= 1.0
    assert cosine(v.bfloat16(), v.bfloat16()).dtype == torch.float32


def test_membership_and_mean_keys_against_loops():
    random = torch.Generator().manual_seed(13)
    key = torch.randn(2, 3, 7, 5, generator=random, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -1, 1, 0, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
    valid = torch.tensor([[True] * 6 + [False], [True] * 3 + [False] * 4])
    means, counts = mean_keys(key, membership(labels, 4, 2, valid))
    for sample in range(2):
        for m in range(4):
            places = [j for j in range(7) if labels[sample, j] == m and valid[sample, j]]
            assert counts[sample, m] == len(places)
            expected = sum((key[sample, :, j] for j in places), torch.zeros(3, 5).double()) / max(1, len(places))
            torch.testing.assert_close(means[sample, :, m], expected, **EXACT)


def test_membership_with_shared_labels():
    member = membership(torch.tensor([1, -1, 0]), 2, batch=3)
    assert member.int().tolist() == [[[0, 0, 1], [1, 0, 0]]] * 3
