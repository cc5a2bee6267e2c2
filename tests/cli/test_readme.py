"""The README is short, and its links and commands exist; tests/test_docs.py runs its Python code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 100
    first_block = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in first_block.splitlines() if line.strip()]) <= 5
    assert "eq.watch" in first_block
    # The picture, the install command, the demo and the first block fit on the first screen.
    first_screen = "\n".join(lines[:20])
    assert all(text in first_screen for text in ("docs/pictures/demo.png", "pip install", "equipoise demo", "eq.watch"))


def test_results_table_has_at_most_eight_rows_with_controls():
    rows = re.search(r"\| method \|.*?\n\n", README, re.DOTALL).group(0).splitlines()
    assert "control" in rows[0]
    assert len([row for row in rows[2:] if row]) <= 8


def test_links_point_to_files():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (PROJECT / target).exists(), target


def test_mentioned_commands_exist():
    from equipoise.cli.commands import COMMANDS

    named = set(re.findall(r"^equipoise (\w+)", README, re.MULTILINE))
    assert {"demo", "compare"} <= named <= set(COMMANDS)


def test_set_up_commands():
    assert "python3 -m venv .venv && .venv/bin/pip install '.[all]' && .venv/bin/equipoise demo" in README


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_finds_the_test_command():
    script = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    pipeline = re.search(r'command="\$\((.*)\)"', script).group(1)
    completed = subprocess.run(["bash", "-c", pipeline], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert completed.stdout.strip().endswith("pytest")
