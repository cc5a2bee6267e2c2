"""Standardization of features with the statistics of the training split."""

import pytest
import torch

from equipoise.data.feature_scaling import FeatureScaling, valid_statistics
from helpers.tolerance import TOL


def test_statistics_of_each_feature_over_valid_steps():
    torch.manual_seed(0)
    values = 3 + 5 * torch.randn(7, 11, 2)
    mask = torch.rand(7, 11) < 0.6
    scaled = FeatureScaling.fit(values, mask)(values, mask)
    valid = torch.stack([scaled[i, j] for i in range(7) for j in range(11) if mask[i, j]])
    torch.testing.assert_close(valid.mean(dim=0), torch.zeros(2), **TOL[torch.float32])
    torch.testing.assert_close(valid.std(dim=0, correction=0), torch.ones(2), **TOL[torch.float32])
    assert (scaled[~mask] == 0).all()
    mean, std = valid_statistics(scaled, mask)
    assert (mean, std) == pytest.approx((0, 1), abs=1e-6)


def test_masked_values_have_no_influence():
    values, mask = torch.randn(5, 3, 2), torch.tensor([[True, True, False]] * 5)
    hidden = values.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(FeatureScaling.fit(hidden, mask)(hidden, mask), FeatureScaling.fit(values, mask)(values, mask))


def test_constant_features_are_only_centered():
    scaling = FeatureScaling.fit(torch.full((5, 2), 0.1) * torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(scaling(torch.tensor([[1.1, 2.0]])), torch.tensor([[1.0, 2.0]]), **TOL[torch.float32])
