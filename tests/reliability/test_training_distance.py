"""Distances to the training data against loops, and the features from which they are computed."""

import pytest
import torch

import equipoise as eq
from equipoise.errors import ShapeError
from equipoise.reliability import training_distance
from equipoise.reliability.feature_statistics import input_features, token_features
from equipoise.reliability.training_distance import PROTOTYPES, TrainingDistance, TrainingFeatures
from helpers.tolerance import TOL


def collect_features(rows, *, seed=0, parts=3, most=PROTOTYPES):
    result = TrainingFeatures(torch.Generator().manual_seed(seed), most)
    for part in rows.chunk(parts):
        result.add(part)
    return result


def fit_distances(rows, *, covariance=False):
    distance = TrainingDistance()
    distance.fit(collect_features(rows), covariance=covariance, who="test")
    return distance


def test_nearest_neighbors_against_a_loop():
    random = torch.Generator().manual_seed(0)
    rows = 100 + 7 * torch.randn(97, 11, generator=random, dtype=torch.float64)
    new = 100 + 7 * torch.randn(13, 11, generator=random, dtype=torch.float64)
    z = (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)
    expected = []
    for one in (new - rows.mean(dim=0)) / rows.std(dim=0, correction=0):
        expected.append(sum(sorted(float((one - other).norm()) for other in z)[:5]) / 5)
    result = fit_distances(rows)(new)
    assert torch.allclose(result.exp(), torch.tensor(expected, dtype=torch.float64), **TOL[torch.float64])


def test_block_size_does_not_change_the_result(monkeypatch):
    rows, new = torch.randn(97, 11), torch.randn(13, 11)
    full = fit_distances(rows)(new)
    monkeypatch.setattr(training_distance, "BLOCK", 7)
    assert torch.allclose(fit_distances(rows)(new), full, **TOL[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_neighbors_in_half_precision(dtype):
    # Neighbors are close together in comparison with the rounding of squared norms.
    rows = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 64)
    distance = fit_distances(rows).to(dtype)
    new = (rows[:50] - distance.center.float()) / distance.scale.float()
    pairs = (new[:, None] - distance.references.float()).norm(dim=2)
    expected = pairs.topk(5, dim=1, largest=False).values.mean(dim=1)
    assert torch.allclose(distance(rows[:50]).exp(), expected, **TOL[torch.float32])


def test_mahalanobis_distance_uses_the_shrunk_covariance():
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(97, 5, generator=random, dtype=torch.float64) @ torch.randn(5, 5, generator=random).double()
    z = (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)
    matrix = 0.9 * z.T @ z / 97 + 0.1 * torch.eye(5, dtype=torch.float64)
    expected = torch.stack([(one @ matrix.inverse() @ one).sqrt() for one in z])
    assert torch.allclose(fit_distances(rows, covariance=True)(rows).exp(), expected, **TOL[torch.float64])


def test_prototypes_are_sampled_and_statistics_use_all_rows():
    rows = torch.arange(1000.0)[:, None]
    kept, mean, std = collect_features(rows, parts=37, most=50).result()
    assert len(kept) == 50
    assert torch.equal(kept, kept.sort(dim=0).values)
    assert 300 < float(kept.mean()) < 700
    assert mean.tolist() == [499.5]
    assert float(std) == pytest.approx(float(rows.std(correction=0)), rel=1e-6)
    assert torch.equal(collect_features(rows, parts=37, most=50).result()[0], kept)
    assert not torch.equal(collect_features(rows, parts=37, seed=1, most=50).result()[0], kept)


def test_non_finite_features_have_infinite_distance():
    rows = torch.randn(20, 3)
    rows[3, 1] = torch.nan
    distance = fit_distances(rows)
    assert len(distance.references) == 19
    result = distance(torch.tensor([[torch.nan, 0, 0], [0.0, 0, 0], [0, torch.inf, 0]]))
    assert result.isinf().tolist() == [True, False, True]


def test_constant_features_and_training_samples_have_finite_distances():
    rows = torch.cat([torch.randn(20, 2), torch.full((20, 1), 3.0)], dim=1)
    distance = fit_distances(rows[:1].expand(6, -1))
    assert float(distance(rows[:1])) == pytest.approx(-13.8, abs=0.1)
    assert bool(fit_distances(rows)(rows + 1).isfinite().all())


def test_too_few_training_samples_raise():
    with pytest.raises(ShapeError, match=r"two or more training samples .*got 1"):
        fit_distances(torch.zeros(1, 3))


def test_token_features_are_mean_and_deviation_over_valid_tokens():
    values = torch.randn(3, 5, 2, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    values[~mask] = torch.nan
    result = token_features(eq.Tokens(values, mask=mask))
    for sample, count in ((0, 5), (1, 2)):
        part = values[sample, :count]
        expected = torch.cat([part.mean(dim=0), part.std(dim=0, correction=0)])
        assert torch.allclose(result[sample], expected, **TOL[torch.float64])
    assert result[2].tolist() == [0] * 4


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 2, 5, 6), (4, 2, 3, 5, 6)])
def test_input_features_are_finite_and_ignore_masked_samples(shape):
    values = torch.randn(shape)
    mask = torch.tensor([True, True, False, True])
    result = input_features(values, mask, "test")
    values[2] = torch.nan
    assert torch.equal(input_features(values, mask, "test"), result)
    assert bool(result.isfinite().all())
    assert result.shape[0] == 4


def test_input_features_of_padded_sequences_ids_and_mappings():
    values = torch.randn(1, 4, 2)
    mask = torch.tensor([[True, True, True, False]])
    padded = torch.where(mask[..., None], values, torch.nan)
    assert torch.allclose(input_features(padded, mask, "test"), input_features(values[:, :3], None, "test"))
    ids = torch.tensor([[3, 3, 40, 0]])
    result = input_features(ids, None, "test")[0]
    assert float(result[0]) == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert result[1 + 3] == pytest.approx(2 / 3)
    assert result[1 + 8] == pytest.approx(1 / 3)
    both = input_features({"pixels": values, "ids": ids}, None, "test")
    assert torch.equal(both, torch.cat([input_features(values, None, "test"), result[None]], dim=1))
    with pytest.raises(ShapeError, match=r"a tensor \(batch, ...\) for distance='input', got str"):
        input_features("text", None, "test")
