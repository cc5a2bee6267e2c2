"""Ranks and what is made of them, compositionality, and how two spaces lie to each other: loops in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import oracles_align as slow
from equipoise.align.composition import CHANCE, additive_compositionality, winoground
from equipoise.align.retrieval import (
    PART,
    mean_average_precision,
    mean_rank,
    mean_reciprocal_rank,
    median_rank,
    ranks,
    recall_at_k,
    retrieval,
)
from equipoise.align.spaces import alignment, linear_cka, modality_gap, mutual_knn, uniformity
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from tolerance import TOL

EXACT = TOL[torch.float64]


def scene(seed, queries=7, items=11, levels=4):
    """Similarities with many ties, and who is relevant; the last query has nothing relevant."""
    random = torch.Generator().manual_seed(seed)
    similarity = torch.randint(levels, (queries, items), generator=random).double()
    relevant = torch.rand(queries, items, generator=random) < 0.3
    relevant[torch.arange(queries), torch.randint(items, (queries,), generator=random)] = True
    relevant[-1] = False
    return similarity, relevant


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(list(PART)))
def test_ranks_and_their_numbers(seed, ties):
    similarity, relevant = scene(seed)
    rows = [(row, true) for row, true in zip(similarity.tolist(), relevant.tolist(), strict=True) if any(true)]
    wanted = [slow.rank_of_best(row, true, PART[ties]) for row, true in rows]
    options = {"relevant": relevant, "ties": ties}
    assert ranks(similarity, relevant, ties=ties).tolist() == wanted
    for k in (1, 2, 5):
        assert recall_at_k(similarity, k, **options) == pytest.approx(sum(r <= k for r in wanted) / len(wanted))
    assert median_rank(similarity, **options) == pytest.approx(float(np.median(wanted)))
    assert mean_rank(similarity, **options) == pytest.approx(float(np.mean(wanted)))
    assert mean_reciprocal_rank(similarity, **options) == pytest.approx(float(np.mean([1 / r for r in wanted])))
    precision = [slow.average_precision(row, true, PART[ties]) for row, true in rows]
    assert mean_average_precision(similarity, **options) == pytest.approx(float(np.mean(precision)))


def test_a_model_that_says_the_same_of_all_is_at_chance():
    same = torch.zeros(9, 9)
    assert ranks(same).tolist() == [5.0] * 9
    assert (recall_at_k(same, 1), recall_at_k(same, 5)) == (0.0, 1.0)
    assert recall_at_k(same, 1, ties="optimistic") == 1.0
    assert recall_at_k(same, 8, ties="pessimistic") == 0.0


def test_one_relevant_item_makes_precision_the_reciprocal_rank():
    similarity = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    assert mean_average_precision(similarity) == pytest.approx(mean_reciprocal_rank(similarity))


def test_precision_is_scikit_learns_without_ties():
    from sklearn.metrics import average_precision_score

    relevant = scene(3)[1][:-1]
    similarity = torch.randn(relevant.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = np.mean([average_precision_score(y, s) for y, s in zip(relevant.numpy(), similarity.numpy(), strict=True)])
    assert mean_average_precision(similarity, relevant=relevant) == pytest.approx(wanted)


def test_both_directions_and_chance():
    similarity, relevant = scene(5, levels=50)
    there, back = retrieval(similarity, relevant=relevant, k=(1, 3))
    for found, matrix, mask in ((there, similarity, relevant), (back, similarity.mT, relevant.mT)):
        assert found.recall == {k: recall_at_k(matrix, k, relevant=mask) for k in (1, 3)}
        assert found.median_rank == median_rank(matrix, relevant=mask)
        assert found.mean_rank == mean_rank(matrix, relevant=mask)
        assert found.mean_reciprocal_rank == mean_reciprocal_rank(matrix, relevant=mask)
        assert found.mean_average_precision == mean_average_precision(matrix, relevant=mask)
        assert (found.queries, found.items) == (int(mask.any(dim=1).sum()), mask.shape[1])
        counts = [int(row.sum()) for row in mask if row.any()]
        items = mask.shape[1]
        for k in (1, 3):
            missed = [math.comb(items - r, k) / math.comb(items, k) for r in counts]
            assert found.chance[k] == pytest.approx(1 - sum(missed) / len(missed))
    assert retrieval(torch.eye(20))[0].chance == pytest.approx({1: 1 / 20, 5: 5 / 20, 10: 10 / 20})
    assert retrieval(torch.eye(3))[0].chance[10] == 1.0


def test_winoground():
    scores = torch.randint(3, (50, 2, 2), generator=torch.Generator().manual_seed(0))
    text = [s[0][0] > s[0][1] and s[1][1] > s[1][0] for s in scores.tolist()]
    image = [s[0][0] > s[1][0] and s[1][1] > s[0][1] for s in scores.tolist()]
    group = [a and b for a, b in zip(text, image, strict=True)]
    found = winoground(scores.float())
    assert found == pytest.approx([sum(solved) / 50 for solved in (text, image, group)])
    assert sum(group)
    # All orders of four different scores: chance itself.
    every = torch.tensor(list(itertools.permutations([1.0, 2.0, 3.0, 4.0]))).view(-1, 2, 2)
    assert winoground(every)._asdict() == pytest.approx(CHANCE)


def test_additive_compositionality():
    random = torch.Generator().manual_seed(0)
    parts = torch.randn(5, 2, 3, generator=random, dtype=torch.float64)
    whole = torch.randn(5, 3, generator=random, dtype=torch.float64)
    others = torch.randn(5, 4, 3, generator=random, dtype=torch.float64)

    def cos(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    for i in range(5):
        added = parts[i, 0] + parts[i, 1]
        wanted = cos(added, whole[i]) - sum(cos(added, other) for other in others[i]) / 4
        assert float(additive_compositionality(parts, whole, others)[i]) == pytest.approx(wanted)
        rest = [cos(added, whole[j]) for j in range(5) if j != i]
        assert float(additive_compositionality(parts, whole)[i]) == pytest.approx(cos(added, whole[i]) - sum(rest) / 4)


def clouds(seed=0, count=7, one=3, other=3):
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=random, dtype=torch.float64) for width in (one, other))


def test_gap_alignment_uniformity():
    a, b = (F.normalize(x, dim=1) for x in clouds())
    mean = [np.mean(x.numpy(), axis=0) for x in (a, b)]
    assert float(modality_gap(a, b)) == pytest.approx(math.dist(*mean))
    assert float(alignment(a, b)) == pytest.approx(sum(math.dist(x, y) ** 2 for x, y in zip(a, b, strict=True)) / 7)
    pairs = [math.exp(-2 * math.dist(a[i], a[j]) ** 2) for i, j in itertools.combinations(range(7), 2)]
    assert float(uniformity(a)) == pytest.approx(math.log(sum(pairs) / len(pairs)))
    assert float(uniformity(torch.ones(5, 2))) == 0.0
    assert float(modality_gap(a, b[:3])) == pytest.approx(math.dist(mean[0], np.mean(b[:3].numpy(), axis=0)))
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    for measure in (modality_gap, alignment, linear_cka):
        assert torch.autograd.gradcheck(measure, leaves)
    assert torch.autograd.gradcheck(uniformity, leaves[:1])


def test_linear_cka():
    a, b = clouds(count=11, one=3, other=5)
    gram = []
    for x in (a, b):
        centred = x.numpy() - x.numpy().mean(axis=0)
        gram.append(centred @ centred.T)
    wanted = (gram[0] * gram[1]).sum() / math.sqrt((gram[0] ** 2).sum() * (gram[1] ** 2).sum())
    assert float(linear_cka(a, b)) == pytest.approx(wanted)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert float(linear_cka(a, 7 * a @ turn + 3)) == pytest.approx(1.0)
    assert linear_cka(a, torch.ones_like(b)).isnan()


def test_mutual_neighbours():
    a, b = clouds(count=11, one=3, other=5)

    def near(x, i, k):
        unit = x / x.norm(dim=1, keepdim=True)
        return set(sorted((j for j in range(11) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:k])

    for k in (1, 3, 10):
        wanted = sum(len(near(a, i, k) & near(b, i, k)) for i in range(11)) / (11 * k)
        assert mutual_knn(a, b, k=k) == pytest.approx(wanted)
    assert mutual_knn(a, 5 * a, k=2) == 1.0


def test_errors():
    square = torch.zeros(3, 3)
    with pytest.raises(ShapeError, match=r"ranks: expected similarities \(query, item\), square where relevant"):
        ranks(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"ranks relevant: expected a boolean mask \(query, item\) = \(3, 3\)"):
        ranks(square, torch.ones(3, 3))
    with pytest.raises(ShapeError, match=r"ranks: expected at least one relevant item, got none. Is the split empty"):
        recall_at_k(torch.zeros(0, 0), 1)
    with pytest.raises(NonFiniteError, match="mean_average_precision: expected finite similarities"):
        mean_average_precision(square * math.nan)
    with pytest.raises(ConfigError, match="ranks: expected a known treatment of ties, got 'half'"):
        ranks(square, ties="half")
    with pytest.raises(ConfigError, match="recall_at_k: expected k >= 1, got k = 0"):
        recall_at_k(square, 0)
    with pytest.raises(ShapeError, match=r"winoground: expected \(example, image, caption\)"):
        winoground(torch.zeros(0, 2, 2))
    with pytest.raises(NonFiniteError, match="winoground: expected scores, got NaN"):
        winoground(torch.full((1, 2, 2), math.nan))
    with pytest.raises(ShapeError, match=r"additive_compositionality: expected parts \(sample, part, dim\)"):
        additive_compositionality(torch.zeros(2, 2, 3), torch.zeros(3, 3))
    with pytest.raises(ShapeError, match="additive_compositionality: expected two or more samples, or distractors"):
        additive_compositionality(torch.zeros(1, 2, 3), torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="additive_compositionality distractors"):
        additive_compositionality(torch.zeros(1, 2, 3), torch.zeros(1, 3), torch.zeros(1, 0, 3))
    with pytest.raises(ShapeError, match=r"alignment b: expected a's size \(2, 3\), got \(3, 3\)"):
        alignment(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ShapeError, match=r"uniformity a: expected .* with 2 or more samples"):
        uniformity(torch.zeros(1, 3))
    with pytest.raises(ShapeError, match=r"modality_gap a: expected .* with 1 or more samples"):
        modality_gap(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ConfigError, match="mutual_knn: expected 1 <= k < samples = 3, got k = 3"):
        mutual_knn(square, square, k=3)
