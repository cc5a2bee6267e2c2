"""Distributions of keys around the query, against loops."""

import json
import math

import pytest
import torch

from equipoise.diagnostics.key_plot_data import key_distribution
from equipoise.diagnostics.prediction_collection import CollectedPredictions, collect_predictions
from equipoise.errors import ConfigError
from helpers.fusion import batch, joint_model, oracle_samples

NAMES = ("audio", "image", "text")


def test_against_loops():
    model = joint_model(NAMES)
    batches = [batch(NAMES, seed=seed, missing=("image",)) for seed in range(2)]
    result = key_distribution(collect_predictions(model, batches))
    for label, name in enumerate(NAMES):
        cosines, lengths = [], []
        for query, key, labels, valid, _ in oracle_samples(model, batches):
            for head in range(query.shape[0]):
                own = [k for k, m, v in zip(key[head], labels, valid, strict=True) if m == label and v]
                if own:
                    mean = sum(own) / len(own)
                    length, row = math.sqrt(float(mean @ mean)), query[head, 0]
                    cosines.append(float(row @ mean) / length / math.sqrt(float(row @ row)))
                    lengths.append(length)
        counts = [0] * 40
        for value in cosines:
            counts[min(int((value + 1) / 0.05), 39)] += 1
        assert result[name]["cosine"]["counts"] == counts
        assert result[name]["cosine_mean"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)
        assert result[name]["norm_mean"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
        spread = math.sqrt(sum((v - result[name]["norm_mean"]) ** 2 for v in lengths) / len(lengths))
        assert result[name]["norm_std"] == pytest.approx(spread, rel=1e-4)
    json.dumps(result, allow_nan=False)


def test_cosines_are_clamped_and_absent_modalities_are_none():
    cosine = torch.tensor([[[1.0000001, math.nan]], [[-1.0000001, math.nan]]])
    result = key_distribution(
        CollectedPredictions(torch.zeros(2, 1), torch.zeros(2), ("a", "b"), None, cosine, cosine.abs())
    )
    assert sum(result["a"]["cosine"]["counts"]) == 2
    assert result["b"]["cosine_mean"] is None
    assert sum(result["b"]["cosine"]["counts"]) == 0


def test_without_attention():
    with pytest.raises(ConfigError, match="key_distribution: expected a model with attention"):
        key_distribution(CollectedPredictions(torch.zeros(2, 1), torch.zeros(2), ("a", "b")))
