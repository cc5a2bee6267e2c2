"""The terminal table: numbers are never truncated, and dropped columns are listed."""

import io

import pytest
from rich.console import Console

from equipoise.cli.results_table import show
from equipoise.results import result_rows
from helpers.fake_results import METHODS, fake_results, fake_run

HEADERS = ["audio = noise", "image = noise", "attention r", "accuracy against", "s/epoch"]


def render(width, content=None):
    sheet = io.StringIO()
    show(content or fake_results(), Console(file=sheet, width=width, color_system=None))
    return [line.rstrip() for line in sheet.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (120, []),
        (80, ["s/epoch", "image = noise"]),
        (60, ["s/epoch", "image = noise", "audio = noise", "attention r"]),
    ],
)
def test_omitted_columns_are_listed(width, gone):
    lines = render(width)
    assert lines[0].startswith("method          accuracy")
    assert [name for name in HEADERS if name not in lines[0]] == [name for name in HEADERS if name in gone]
    assert [line.split()[0] for line in lines[2 : 2 + len(METHODS)]] == list(METHODS)
    notes = " ".join(lines[2 + len(METHODS) :])
    assert ("Not shown for lack of space:" in notes) == bool(gone)
    assert all(name in notes.partition("Not shown for lack of space:")[2] for name in gone)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)


def test_method_score_and_difference_are_kept_in_narrow_terminals():
    lines = render(42)
    assert lines[1].split() == ["method", "accuracy", "against"]
    row = next(number for number, line in enumerate(lines) if line.startswith("image"))
    assert lines[row].split() == ["image", "66.2", "±", "1.8", "concat", "\N{MINUS SIGN}9.7,"]
    assert lines[row + 1].strip() == "p < 0.001"
    assert max(map(len, lines)) <= 42


def test_default_width_is_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    sheet = io.StringIO()
    show(fake_results(), Console(file=sheet))
    assert [line.rstrip() for line in sheet.getvalue().splitlines()] == render(80)


def test_seed_counts_are_shown_if_they_differ():
    content = fake_results()
    assert "5 runs per method" in " ".join(render(120, content))
    fewer = result_rows.build_results(content["runs"][:-1], content["protocol"])
    assert render(120, fewer)[0].split()[:3] == ["method", "seeds", "accuracy"]
    assert next(line for line in render(120, fewer) if line.startswith("joint+rollingq")).split()[1] == "4"


def test_error_metrics_are_lower_is_better():
    errors = {"concat": (-0.5, -0.52, -0.51), "joint": (-0.4, -0.43, -0.42)}
    runs = [fake_run(method, seed, negative_error=v) for method, each in errors.items() for seed, v in enumerate(each)]
    lines = render(80, result_rows.build_results(runs, {}))
    assert lines[0].split() == ["method", "MAE", "MAE", "against"]
    assert lines[3].split() == ["joint", "0.417", "±", "0.015", "concat", "\N{MINUS SIGN}0.093,", "p", "=", "0.001"]
    assert "mean absolute error (lower is better) and its paired difference" in " ".join(lines)


def test_table_names_the_control():
    content = fake_results(rename={"joint": "heads+x", "joint+rollingq": "ensemble+x"})
    protocol = {**content["protocol"], "references": {"ensemble+x": "heads+x"}}
    lines = render(120, result_rows.build_results(content["runs"], protocol))
    assert "heads+x +1.3, p = 0.059" in next(line for line in lines if line.startswith("ensemble+x"))


def test_differences_are_paired_points_with_p():
    line = next(line for line in render(120) if line.startswith("joint+rollingq"))
    assert "joint +1.3, p = 0.059" in line
    line = next(line for line in render(120) if line.startswith("audio "))
    assert "concat \N{MINUS SIGN}34.7, p < 0.001" in line


def test_long_names_are_not_truncated():
    name = "joint+" + "+".join(f"balancer{number}" for number in range(9))
    lines = render(80, fake_results(methods=("concat", "joint"), rename={"joint": name}))
    first = next(number for number, line in enumerate(lines) if line.startswith("joint+"))
    assert lines[first].split()[0] + lines[first + 1].split()[0] == name
    assert "±" in lines[first]
