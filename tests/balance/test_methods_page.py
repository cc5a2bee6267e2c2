"""docs/methods.md is up to date and complete, its links exist, and the code of the methods' pages runs."""

import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import torch

import equipoise as eq
from equipoise import balance, fusion
from equipoise.balance import Balancer
from equipoise.fusion import Fusion
from helpers.fusion_cases import STATIC

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("methods_script", ROOT / "scripts" / "methods.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
CLASSES = {**script.methods(balance, Balancer), **script.methods(fusion, Fusion)}
every = pytest.mark.parametrize("cls", [pytest.param(cls, id=name) for name, cls in CLASSES.items()])


def test_page_is_current():
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/methods.py"


@every
def test_docstrings_have_reference_and_differences(cls):
    assert re.search(r"(section|eq\.|\(\w+.* \d{4})", script.field(cls, "Reference"))
    different = [script.field(cls, f"Differs from {other} in") for other in ("the released code", "the paper")]
    assert any(len(text) > 20 for text in different)


@every
def test_method_is_public_and_its_files_exist(cls):
    assert getattr(getattr(eq, script.family(cls)), cls.__name__) is cls
    assert (ROOT / script.source(cls)).is_file()
    text = (ROOT / script.tests(cls)).read_text(encoding="utf-8")
    # The plain fusions go through one test, by a table.
    assert cls in STATIC.values() or cls.__name__ in text


def test_published_values_occur_in_the_tests():
    for name, _, comes_out, test in script.REPRODUCED:
        assert hasattr(balance, name) or hasattr(fusion, name)
        text = next((ROOT / "tests").rglob(test)).read_text(encoding="utf-8").replace("_", "")
        for figure in re.findall(r"\d[\d,.]{3,}\d", comes_out):
            assert figure.replace(",", "") in text, figure


@pytest.mark.parametrize("page", [path.name for path in sorted((ROOT / "docs" / "methods").glob("*.md"))])
def test_code_blocks_run(page):
    text = (ROOT / "docs" / "methods" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    # A later block goes on where an earlier one ended.
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_contributing_guide_example_is_a_balancer():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = textwrap.dedent(re.search(r"( *)```python\n(.*?)```", text, re.DOTALL)[2])
    names = {"__name__": "equipoise.fusion.product", "__package__": "equipoise.fusion"}
    exec(compile(block, "product", "exec"), names)
    tokens = {name: eq.Tokens(torch.full((2, 3, 5), value)) for name, value in (("a", 2.0), ("b", 3.0))}
    assert names["Product"](5)(tokens).features.tolist() == [[6.0] * 5] * 2


class Documented:
    """Something, see below. Reference: one
    and the same.
    Differs from the paper in: this
    and that.

    Example: none.
    """


def test_fields_of_a_docstring():
    assert script.field(Documented, "Reference") == "one and the same."
    assert script.field(Documented, "Differs from the paper in") == "this and that."
    assert script.field(Documented, "Differs from the released code in") == ""
