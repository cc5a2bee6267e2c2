"""Consistent and contradicting maps: the worked example, closed forms, gradients, invariances, the loss."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise as eq
from equipoise import consistency
from equipoise.consistency import (
    contradiction_excess,
    pair_error,
    supermatrix_from_attention,
    supermatrix_from_tokens,
    worst_contradictions,
)
from equipoise.consistency.matching_matrix import soft_matching
from equipoise.consistency.spectrum import contradiction_free_score, top_energy
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from helpers.tolerance import TOL
from oracles import consistency as slow

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
I = torch.eye(3, dtype=torch.float64)  # noqa: E741
SWAP, ROUND, EVEN = I[[1, 0, 2]], I[[1, 2, 0]], torch.ones(3, 3, dtype=torch.float64) / 3
METHODS = ("gram", "svd", "polar")


def soften(part, hardness):
    return hardness * part + (1 - hardness) * EVEN


def build_maps(there, straight, on, back=None):
    blocks = {(0, 1): there, (0, 2): straight, (1, 2): on}
    return eq.consistency.supermatrix(blocks if back is None else {**blocks, (2, 1): back})


# name: P, rank, nuclear norm, effective rank, score.
TABLE = {
    "all correct": (build_maps(I, I, I), 3, 9, 3, 1),
    "consistent permutations": (build_maps(SWAP, SWAP @ ROUND, ROUND), 3, 9, 3, 1),
    "swapped": (build_maps(I, I, SWAP), 5, 11, 4.4815, 0.7531),
    "a cycle of three": (build_maps(I, I, ROUND), 7, 12.5175, 5.8033, 0.5328),
    "swapped one way": (build_maps(I, I, SWAP, I), 4, 10.1231, 3.7955, 0.8674),
    "no alignment": (torch.eye(9, dtype=torch.float64), 9, 9, 9, 0),
    "uniform": (build_maps(EVEN, EVEN, EVEN), 7, 9, 5.4, 0.6),
    "soft, consistent": (build_maps(*[soften(I, 0.9)] * 3), 7, 9, 3.2767, 0.9539),
    "soft, swapped": (build_maps(soften(I, 0.9), soften(I, 0.9), soften(SWAP, 0.9)), None, 10.6, 4.5453, 0.7424),
    "softer, swapped": (build_maps(soften(I, 0.5), soften(I, 0.5), soften(SWAP, 0.5)), 6, 9, 4.5, 0.75),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", TABLE)
def test_worked_example(case, method):
    matrix, rank, norm, effective, score = TABLE[case]
    if rank is not None:
        assert int(torch.linalg.matrix_rank(matrix)) == rank
    assert float(eq.consistency.nuclear_norm(matrix, method=method)) == pytest.approx(norm, abs=1e-4)
    assert float(eq.consistency.effective_rank(matrix, method=method)) == pytest.approx(effective, abs=1e-4)
    assert float(eq.consistency.consistency_score(matrix, num_modalities=3, method=method)) == pytest.approx(
        score, abs=1e-4
    )
    assert float(contradiction_excess(matrix, method=method)) == pytest.approx(norm / 9 - 1, abs=1e-5)


def test_other_scores_of_the_worked_example():
    swapped, alone = TABLE["swapped"][0], TABLE["no alignment"][0]
    assert float(contradiction_free_score(alone, num_modalities=3)) == pytest.approx(1)
    expected = 1 - (11 / 9 - 1) / (math.sqrt(3) - 1)
    assert float(contradiction_free_score(swapped, num_modalities=3)) == pytest.approx(expected)
    assert float(top_energy(swapped, num_modalities=3)) == pytest.approx(8 / 9)
    # Two of three tokens are mapped wrongly in every triple, and each changes two entries.
    assert float(eq.consistency.cycle_error(swapped, num_modalities=3)) == pytest.approx(2 / 3)
    worst = worst_contradictions(swapped, num_modalities=3)
    assert worst[0].strength == 1
    assert worst[0].path[-2][0] == worst[0].path[-1][0]
    assert worst[0].path[-2][1] != worst[0].path[-1][1]
    assert worst_contradictions(TABLE["consistent permutations"][0], num_modalities=3) == []


@pytest.mark.parametrize("angle", [0.0, 0.4, 2.0, math.pi])
def test_closed_form_for_three_modalities(angle):
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    result = torch.linalg.eigvalsh(eq.consistency.supermatrix({(0, 1): eye, (1, 2): eye, (2, 0): turn}))
    expected = sorted(1 + 2 * math.cos((sign * angle + 2 * math.pi * k) / 3) for k in range(3) for sign in (1, -1))
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.floats(0, 1), st.integers(0, 1000))
def test_against_loops(count, size, noise, seed):
    random = np.random.default_rng(seed)
    full = slow.consistent(count, size, random)
    blocks = {
        (i, j): (1 - noise) * full[i * size : (i + 1) * size, j * size : (j + 1) * size]
        + noise * random.dirichlet(np.ones(size), size)
        for i in range(count)
        for j in range(count)
        if i != j
    }
    matrix = eq.consistency.supermatrix({pair: torch.from_numpy(block) for pair, block in blocks.items()})
    expected = slow.supermatrix(blocks, count, size)
    np.testing.assert_array_equal(matrix.numpy(), expected)
    assert float(eq.consistency.nuclear_norm(matrix)) == pytest.approx(slow.nuclear(expected), rel=1e-7)
    assert float(eq.consistency.effective_rank(matrix)) == pytest.approx(slow.effective_rank(expected), rel=1e-7)
    result = float(eq.consistency.consistency_score(matrix, num_modalities=count))
    assert result == pytest.approx(slow.score(expected, count), abs=1e-7)
    assert float(eq.consistency.cycle_error(matrix, num_modalities=count)) == pytest.approx(
        slow.cycle_error(expected, count)
    )
    assert size - 1e-6 <= float(eq.consistency.effective_rank(matrix)) <= count * size + 1e-6
    if noise == 0:
        assert result == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_token_permutation_and_modality_order_do_not_matter(seed):
    random = torch.Generator().manual_seed(seed)
    matrix = eq.consistency.supermatrix(
        {
            (i, j): torch.rand(3, 3, generator=random, dtype=torch.float64).softmax(-1)
            for i in range(3)
            for j in range(i)
        }
    )
    other = torch.block_diag(*(I[torch.randperm(3, generator=random)] for _ in range(3)))
    relabelled = other @ matrix @ other.t()
    order = torch.cat([torch.arange(3) + 3 * m for m in torch.randperm(3, generator=random)])
    reordered = matrix[order][:, order]
    for score in (
        lambda p: eq.consistency.consistency_score(p, num_modalities=3),
        lambda p: eq.consistency.cycle_error(p, num_modalities=3),
        eq.consistency.nuclear_norm,
        lambda p: pair_error(p, num_modalities=3),
    ):
        for changed in (relabelled, reordered):
            torch.testing.assert_close(score(changed), score(matrix), **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    matrix = torch.rand(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: eq.consistency.nuclear_norm(p, method=method), matrix)
    assert torch.autograd.gradcheck(lambda p: eq.consistency.effective_rank(p, method=method), matrix)
    assert torch.autograd.gradcheck(lambda p: eq.consistency.cycle_error(p, num_modalities=3), matrix)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_finite_if_singular_values_vanish(method):
    matrix = TABLE["all correct"][0].clone().requires_grad_()
    eq.consistency.nuclear_norm(matrix, method=method).backward()
    # U V^T over the three nonzero singular values: P / N.
    torch.testing.assert_close(matrix.grad, matrix.detach() / 3, rtol=1e-6, atol=1e-6)
    nothing = torch.zeros(4, 4, requires_grad=True)
    eq.consistency.nuclear_norm(nothing, method=method).backward()
    assert float(nothing.grad.abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_and_half_precision(dtype):
    matrix = TABLE["a cycle of three"][0]
    result = eq.consistency.nuclear_norm(matrix.to(dtype))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), eq.consistency.nuclear_norm(matrix), **TOL[dtype])
    with torch.autocast("cpu", torch.bfloat16):
        assert eq.consistency.nuclear_norm(matrix.float()).dtype == torch.float32


def test_diagonal_other_than_the_identity_raises():
    with pytest.warns(UserWarning, match=r"diagonal blocks are not the identity"):
        assert float(eq.consistency.consistency_score(torch.ones(4, 4) / 2, num_modalities=2)) == 1


def test_block_input_formats():
    rows = [[None, SWAP, I], [None, None, SWAP], [I, None, None]]
    named = {("audio", "video"): SWAP, ("audio", "text"): I, ("video", "text"): SWAP}
    torch.testing.assert_close(eq.consistency.supermatrix(rows), eq.consistency.supermatrix(named), rtol=0, atol=0)
    turned = eq.consistency.supermatrix(named, names=("text", "video", "audio"))
    torch.testing.assert_close(turned[:3, 3:6], SWAP, rtol=0, atol=0)
    unequal = eq.consistency.supermatrix({(0, 1): torch.ones(2, 3) / 3})
    assert unequal.shape == (5, 5)
    assert 0 <= float(eq.consistency.consistency_score(unequal, sizes=(2, 3))) <= 1
    batch = eq.consistency.supermatrix(
        {(0, 1): torch.rand(7, 2, 3), (0, 2): torch.rand(2, 5), (1, 2): torch.rand(7, 3, 5)}
    )
    assert batch.shape == (7, 10, 10)
    even = eq.consistency.supermatrix({(0, 1): torch.rand(2, 2)}, symmetrize=True)
    torch.testing.assert_close(even, even.t(), rtol=0, atol=0)


def test_from_attention():
    random = torch.Generator().manual_seed(1)
    attention = torch.rand(2, 6, 6, generator=random, dtype=torch.float64).softmax(-1)
    labels = torch.tensor([1, 0, -1, 0, 1, 1])
    result = supermatrix_from_attention(attention, labels, symmetrize=False)
    audio, image = [1, 3], [0, 4, 5]
    for b in range(2):
        for a, row in enumerate(audio):
            total = sum(float(attention[b, row, column]) for column in image)
            for c, column in enumerate(image):
                assert float(result[b, a, 2 + c]) == pytest.approx(float(attention[b, row, column]) / total)
    torch.testing.assert_close(result[0, :2, :2], torch.eye(2, dtype=torch.float64), rtol=0, atol=0)


def test_from_tokens_with_padding():
    random = torch.Generator().manual_seed(2)
    tokens = [torch.randn(3, 4, 5, generator=random, dtype=torch.float64) for _ in range(2)]
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    result = supermatrix_from_tokens(tokens, masks=[mask, None])
    short = supermatrix_from_tokens([tokens[0][1:2, :2], tokens[1][1:2]])
    kept = torch.tensor([0, 1, 4, 5, 6, 7])
    torch.testing.assert_close(result[1][kept][:, kept], short[0], **EXACT)
    assert float(result[1, 2:4].abs().sum() + result[1, :, 2:4].abs().sum()) == 0
    assert torch.isfinite(eq.consistency.nuclear_norm(result)).all()


def test_sinkhorn_and_dustbin():
    scores = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    result = soft_matching(scores, sinkhorn=200)
    torch.testing.assert_close(result.sum(-1), torch.ones(2, 5, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.sum(-2), torch.ones(2, 5, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    unmatched = soft_matching(torch.tensor([[9.0, 0.0], [0.0, -9.0]]), sinkhorn=50, dustbin=1.0)
    assert unmatched.shape == (2, 2)
    assert float(unmatched[0, 0]) > 0.9
    assert float(unmatched[1].sum()) < 0.5
    assert float(soft_matching(torch.zeros(2, 3), columns=torch.tensor([False] * 3)).sum()) == 0


@pytest.mark.parametrize("size", [2, 3, 7])
def test_synchronize_corrects_one_wrong_map(size):
    random = np.random.default_rng(size)
    right = torch.from_numpy(slow.consistent(5, size, random))
    wrong = right.clone()
    wrong[:size, size : 2 * size] = right[:size, size : 2 * size][:, torch.roll(torch.arange(size), 1)]
    wrong[size : 2 * size, :size] = wrong[:size, size : 2 * size].t()
    result = eq.consistency.synchronize(torch.stack([wrong, right]), num_modalities=5)
    torch.testing.assert_close(result, torch.stack([right, right]), rtol=0, atol=0)
    assert float(contradiction_excess(result).abs().max()) < 1e-9
    for kind in ("soft", "orthogonal"):
        near = eq.consistency.synchronize(wrong, num_modalities=5, kind=kind)
        assert near.shape == wrong.shape
        assert float(eq.consistency.cycle_error(near, num_modalities=5)) < float(
            eq.consistency.cycle_error(wrong, num_modalities=5)
        )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: consistency.nuclear_norm(torch.ones(2, 3)),
            ShapeError,
            r"nuclear_norm: expected a square matrix.*\(2, 3\)",
        ),
        (lambda: consistency.nuclear_norm(torch.ones(2, 2, dtype=torch.int64)), ShapeError, r"floating matrix.*int64"),
        (lambda: consistency.nuclear_norm(torch.full((2, 2), math.nan)), NonFiniteError, "expected finite numbers"),
        (lambda: consistency.nuclear_norm(torch.eye(2), method="grams"), ConfigError, "Did you mean 'gram'"),
        (
            lambda: consistency.consistency_score(torch.eye(5), num_modalities=2),
            ShapeError,
            r"2 equal blocks, got size 5",
        ),
        (lambda: consistency.consistency_score(torch.eye(5), sizes=(2, 2)), ShapeError, "add up to 5"),
        (lambda: consistency.consistency_score(torch.eye(4)), ConfigError, "got neither"),
        (lambda: consistency.consistency_score(torch.eye(4), num_modalities=1), ConfigError, "two or more modalities"),
        (lambda: consistency.cycle_error(torch.eye(4), num_modalities=1), ConfigError, "two or more modalities"),
        (
            lambda: consistency.synchronize(torch.eye(4), num_modalities=2, kind="harder"),
            ConfigError,
            "Did you mean 'hard'",
        ),
        (lambda: consistency.supermatrix({("a", "b"): I, ("c", "b"): I}), ConfigError, "none between 'a' and 'c'"),
        (lambda: consistency.supermatrix({("a", "b"): I, ("b", "c"): torch.ones(2, 3)}), ShapeError, "3 tokens of 'b'"),
        (lambda: consistency.supermatrix({("a", "b"): I / 0}), NonFiniteError, r"block \(a, b\): expected finite"),
        (lambda: consistency.supermatrix({("a", "b"): torch.ones(3)}), ShapeError, "expected a floating map"),
        (lambda: consistency.supermatrix({}), ShapeError, "at least one map"),
        (lambda: consistency.supermatrix([[None, I], [None]]), ShapeError, "2 rows of 2 blocks"),
        (lambda: consistency.supermatrix({(0, 1): I}, diagonal="self"), ConfigError, "'identity' or 'given'"),
        (lambda: supermatrix_from_tokens([I[None], torch.ones(1, 3, 2)]), ShapeError, "equal width"),
        (
            lambda: supermatrix_from_tokens([I[None]] * 2, masks=[torch.zeros(1, 3, dtype=torch.bool)] * 2),
            ShapeError,
            "a sample of padding alone",
        ),
        (lambda: supermatrix_from_attention(I, torch.tensor([0, 0, 2])), ShapeError, "tokens of every modality"),
        (lambda: supermatrix_from_attention(I, torch.tensor([0, 1])), ShapeError, r"\(3, 3\) and \(2,\)"),
    ],
)
def test_invalid_maps_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def random_tokens(*lengths, dim=5, batch=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        f"m{number}": eq.Tokens(torch.randn(batch, length, dim, generator=random, dtype=torch.float64))
        for number, length in enumerate(lengths)
    }


@pytest.mark.parametrize("kind", ["rank", "nuclear", "cycle"])
def test_minimizing_the_loss_makes_maps_consistent(kind):
    torch.manual_seed(0)
    parts = {name: torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for name in ("a", "b", "c")}
    loss = eq.consistency.ConsistencyLoss(slots=None, kind=kind, temperature=0.2)
    optimizer = torch.optim.Adam(parts.values(), lr=0.05)
    first = None
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(parts)
        first = float(value.detach()) if first is None else first
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.3 * first
    if kind == "rank":
        # The maps are not uniform: they become hard.
        matrix = loss.supermatrix(parts).detach()
        assert float(eq.consistency.consistency_score(matrix, num_modalities=3).mean()) > 0.9


def test_nuclear_norm_is_constant_on_consistent_maps():
    nothing, agreeing = TABLE["uniform"][0], TABLE["all correct"][0]
    assert float(eq.consistency.nuclear_norm(nothing)) == pytest.approx(float(eq.consistency.nuclear_norm(agreeing)))
    assert float(eq.consistency.effective_rank(nothing)) > float(eq.consistency.effective_rank(agreeing)) + 1


def test_slots_accept_any_number_of_tokens():
    loss = eq.consistency.ConsistencyLoss(5, slots=3).double()
    parts = random_tokens(7, 2, 11)
    matrix = loss.supermatrix(parts)
    assert matrix.shape == (3, 9, 9)
    value = loss(parts)
    assert 0 <= float(value.detach()) <= math.log(3) + 1e-6
    value.backward()
    assert float(loss.concepts.grad.abs().sum()) > 0
    random = torch.Generator().manual_seed(1)
    padded = {
        name: eq.Tokens(
            torch.cat([part.values, torch.randn(3, 2, 5, generator=random, dtype=torch.float64)], dim=1),
            mask=torch.arange(len(part) + 2).expand(3, -1) < len(part),
        )
        for name, part in parts.items()
    }
    torch.testing.assert_close(loss(padded), value, **SINGLE)


def test_loss_of_a_model_and_of_samples_with_missing_modalities():
    from helpers.fusion import batch, joint_model

    model = joint_model()
    loss = eq.consistency.ConsistencyLoss(12, slots=2).double()
    output = model(batch(missing=("audio",)))
    full = model({name: value[[1, 2, 4]] for name, value in batch().items()})
    torch.testing.assert_close(loss.penalty(output), loss(full), **EXACT)
    gone = model(batch() | {"audio": None})
    assert float(loss(gone).detach()) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(output).backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: consistency.ConsistencyLoss(slots=3), ConfigError, "dim, and slots >= 2"),
        (lambda: consistency.ConsistencyLoss(5, slots=1), ConfigError, "slots = 1"),
        (lambda: consistency.ConsistencyLoss(5, kind="ranks"), ConfigError, "Did you mean 'rank'"),
        (lambda: consistency.ConsistencyLoss(5, temperature=0.0), ConfigError, "temperature > 0"),
        (
            lambda: consistency.ConsistencyLoss(7, slots=2).double()(random_tokens(3, 3)),
            ShapeError,
            "'m0': expected width dim = 7",
        ),
        (lambda: consistency.ConsistencyLoss(slots=None)(random_tokens(3, 4)), ShapeError, "equally many tokens"),
        (
            lambda: consistency.ConsistencyLoss(5, slots=2).double()(random_tokens(3)),
            ConfigError,
            "two or more modalities",
        ),
    ],
)
def test_invalid_inputs_of_the_loss_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
