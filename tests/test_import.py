"""What `import equipoise` loads, and what it does not."""

import importlib
import json
import subprocess
import sys

import pytest

import equipoise as eq

HEAVY = (
    "lightning",
    "transformers",
    "matplotlib",
    "sklearn",
    "scipy",
    "jinja2",
    "pandas",
    "torchmetrics",
)


def loaded(statement):
    """Names in sys.modules of a fresh interpreter after a statement."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def plain():
    return loaded("import equipoise")


def test_the_check_can_see_a_heavy_package():
    assert "jinja2" in loaded("import jinja2")


@pytest.mark.parametrize("package", HEAVY)
def test_import_stays_light(plain, package):
    assert package not in plain


def test_import_does_not_load_the_compiler_unless_torch_does(plain):
    # Loading it takes longer than loading torch.
    assert "torch._dynamo" not in plain - loaded("import torch")


@pytest.mark.parametrize("name", sorted(eq._LAZY_MODULES))
def test_lazy_names_are_modules(plain, name):
    assert f"equipoise.{name}" not in plain
    assert getattr(eq, name) is importlib.import_module(f"equipoise.{name}")


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'equipoise' has no attribute 'rolingq'"):
        _ = eq.rolingq


def test_the_program_tells_its_help_without_the_trainer():
    heavy = {"lightning", "transformers", "matplotlib", "sklearn", "pandas", "torchmetrics"}
    assert not heavy & loaded("import equipoise.cli")
