"""`import equipoise` loads no heavy package, and its lazy attributes are the documented modules."""

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


PROGRAM = """
import json, sys

for name in ("torch", "equipoise", "equipoise.cli", "jinja2"):
    __import__(name)
    print(json.dumps([name, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def loaded_modules():
    """Names in `sys.modules` of a new interpreter after each of several imports in this order."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    return {name: set(modules) for name, modules in map(json.loads, result.stdout.splitlines())}


@pytest.fixture
def blocked_imports(loaded_modules):
    return loaded_modules["equipoise"]


def test_check_detects_a_heavy_package(loaded_modules):
    assert "jinja2" in loaded_modules["jinja2"] - loaded_modules["equipoise"]


@pytest.mark.parametrize("package", HEAVY)
def test_import_loads_no_heavy_packages(blocked_imports, package):
    assert package not in blocked_imports


def test_import_does_not_load_the_compiler_unless_torch_does(blocked_imports, loaded_modules):
    # It takes longer to import than torch itself.
    assert "torch._dynamo" not in blocked_imports - loaded_modules["torch"]


@pytest.mark.parametrize(("name", "module"), sorted(eq._LAZY_MODULES.items()))
def test_lazy_modules_are_not_imported_with_the_package(blocked_imports, name, module):
    assert f"equipoise{module}" not in blocked_imports
    assert getattr(eq, name) is importlib.import_module(f"equipoise{module}")


@pytest.mark.parametrize(("name", "module"), sorted(eq._LAZY_NAMES.items()))
def test_lazy_functions_are_attributes_of_their_modules(name, module):
    assert getattr(eq, name) is getattr(importlib.import_module(f"equipoise{module}"), name)


def test_unknown_attributes_raise_an_error():
    with pytest.raises(AttributeError, match="module 'equipoise' has no attribute 'rolingq'"):
        _ = eq.rolingq


def test_command_line_parsing_does_not_load_the_trainer(loaded_modules):
    heavy = {"lightning", "transformers", "matplotlib", "sklearn", "pandas", "torchmetrics"}
    assert not heavy & loaded_modules["equipoise.cli"]
