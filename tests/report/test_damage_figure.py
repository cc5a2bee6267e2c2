"""Figure of scores under damage: panels, intervals, and the best intact modality."""

import re

import numpy as np
import pytest
from scipy import stats

from equipoise.report.damage_figure import (
    best_intact,
    confidence_interval,
    damage,
    damage_metrics,
    damage_png,
    damage_text,
)
from equipoise.report.results_view import ResultsView
from equipoise.results import result_rows
from helpers.fake_results import fake_results


def with_damage():
    content = fake_results(methods=("audio", "image", "concat", "joint+rollingq"), seeds=3, epochs=2)
    for number, run in enumerate(content["runs"]):
        run["metrics"] |= {"accuracy_corrupted/audio": 0.4 + number / 100, "accuracy_corrupted/image": 0.3}
    return result_rows.build_results(content["runs"], {**content["protocol"], "test_corruptions": ["zeros"]})


def test_interval_is_that_of_scipy():
    values = [0.4, 0.5, 0.7]
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert confidence_interval(values) == pytest.approx(expected)
    assert confidence_interval([0.5]) is None


def test_best_intact_modality_is_another_one():
    view = ResultsView(fake_results())
    assert best_intact(view, "audio") == ("image", view.values("image", "accuracy"))
    assert best_intact(ResultsView(fake_results(methods=("joint",))), "audio") is None


def test_each_damage_has_a_panel():
    view = ResultsView(with_damage())
    text = re.sub(r"<[^>]+>", "\n", damage(view))
    for title in ("audio replaced by noise", "image replaced by noise", "audio damaged: zeros", "image damaged: zeros"):
        assert title in text
        assert title in damage_text(view)
    assert "audio damaged: zeros: the best fusion is joint+rollingq with 50.0 %" in damage_text(view)
    assert damage_png(view)[:4] == b"\x89PNG"


def test_single_panels_share_their_horizontal_axis():
    view = ResultsView(with_damage())
    metrics = damage_metrics(view)
    assert len(metrics) == 4
    ticks = set()
    for metric in metrics:
        text = re.sub(r"<[^>]+>", "\n", damage(view, metric))
        assert len(re.findall("replaced by noise|damaged: zeros", text.split("Means")[0])) >= 1
        ticks.add(tuple(re.findall(r"[\d.]+ %(?=\n)", text)[-5:]))
        assert damage_text(view, metric).count("the best fusion") == 1
    assert len(ticks) == 1


def test_figure_is_omitted_without_a_unimodal_baseline():
    view = ResultsView(fake_results(methods=("joint",)))
    assert damage(view) is None
    assert damage_png(view) is None
