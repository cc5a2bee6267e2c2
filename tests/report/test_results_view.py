"""readings.py: curves, histograms and names out of whole and partial results."""

import numpy as np
import pytest

from equipoise.report import comparison_text
from helpers.fake_results import attending, one, read


def test_curve_is_the_mean_over_runs_with_the_epoch():
    runs = [one("m", 0, history=[{"epoch": 1, "air": 0.1}, {"epoch": 2, "air": 0.3}]),
            one("m", 1, history=[{"epoch": 1, "air": 0.5}, {"epoch": 2, "air": None}]), one("m", 2)]  # fmt: skip
    curve = read(runs).curve("m", "air")
    np.testing.assert_allclose(curve.mean, [0.3, 0.3])
    assert curve.epochs.tolist() == [1, 2]
    assert read(runs).curve("m", "share", "audio") is None


def test_rotations_are_counted_at_increments():
    history = [
        [{"epoch": e, "rotations": n} for e, n in enumerate(counts, 1)] for counts in ([0, 0, 1, 1, 2], [0, 0, 1, 1, 1])
    ]
    assert read([one("m", s, history=h) for s, h in enumerate(history)]).rotation_epochs("m") == {3: 2, 5: 1}


def test_histograms_weight_runs_equally_over_different_bins():
    def run(seed, edges, counts):
        return one("m", seed) | {"shares": {"clean": {"edges": edges, "counts": counts}}}

    same = read([run(0, [0, 0.5, 1], [2, 0]), run(1, [0, 0.5, 1], [0, 200])]).histogram("m", "shares", "clean")
    np.testing.assert_allclose(same.fraction, [0.5, 0.5])
    assert same.mean == pytest.approx(0.5)
    other = read([run(0, [0, 0.5, 1], [1, 0]), run(1, [1, 2, 3], [0, 1])]).histogram("m", "shares", "clean")
    np.testing.assert_allclose(other.edges, [0, 1.5, 3])
    np.testing.assert_allclose(other.fraction, [0.5, 0.5])
    assert read([run(0, [0, 1], [0])]).histogram("m", "shares", "clean") is None


def test_protocol_gives_the_corrupted_modality():
    readings = read([attending("joint", 0, None)], noise_modality="image")
    assert readings.noise_modality == readings.disturbed("joint") == "image"


def test_unimodal_runs_are_unaffected_by_other_modalities():
    runs = [
        one("image", 0, **{"accuracy": 0.6, "accuracy_noise/image": 0.1}),
        one("joint", 0, **{"accuracy_noise/audio": 0.2}),
    ]
    readings = read(runs)
    assert readings.values("image", "accuracy_noise/audio") == [0.6]
    assert readings.values("image", "accuracy_noise/image") == [0.1]
    assert readings.values("joint", "accuracy_noise/image") == []
    assert "image 60.0 % and joint 20.0 %" in comparison_text.scores_text(readings, "accuracy_noise/audio")
