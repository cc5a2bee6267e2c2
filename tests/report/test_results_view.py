"""readings.py: curves, histograms and names out of whole and partial results."""

import numpy as np
import pytest

from equipoise.report import comparison_text
from helpers.fake_results import fake_run, fake_run_with_r, results_view


def test_curve_is_the_mean_over_runs_with_the_epoch():
    runs = [
        fake_run("m", 0, history=[{"epoch": 1, "air": 0.1}, {"epoch": 2, "air": 0.3}]),
        fake_run("m", 1, history=[{"epoch": 1, "air": 0.5}, {"epoch": 2, "air": None}]),
        fake_run("m", 2),
    ]
    curve = results_view(runs).curve("m", "air")
    np.testing.assert_allclose(curve.mean, [0.3, 0.3])
    assert curve.epochs.tolist() == [1, 2]
    assert results_view(runs).curve("m", "share", "audio") is None


def test_rotations_are_counted_at_increments():
    history = [
        [{"epoch": e, "rotations": n} for e, n in enumerate(counts, 1)] for counts in ([0, 0, 1, 1, 2], [0, 0, 1, 1, 1])
    ]
    assert results_view([fake_run("m", s, history=h) for s, h in enumerate(history)]).rotation_epochs("m") == {
        3: 2,
        5: 1,
    }


def test_histograms_weight_runs_equally_over_different_bins():
    def run(seed, edges, counts):
        return fake_run("m", seed) | {"shares": {"clean": {"edges": edges, "counts": counts}}}

    same = results_view([run(0, [0, 0.5, 1], [2, 0]), run(1, [0, 0.5, 1], [0, 200])]).histogram("m", "shares", "clean")
    np.testing.assert_allclose(same.fraction, [0.5, 0.5])
    assert same.mean == pytest.approx(0.5)
    other = results_view([run(0, [0, 0.5, 1], [1, 0]), run(1, [1, 2, 3], [0, 1])]).histogram("m", "shares", "clean")
    np.testing.assert_allclose(other.edges, [0, 1.5, 3])
    np.testing.assert_allclose(other.fraction, [0.5, 0.5])
    assert results_view([run(0, [0, 1], [0])]).histogram("m", "shares", "clean") is None


def test_protocol_gives_the_corrupted_modality():
    readings = results_view([fake_run_with_r("joint", 0, None)], noise_modality="image")
    assert readings.noise_modality == readings.disturbed("joint") == "image"


def test_unimodal_runs_are_unaffected_by_other_modalities():
    runs = [
        fake_run("image", 0, **{"accuracy": 0.6, "accuracy_noise/image": 0.1}),
        fake_run("joint", 0, **{"accuracy_noise/audio": 0.2}),
    ]
    readings = results_view(runs)
    assert readings.values("image", "accuracy_noise/audio") == [0.6]
    assert readings.values("image", "accuracy_noise/image") == [0.1]
    assert readings.values("joint", "accuracy_noise/image") == []
    assert "image 60.0 % and joint 20.0 %" in comparison_text.scores_text(readings, "accuracy_noise/audio")
