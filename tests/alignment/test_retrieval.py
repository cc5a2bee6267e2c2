"""Retrieval metrics, compositionality and embedding metrics against loops in float64."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F

from equipoise.alignment.metrics.compositionality import CHANCE, additive_compositionality, winoground
from equipoise.alignment.metrics.embedding_metrics import alignment, linear_cka, modality_gap, mutual_knn, uniformity
from equipoise.alignment.metrics.retrieval_metrics import (
    found_within,
    mean_average_precision,
    mean_rank,
    mean_reciprocal_rank,
    median_rank,
    ranks,
    recall_at_k,
    retrieval,
)
from equipoise.alignment.metrics.tie_ranking import TIES, _count_distribution, similarities
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from helpers.tolerance import TOL
from oracles import align as slow

EXACT = TOL[torch.float64]


def tied_similarities(seed, queries=4, items=5, levels=3):
    """Returns similarities with many ties and the relevant items; the last query has no relevant item."""
    random = torch.Generator().manual_seed(seed)
    similarity = torch.randint(levels, (queries, items), generator=random).double()
    relevant = torch.rand(queries, items, generator=random) < 0.3
    relevant[torch.arange(queries), torch.randint(items, (queries,), generator=random)] = True
    relevant[-1] = False
    return similarity, relevant


def mean(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(TIES), st.integers(1, 3), st.sampled_from([3, 4]))
def test_all_metrics_are_means_over_all_orders_of_ties(seed, ties, levels, queries):
    similarity, relevant = tied_similarities(seed, queries, levels=levels)
    rows = [(row, true) for row, true in zip(similarity.tolist(), relevant.tolist(), strict=True) if any(true)]
    orders = [slow.orders(row, true, ties) for row, true in rows]
    first = [[slow.rank_of_first(order) for order in each] for each in orders]
    options = {"relevant": relevant, "ties": ties}
    assert ranks(similarity, relevant, ties=ties).tolist() == pytest.approx([np.mean(each) for each in first])
    for k in (1, 2, 4, 5, 9):
        result = [np.mean([rank <= k for rank in each]) for each in first]
        assert found_within(similarity, k, **options).tolist() == pytest.approx(result)
        assert recall_at_k(similarity, k, **options) == mean(result)
    assert mean_rank(similarity, **options) == mean(np.mean(each) for each in first)
    assert mean_reciprocal_rank(similarity, **options) == mean(np.mean([1 / r for r in each]) for each in first)
    precision = [np.mean([slow.average_precision(order) for order in each]) for each in orders]
    assert mean_average_precision(similarity, **options) == mean(precision)
    # The orders of the queries are independent: enumerate all combinations of ranks with their frequencies.
    counts = [Counter(each) for each in first]
    medians = [
        (np.median(chosen), math.prod(count[rank] / count.total() for count, rank in zip(counts, chosen, strict=True)))
        for chosen in itertools.product(*counts)
    ]
    assert median_rank(similarity, **options) == pytest.approx(sum(median * weight for median, weight in medians))


@pytest.mark.parametrize(("items", "k"), [(4, 1), (4, 3), (10, 5), (10, 6), (19, 10)])
def test_constant_model_scores_at_chance(items, k):
    same = torch.zeros(items, items)
    assert recall_at_k(same, k) == pytest.approx(k / items)
    assert (recall_at_k(same, 1, ties="optimistic"), recall_at_k(same, items - 1, ties="pessimistic")) == (1.0, 0.0)
    result = retrieval(same, k=(1, k))[0]
    assert result.recall == pytest.approx(result.chance)
    assert result.mean_rank == pytest.approx((items + 1) / 2)
    assert result.mean_reciprocal_rank == pytest.approx(sum(1 / rank for rank in range(1, items + 1)) / items)
    # With several relevant items, too.
    relevant = torch.arange(items)[:, None] // 2 == torch.arange(items) // 2
    result = retrieval(same, relevant=relevant, k=(1, k))[0]
    assert result.recall == pytest.approx(result.chance)


def test_equal_captions_share_the_first_rank():
    scores = torch.eye(4)
    scores[:2, :2] = 1.0
    assert recall_at_k(scores, 1) == pytest.approx(0.75)
    # Adjacent float32 numbers are not ties.
    scores[0, 1] = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert found_within(scores, 1).tolist() == [1.0, 0.5, 1.0, 1.0]


def test_median_rank_of_tied_queries():
    queries, items = 301, 200
    scores = torch.zeros(queries, items)
    relevant = torch.zeros_like(scores, dtype=torch.bool)
    relevant[:, 7] = True
    # The 151st of 301 ranks, each uniform in 1 to 200.
    expected = sum(stats.binom.cdf(150, queries, value / items) for value in range(items))
    assert median_rank(scores, relevant=relevant) == pytest.approx(expected)
    p = torch.rand(3, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = _count_distribution(p)
    for row, result in zip(p.tolist(), counts.tolist(), strict=True):
        slowly = np.array([1.0])
        for chance in row:
            slowly = np.convolve(slowly, [1 - chance, chance])
        assert result[:98] == pytest.approx(slowly.tolist(), abs=1e-12)


def test_equal_vectors_have_equal_similarities():
    random = torch.Generator().manual_seed(0)
    one, other = F.normalize(torch.randn(1, 33, generator=random)), F.normalize(torch.randn(101, 33, generator=random))
    result = similarities(other, one.expand(517, -1).contiguous())
    assert (result == result[:, :1]).all()
    torch.testing.assert_close(result, other @ one.expand(517, -1).T)


def test_one_relevant_item_makes_precision_the_reciprocal_rank():
    similarity = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    assert mean_average_precision(similarity) == pytest.approx(mean_reciprocal_rank(similarity))


def test_average_precision_equals_scikit_learn_without_ties():
    from sklearn.metrics import average_precision_score

    relevant = tied_similarities(3, 7, 11)[1][:-1]
    similarity = torch.randn(relevant.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = np.mean(
        [average_precision_score(y, s) for y, s in zip(relevant.numpy(), similarity.numpy(), strict=True)]
    )
    assert mean_average_precision(similarity, relevant=relevant) == pytest.approx(expected)


def test_both_directions_and_chance():
    similarity, relevant = tied_similarities(5, 7, 11, levels=50)
    there, back = retrieval(similarity, relevant=relevant, k=(1, 3))
    for result, matrix, mask in ((there, similarity, relevant), (back, similarity.mT, relevant.mT)):
        assert result.recall == {k: recall_at_k(matrix, k, relevant=mask) for k in (1, 3)}
        assert result.median_rank == median_rank(matrix, relevant=mask)
        assert result.mean_rank == mean_rank(matrix, relevant=mask)
        assert result.mean_reciprocal_rank == mean_reciprocal_rank(matrix, relevant=mask)
        assert result.mean_average_precision == mean_average_precision(matrix, relevant=mask)
        assert (result.queries, result.items) == (int(mask.any(dim=1).sum()), mask.shape[1])
        counts = [int(row.sum()) for row in mask if row.any()]
        items = mask.shape[1]
        for k in (1, 3):
            missed = [math.comb(items - r, k) / math.comb(items, k) for r in counts]
            assert result.chance[k] == pytest.approx(1 - sum(missed) / len(missed))
    assert retrieval(torch.eye(20))[0].chance == pytest.approx({1: 1 / 20, 5: 5 / 20, 10: 10 / 20})
    assert retrieval(torch.eye(3))[0].chance[10] == 1.0


@pytest.mark.parametrize("ties", TIES)
def test_winoground(ties):
    scores = torch.randint(3, (50, 2, 2), generator=torch.Generator().manual_seed(0))
    solved = {"text": [], "image": [], "group": []}
    for (a, b), (c, d) in scores.tolist():
        orders = [dict(zip("abcd", order, strict=True)) for order in itertools.permutations(range(4))]
        if ties != "average":
            sign = 1 if ties == "optimistic" else -1
            orders = [{"a": sign, "b": 0, "c": 0, "d": sign}]
        text = [(a, o["a"]) > (b, o["b"]) and (d, o["d"]) > (c, o["c"]) for o in orders]
        image = [(a, o["a"]) > (c, o["c"]) and (d, o["d"]) > (b, o["b"]) for o in orders]
        for name, each in (("text", text), ("image", image), ("group", np.array(text) & np.array(image))):
            solved[name].append(np.mean(each))
    result = winoground(scores.float(), ties=ties)
    assert result._asdict() == pytest.approx({name: np.mean(each) for name, each in solved.items()})
    assert 0 < result.group < 1
    # All orders of four different scores: the chance level.
    every = torch.tensor(list(itertools.permutations([1.0, 2.0, 3.0, 4.0]))).view(-1, 2, 2)
    assert winoground(every, ties=ties)._asdict() == pytest.approx(CHANCE)


def test_winoground_of_constant_model_is_at_chance():
    assert winoground(torch.zeros(1, 2, 2))._asdict() == pytest.approx(CHANCE)
    # The paper counts equal scores as wrong.
    assert winoground(torch.zeros(1, 2, 2), ties="pessimistic") == (0.0, 0.0, 0.0)


def test_additive_compositionality():
    random = torch.Generator().manual_seed(0)
    parts = torch.randn(5, 2, 3, generator=random, dtype=torch.float64)
    full = torch.randn(5, 3, generator=random, dtype=torch.float64)
    others = torch.randn(5, 4, 3, generator=random, dtype=torch.float64)

    def cos(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    for i in range(5):
        added = parts[i, 0] + parts[i, 1]
        expected = cos(added, full[i]) - sum(cos(added, other) for other in others[i]) / 4
        assert float(additive_compositionality(parts, full, others)[i]) == pytest.approx(expected)
        rest = [cos(added, full[j]) for j in range(5) if j != i]
        assert float(additive_compositionality(parts, full)[i]) == pytest.approx(cos(added, full[i]) - sum(rest) / 4)


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
        centered = x.numpy() - x.numpy().mean(axis=0)
        gram.append(centered @ centered.T)
    expected = (gram[0] * gram[1]).sum() / math.sqrt((gram[0] ** 2).sum() * (gram[1] ** 2).sum())
    assert float(linear_cka(a, b)) == pytest.approx(expected)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert float(linear_cka(a, 7 * a @ turn + 3)) == pytest.approx(1.0)
    assert linear_cka(a, torch.ones_like(b)).isnan()


def test_mutual_neighbors():
    a, b = clouds(count=11, one=3, other=5)

    def near(x, i, k):
        unit = x / x.norm(dim=1, keepdim=True)
        return set(sorted((j for j in range(11) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:k])

    for k in (1, 3, 10):
        expected = sum(len(near(a, i, k) & near(b, i, k)) for i in range(11)) / (11 * k)
        assert mutual_knn(a, b, k=k) == pytest.approx(expected)
    assert mutual_knn(a, 5 * a, k=2) == 1.0


def test_tied_neighbors_use_expected_values():
    collapsed, (a, _) = torch.ones(11, 3), clouds(count=11)
    for other in (collapsed, a):
        assert mutual_knn(collapsed, other, k=3) == pytest.approx(3 / 10)
    # Two directions with three and four vectors: enumerate all neighborhoods.
    labels = [0, 0, 0, 1, 1, 1, 1]
    two = torch.eye(2)[labels]
    for k in (1, 2, 3, 4):
        shared = []
        for i in range(7):
            others = [j for j in range(7) if j != i]
            sets = [
                set(chosen)
                for chosen in itertools.combinations(others, k)
                if all(
                    labels[j] == labels[i] or {h for h in others if labels[h] == labels[i]} <= set(chosen)
                    for j in chosen
                )
            ]
            shared.append(np.mean([len(one & other) for one in sets for other in sets]))
        assert mutual_knn(two, two, k=k) == pytest.approx(np.mean(shared) / k)


def test_errors():
    square = torch.zeros(3, 3)
    with pytest.raises(ShapeError, match=r"ranks: expected similarities \(query, item\), square where relevant"):
        ranks(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"ranks relevant: expected a boolean mask \(query, item\) = \(3, 3\)"):
        ranks(square, torch.ones(3, 3))
    with pytest.raises(
        ShapeError, match=r"recall_at_k: expected at least one relevant item, got none. Is the split empty"
    ):
        recall_at_k(torch.zeros(0, 0), 1)
    with pytest.raises(NonFiniteError, match="mean_average_precision: expected finite similarities"):
        mean_average_precision(square * math.nan)
    with pytest.raises(ConfigError, match="ranks: expected a known treatment of ties, got 'half'"):
        ranks(square, ties="half")
    with pytest.raises(ConfigError, match="recall_at_k: expected k >= 1, got k = 0"):
        recall_at_k(square, 0)
    with pytest.raises(ConfigError, match="retrieval: expected k >= 1, got k = 0"):
        retrieval(square, k=(1, 0))
    with pytest.raises(ConfigError, match="found_within: expected k >= 1, got k = -1"):
        found_within(square, -1)
    with pytest.raises(ConfigError, match="winoground: expected a known treatment of ties, got 'half'"):
        winoground(torch.zeros(1, 2, 2), ties="half")
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
