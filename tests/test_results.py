"""record.py: statistics against closed forms, and a results file that no interruption can spoil."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import DataError, SchemaError
from equipoise.results import result_rows
from helpers.fake_results import fake_results


def run_result(method, seed, fold=None, **metrics):
    return {"method": method, "seed": seed, "fold": fold, "metrics": metrics}


def summary_row(rows, method, metric="accuracy"):
    (result,) = [r for r in rows if (r["method"], r["metric"]) == (method, metric)]
    return result


def test_environment_contains_no_user_or_path(monkeypatch):
    monkeypatch.setenv("USER", "a-person")
    text = json.dumps(result_rows.describe_environment())
    for secret in (os.uname().nodename, os.path.expanduser("~"), "a-person", "/"):
        assert secret not in text
    assert result_rows.describe_environment()["torch"] == torch.__version__


def test_summary_has_sample_sd_and_paired_p_in_closed_form():
    # d = 0.1, 0.2: mean 0.15, sd 0.1/sqrt(2), t = 3; with one degree of freedom t is Cauchy.
    rows = result_rows.summarize_runs(
        [
            run_result("joint", 0, accuracy=0.5),
            run_result("joint", 1, accuracy=0.6),
            run_result("joint+x", 1, accuracy=0.8),
            run_result("joint+x", 0, accuracy=0.6),
        ]
    )
    joint, balanced = summary_row(rows, "joint"), summary_row(rows, "joint+x")
    assert joint["mean"] == pytest.approx(0.55)
    assert joint["sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert (joint["n"], joint["reference"], joint["difference"], joint["p"]) == (2, None, None, None)
    assert balanced["difference"] == pytest.approx(0.15)
    assert balanced["p"] == pytest.approx(1 - 2 * math.atan(3) / math.pi)
    assert (balanced["reference"], balanced["pairs"], balanced["higher"]) == ("joint", 2, 2)


def test_interval_of_three_pairs_touches_zero_at_p_of_five_percent():
    differences = [0.1, 0.3, 0.5]
    runs = [
        r
        for s, d in enumerate(differences)
        for r in (run_result("joint", s, accuracy=0.2), run_result("joint+x", s, accuracy=0.2 + d))
    ]
    result = summary_row(result_rows.summarize_runs(runs), "joint+x")
    t = 0.3 / (0.2 / math.sqrt(3))
    assert result["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    # Two degrees of freedom: the 97.5 % point solves t / sqrt(2 + t^2) = 0.95.
    point = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))
    assert result["high"] - result["difference"] == pytest.approx(point * 0.2 / math.sqrt(3))
    assert result["low"] == pytest.approx(2 * result["difference"] - result["high"])


def test_pairs_share_seed_and_fold():
    joint = [("A", 0, 0.1), ("B", 0, 0.5), ("A", 1, 0.9)]
    balanced = [("B", 0, 0.6), ("A", 0, 0.3), ("A", 2, 0.0)]
    runs = [
        run_result(m, s, f, accuracy=a) for m, part in (("joint", joint), ("joint+x", balanced)) for f, s, a in part
    ]
    result = summary_row(result_rows.summarize_runs(runs), "joint+x")
    assert (result["n"], result["pairs"]) == (3, 2)
    assert result["difference"] == pytest.approx((0.2 + 0.1) / 2)


def test_r_is_not_compared_across_corrupted_modalities():
    plan = (("joint", 0, "a"), ("joint", 1, "a"), ("joint+x", 0, "a"), ("joint+x", 1, "b"))
    runs = [
        run_result(m, s, noise_attention_r=0.1 * s, accuracy=0.1 * s) | {"noise_modality": gone} for m, s, gone in plan
    ]
    rows = result_rows.summarize_runs(runs)
    assert summary_row(rows, "joint+x", "noise_attention_r")["pairs"] == 1
    assert summary_row(rows, "joint+x", "accuracy")["pairs"] == 2


def test_equal_differences_and_single_runs_have_no_p():
    equal = [
        run_result(m, s, accuracy=0.1 * s + 0.1 * (m == "joint+x")) for m in ("joint", "joint+x") for s in range(3)
    ]
    result = summary_row(result_rows.summarize_runs(equal), "joint+x")
    assert result["p"] is None
    assert result["difference"] == pytest.approx(0.1)
    once = summary_row(result_rows.summarize_runs(equal[2:4]), "joint+x")
    assert (once["sd"], once["p"], once["n"]) == (None, None, 1)
    assert once["difference"] is None  # no seed in common


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_undefined_metrics_are_excluded(gap):
    rows = result_rows.summarize_runs(
        [run_result("joint", 0, accuracy=0.5, air=gap), run_result("joint", 1, accuracy=gap, air=gap)]
    )
    assert [(r["metric"], r["mean"], r["n"]) for r in rows] == [("accuracy", 0.5, 1)]


@pytest.mark.parametrize(
    ("methods", "options", "expected"),
    [
        (("audio", "concat", "mbt", "mbt+x"), {}, {"audio": "concat", "concat": None, "mbt": "concat", "mbt+x": "mbt"}),
        (("sum", "concat", "mult+x"), {}, {"sum": None, "concat": "sum", "mult+x": "sum"}),
        (("joint", "mbt"), {}, {"joint": None, "mbt": None}),
        (("joint", "mbt", "mbt+x"), {"default": "joint"}, {"joint": None, "mbt": "joint", "mbt+x": "mbt"}),
        (("a", "b", "b+x"), {"reference": {"b+x": "a"}}, {"a": None, "b": None, "b+x": "a"}),
        (("a", "b"), {"reference": lambda method: "b"}, {"a": "b", "b": None}),
        (("a", "concat+x", "concat"), {}, {"a": "concat", "concat+x": "concat", "concat": None}),
    ],
)
def test_reference_rule(methods, options, expected):
    rows = result_rows.summarize_runs([run_result(m, 0, accuracy=0.1) for m in methods], **options)
    assert {r["method"]: r["reference"] for r in rows} == expected


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=7), st.lists(st.floats(-1, 1), min_size=7, max_size=7))
@settings(max_examples=30, deadline=None)
def test_swapping_method_and_reference_flips_the_sign(here, there):
    runs = [
        r for s, a in enumerate(here) for r in (run_result("a", s, accuracy=a), run_result("b", s, accuracy=there[s]))
    ]
    one = summary_row(result_rows.summarize_runs(runs, {"a": "b"}), "a")
    two = summary_row(result_rows.summarize_runs(runs, {"b": "a"}), "b")
    assert one["difference"] == pytest.approx(-two["difference"])
    assert (one["p"] is None) == (two["p"] is None)
    if one["p"] is not None:
        assert one["p"] == pytest.approx(two["p"])
        assert (one["low"] <= 0 <= one["high"]) == (one["p"] >= 0.05)


def test_merge_keeps_the_later_run():
    merged = result_rows.merge_results(
        [run_result("a", 0, accuracy=1), run_result("a", 1, accuracy=2)],
        [run_result("a", 0, accuracy=3), run_result("a", 0, "B", accuracy=4)],
    )
    assert [(r["seed"], r["fold"], r["metrics"]["accuracy"]) for r in merged] == [
        (0, None, 3),
        (1, None, 2),
        (0, "B", 4),
    ]


def test_results_do_not_depend_on_completion_order():
    runs = [run_result(m, s, f, accuracy=s / 7) for m in ("joint", "audio") for f in ("B", "A") for s in (2, 0, 1)]
    protocol = {"methods": ["audio", "joint"]}
    one, two = result_rows.build_results(runs, protocol), result_rows.build_results(runs[::-1], protocol)
    assert one["runs"] == two["runs"]
    assert one["summary"] == two["summary"]
    assert result_rows.run_identity(one["runs"][1]) == ("audio", 1, "A")


def test_results_round_trip(tmp_path):
    content = fake_results(seeds=2, epochs=3)
    path = result_rows.write_results(tmp_path / "deep" / "results.json", content)
    assert result_rows.load_results(path) == content
    assert result_rows.load_results(path.parent) == content
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_outcomes_are_stored_and_optional(tmp_path):
    runs = [
        {**run_result("joint", 0, accuracy=0.5), "outcomes": {"accuracy": "10-"}},
        run_result("joint", 1, accuracy=0.5),
    ]
    result_rows.write_results(tmp_path / "results.json", result_rows.build_results(runs, {}))
    first, second = result_rows.load_results(tmp_path)["runs"]
    assert first["outcomes"] == {"accuracy": "10-"}
    assert "outcomes" not in second


def test_non_json_values_become_null_or_lists(tmp_path):
    content = result_rows.build_results(
        [run_result("a", 0, accuracy=math.nan, air=-math.inf)], {"x": np.float32(0.5), "y": torch.arange(3)}
    )
    text = result_rows.write_results(tmp_path / "r.json", content).read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["runs"][0]["metrics"] == {"accuracy": None, "air": None}
    assert strict["protocol"] == {"x": 0.5, "y": [0, 1, 2]}


def test_unserializable_values_raise():
    with pytest.raises(SchemaError, match=r"results: protocol: root: expected numbers, .*, got PosixPath.*str"):
        result_rows.to_jsonable({"protocol": {"root": __import__("pathlib").Path("x")}})


def test_interrupted_write_keeps_the_previous_file(tmp_path, monkeypatch):
    path = result_rows.write_results(tmp_path / "results.json", fake_results(seeds=1, epochs=1))
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(result_rows.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        result_rows.write_results(path, fake_results(seeds=2, epochs=1))
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def broken(**changes):
    content = fake_results(methods=("joint",), seeds=1, epochs=0)
    return {key: value for key, value in (content | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken(schema=2), r"expected schema 1, got schema 2\. Write it again"),
        (broken(schema=...), r"expected the entries schema, got none called schema"),
        (broken(runs=..., summary=...), r"got none called runs, summary"),
        (broken(runs={}), r"runs: expected list, got dict"),
        (broken(protocol=[]), r"protocol: expected Mapping, got list"),
        (
            broken(runs=[{"method": "a"}]),
            r"run 0: expected the entries method, seed, fold, metrics, got none called seed",
        ),
        (broken(runs=[run_result(3, 0)]), r"run 0, method: expected str, got int"),
        (broken(runs=[7]), r"run 0: expected a mapping, got int"),
        (broken(summary=[{"method": "a"}]), r"summary row 0: .* got none called metric, mean"),
        ([1], r"expected a mapping, got list"),
        (broken(runs=[{**run_result("a", 0), "outcomes": "10"}]), r"run 0, outcomes: expected a mapping, got 10"),
        (
            broken(runs=[{**run_result("a", 0), "outcomes": {"accuracy": "1x"}}]),
            r"run 0, outcomes\.accuracy: expected 0, 1 or - for each sample, or numbers, got 1x",
        ),
    ],
)
def test_invalid_content_raises(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SchemaError, match=r"read 'results\.json'.*" + message):
        result_rows.load_results(path)


@pytest.mark.parametrize("cut", [0, 1, 57, -3])
def test_truncated_file_raises(tmp_path, cut):
    path = result_rows.write_results(tmp_path / "results.json", fake_results(methods=("joint",), seeds=1, epochs=1))
    path.write_text(path.read_text()[:cut])
    with pytest.raises(SchemaError, match=r"expected JSON, got a file that is truncated .*run the command"):
        result_rows.load_results(path)


def test_file_of_another_kind_raises(tmp_path):
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(SchemaError, match="expected JSON, got a file that is truncated or not JSON"):
        result_rows.load_results(tmp_path / "picture.json")


def test_missing_file_error_names_the_command(tmp_path):
    with pytest.raises(
        DataError,
        match=r"read 'results.json': expected a results file, got no such file\. equipoise demo, compare and train",
    ):
        result_rows.load_results(tmp_path)
