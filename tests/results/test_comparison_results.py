"""Results as tables: results.csv read by pandas, data frames, and HTML for notebooks."""

import math

import pytest

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.io.table_display import html_table
from equipoise.results import ComparisonResults, build_results, load_results, write_results
from equipoise.training import compare
from helpers.diagnosis import labeled_batches, weighted_model
from helpers.runs import recipe

pandas = pytest.importorskip("pandas")


def content():
    runs = [
        {"method": method, "seed": seed, "fold": "A", "metrics": {"accuracy": value, "air": None},
         "intervals": {"accuracy": [value - 0.1, value + 0.1]}}
        for method, seed, value in (("joint", 0, 0.1 + 0.2), ("joint", 1, 0.5), ("concat", 0, 0.25))
    ]  # fmt: skip
    return build_results(runs, {"recipe": "mine", "methods": ["joint", "concat"]})


def test_csv_has_every_metric_of_every_run_with_all_digits(tmp_path):
    result = content()
    frame = pandas.read_csv(result.write_csv(tmp_path / "results.csv"))
    assert list(frame.columns) == ["run", "method", "seed", "fold", "metric", "value", "low", "high"]
    assert len(frame) == 6
    first = frame[(frame.run == "A/joint/seed0") & (frame.metric == "accuracy")].iloc[0]
    assert first.value == 0.1 + 0.2
    assert (first.low, first.high) == (0.1 + 0.2 - 0.1, 0.1 + 0.2 + 0.1)
    assert frame[frame.metric == "air"].value.isna().all()
    assert frame.groupby("method").value.mean()["joint"] == pytest.approx(0.4)


def test_data_frames_of_runs_and_summary(tmp_path):
    write_results(tmp_path / "results.json", content())
    loaded = load_results(tmp_path)
    assert isinstance(loaded, ComparisonResults)
    assert loaded.to_pandas().value.sum() == pytest.approx(1.05)
    summary = loaded.to_pandas("summary")
    assert summary[(summary.method == "joint") & (summary.metric == "accuracy")]["mean"].item() == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="part"):
        loaded.to_pandas("rows")


def test_html_is_escaped_and_shows_failures():
    result = content()
    result["failures"] = [{"method": "<b>", "seed": 0, "error": "<script>"}]
    shown = result._repr_html_()
    assert "<td>0.4 ± 0.14</td>" in shown
    assert "<th>joint</th><th>concat</th>" in shown
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "no runs" in ComparisonResults()._repr_html_()
    assert html_table([{"a": math.nan, "b": None, "c": 3}]).count("<td></td>") == 2


def test_compare_writes_results_csv(tmp_path):
    result = compare(recipe(epochs=1), ["concat"], seeds=1, out=tmp_path, workers=0)
    frame = pandas.read_csv(tmp_path / "results.csv")
    assert frame.equals(pandas.read_csv(result.write_csv(tmp_path / "again.csv")))
    assert frame[frame.metric == "accuracy"].value.item() == result["runs"][0]["metrics"]["accuracy"]
    assert "concat" in result._repr_html_()


def test_a_diagnosis_is_shown_with_its_findings():
    model = weighted_model(audio=1.0, image=0.3)
    result = eq.diagnose(model, labeled_batches(model), tests=["score", "noise", "keys"])
    frame = result.to_pandas()
    assert dict(zip(frame.metric, frame.value, strict=True)) == pytest.approx(result.metrics, nan_ok=True)
    shown = result._repr_html_()
    assert shown.count("<li>") == len(result.verdicts) + len(result.skipped)
    renamed = eq.Diagnosis("<i>", ("a",), None, 1, {"<u>": 1.0}, skipped={"<s>": "<s>"})
    assert not any(tag in renamed._repr_html_() for tag in ("<i>", "<u>", "<s>"))
