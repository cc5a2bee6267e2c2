"""What the README shows is what runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_first_screen_runs_and_is_short(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    quick = code.replace("max_epochs=3", "max_epochs=1").replace("epochs=3)", "epochs=1)")
    done = subprocess.run([sys.executable, "-c", quick], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert -1.0 <= float(done.stdout.split()[-1]) <= 1.0


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (PROJECT / target).exists(), target


def test_every_command_named_there_exists():
    named = set(re.findall(r"^equipoise (\w+)", README, re.MULTILINE))
    from equipoise.cli.commands import COMMANDS

    assert named <= set(COMMANDS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_finds_the_test_command():
    script = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    pipeline = re.search(r'command="\$\((.*)\)"', script).group(1)
    done = subprocess.run(["bash", "-c", pipeline], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("pytest")
