"""Rows of shares, and their mean as a metric over batches and processes, against loops."""

import json
import math
import pickle
import subprocess
import sys

import pytest
import torch

from equipoise.diagnostics.share_accumulation import share_statistics
from equipoise.diagnostics.share_metric import ModalityShare
from equipoise.errors import ConfigError, ShapeError
from helpers.tolerance import TOL
from oracles.plain import mean

NAMES = ("audio", "image", "text")
SAMPLES, HEADS = 7, 2


def random_shares(seed, count, heads=HEADS, samples=SAMPLES):
    random = torch.Generator().manual_seed(seed)
    result = torch.randn(samples, heads, count + 1, generator=random, dtype=torch.float64).softmax(dim=-1)[..., :count]
    result[::3, :, -1] = math.nan
    return result


def expected_rows(layer, share, names):
    for head in range(share.shape[1]):
        for m, name in enumerate(names):
            there = [value for value in share[:, head, m].tolist() if not math.isnan(value)]
            yield {
                "layer": layer,
                "head": head,
                "modality": name,
                "samples": len(there),
                "mean": mean(there),
                "std": math.sqrt(mean((value - mean(there)) ** 2 for value in there)),
                "min": min(there),
                "max": max(there),
            }


def assert_rows_equal(result, expected):
    assert len(result) == len(expected)
    for one, other in zip(result, expected, strict=True):
        assert list(one) == list(other)
        assert one == {key: pytest.approx(value) if isinstance(value, float) else value for key, value in other.items()}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_against_loops(count):
    names, layers = NAMES[:count], [random_shares(seed, count) for seed in range(3)]
    expected = [row for layer, share in enumerate(layers) for row in expected_rows(layer, share, names)]
    assert_rows_equal(share_statistics(torch.stack(layers), names), expected)
    assert_rows_equal(share_statistics(layers[0], names), expected[: HEADS * count])
    sites = {"blocks.0": layers[0], "fusion.attention": random_shares(5, count, heads=3)}
    result = share_statistics(sites, names)
    assert_rows_equal(result, [row for site, share in sites.items() for row in expected_rows(site, share, names)])
    json.dumps(result, allow_nan=False)


def test_modality_without_samples():
    share = torch.tensor([[[0.25, math.nan]], [[0.75, math.nan]]])
    first, second = share_statistics(share, NAMES[:2])
    assert (first["mean"], first["std"], first["min"], first["max"]) == (0.5, 0.25, 0.25, 0.75)
    assert second["samples"] == 0
    assert {second[key] for key in ("mean", "std", "min", "max")} == {None}


def test_rows_errors():
    share = torch.ones(5, 2, 3)
    for wrong in (share[0], share[:0], share[None, None], {"a": share[:0]}):
        with pytest.raises(ShapeError, match=r"share_statistics share: expected .*\(sample, head, modality\)"):
            share_statistics(wrong, NAMES)
    with pytest.raises(ShapeError, match=r"names: expected one name for each modality = 3, got 2: audio, image"):
        share_statistics(share, NAMES[:2])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_metric_is_the_mean_over_all_batches(count):
    parts = [random_shares(seed, count, samples=samples) for seed, samples in enumerate((5, 1, 3, 0))]
    metric = ModalityShare(count, heads=HEADS).set_dtype(torch.float64)
    for part in parts:
        metric.update(part)
    expected = [[rows_mean(torch.cat(parts)[:, head, m]) for m in range(count)] for head in range(HEADS)]
    torch.testing.assert_close(metric.compute(), torch.tensor(expected, dtype=torch.float64), **TOL[torch.float64])
    again = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(again.compute(), metric.compute(), **TOL[torch.float64])
    metric.reset()
    metric.update(parts[0])
    expected = [[rows_mean(parts[0][:, head, m]) for m in range(count)] for head in range(HEADS)]
    torch.testing.assert_close(metric.compute(), torch.tensor(expected, dtype=torch.float64), **TOL[torch.float64])


def rows_mean(values):
    return mean(value for value in values.tolist() if not math.isnan(value))


def test_metric_sums_over_processes():
    parts = [random_shares(seed, 2, samples=samples).float() for seed, samples in enumerate((5, 3))]
    metrics = [ModalityShare(2, heads=HEADS) for _ in parts]
    for metric, part in zip(metrics, parts, strict=True):
        metric.update(part)
    gathered = {}
    for name, reduce in metrics[0]._reductions.items():
        gathered[name] = reduce(torch.stack([getattr(metric, name) for metric in metrics]))
    expected = ModalityShare(2, heads=HEADS)
    expected.update(torch.cat(parts))
    assert gathered["samples"].tolist() == expected.samples.tolist()
    torch.testing.assert_close(gathered["total"] / gathered["samples"], expected.compute(), **TOL[torch.float32])


def test_metric_of_half_precision_and_of_no_samples():
    metric = ModalityShare(2)
    batch = torch.tensor([[[0.25, math.nan]]], dtype=torch.bfloat16)
    assert metric(batch).isnan().tolist() == [[False, True]]
    for _ in range(1000):
        metric.update(batch)
    assert metric.compute()[0, 0] == 0.25  # bfloat16 itself stops counting at 256
    assert not ModalityShare(2)(torch.rand(3, 1, 2, requires_grad=True)).requires_grad


def test_metric_errors():
    for options in ({"num_modalities": 0}, {"num_modalities": 2, "heads": 0}):
        with pytest.raises(ConfigError, match=r"ModalityShare: expected num_modalities >= 1 and heads >= 1, got"):
            ModalityShare(**options)
    metric = ModalityShare(2, heads=3)
    for wrong in (torch.ones(5, 2, 2), torch.ones(5, 2), torch.ones(5, 3, 2).long()):
        with pytest.raises(ShapeError, match=r"ModalityShare: .*with \(head, modality\) = \(3, 2\), got shape"):
            metric.update(wrong)


def test_diagnose_does_not_load_torchmetrics():
    code = "import sys, equipoise.diagnostics.share_accumulation; assert 'torchmetrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
