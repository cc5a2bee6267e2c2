"""The table in the terminal: nothing is cut, and what has no room is named."""

import io

import pytest
from rich.console import Console

from equipoise.cli.table import show
from fake_results import METHODS, fake_results

HEADERS = ["audio = noise", "image = noise", "attention r", "accuracy against", "s/epoch"]


def shown(width, content=None):
    sheet = io.StringIO()
    show(content or fake_results(), Console(file=sheet, width=width, color_system=None))
    return [line.rstrip() for line in sheet.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (120, []),
        (80, ["s/epoch", "image = noise"]),
        (55, ["s/epoch", "image = noise", "audio = noise", "attention r"]),
        (30, ["s/epoch", "image = noise", "audio = noise", "attention r", "accuracy against"]),
    ],
)
def test_columns_that_have_no_room_are_left_out_and_named(width, gone):
    lines = shown(width)
    assert lines[0].startswith("method          accuracy")
    assert [name for name in HEADERS if name not in lines[0]] == [name for name in HEADERS if name in gone]
    assert [line.split()[0] for line in lines[2 : 2 + len(METHODS)]] == list(METHODS)
    notes = " ".join(lines[2 + len(METHODS) :])
    assert ("No room here for:" in notes) == bool(gone)
    assert all(name in notes.partition("No room here for:")[2] for name in gone)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)


def test_differences_are_paired_points_with_p():
    line = next(line for line in shown(120) if line.startswith("joint+rollingq"))
    assert "joint +1.3, p = 0.059" in line
    line = next(line for line in shown(120) if line.startswith("audio "))
    assert "concat \N{MINUS SIGN}34.7, p < 0.001" in line


def test_a_long_name_is_whole():
    name = "joint+" + "+".join(f"balancer{number}" for number in range(9))
    lines = shown(80, fake_results(methods=("concat", "joint"), rename={"joint": name}))
    first = next(number for number, line in enumerate(lines) if line.startswith("joint+"))
    assert lines[first].partition(" ")[0] + lines[first + 1].strip() == name
    assert "±" in lines[first]
