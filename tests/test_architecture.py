"""The house: imports only go down, nothing goes in circles, everything public is explained, every example runs."""

import ast
import doctest
import graphlib
import importlib
import inspect
import re
from pathlib import Path

import pytest

import equipoise as eq

ROOT = Path(eq.__file__).parent
PROJECT = Path(__file__).parent.parent
ARCHITECTURE = PROJECT / "docs" / "architecture.md"
FILES = sorted(ROOT.rglob("*.py"))
# Packages that are not installed with the library, and the files that need them.
EXTRAS = {"hf": "transformers"}


def layers():
    """name -> level, from the list in docs/architecture.md."""
    block = re.search(r"```layers\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    return {name: level for level, line in enumerate(block.splitlines()) for name in line.split(", ")}


def part(module):
    """The file or family under the package that a module belongs to; "__init__" for the package itself."""
    return module.split(".")[1] if "." in module else "__init__"


def module_name(file):
    names = ["equipoise", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(file): file for file in FILES}


def imports(module, modules=MODULES):
    """The modules of the package that a module imports, also inside functions and for type checking."""
    source = ast.parse(modules[module].read_text(encoding="utf-8"))
    home = module.split(".") if modules[module].name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "equipoise")
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target.split(".")[0] == "equipoise":
                # "from . import x" means the module x where there is one, else a name in __init__.
                inner = {f"{target}.{alias.name}" for alias in node.names}
                found.update(inner & set(modules) or {target})
    return found - {module}


def test_the_walk_sees_imports_in_every_form(tmp_path):
    (tmp_path / "a.py").write_text(
        "from __future__ import annotations\nimport torch\nimport equipoise.errors\nfrom . import tokens\n"
        "from . import __version__\nfrom .model import FusionModel\n"
        "def f():\n    from .fusion.joint import JointAttention\n"
    )
    modules = MODULES | {"equipoise.a": tmp_path / "a.py"}
    seen = {
        "equipoise.errors",
        "equipoise.tokens.token_batch",
        "equipoise",
        "equipoise.models.fusion_model",
        "equipoise.fusion.joint_attention",
    }
    assert imports("equipoise.a", modules) == seen


def test_every_part_has_its_place():
    parts = {part(module) for module in MODULES}
    assert parts == set(layers()), "docs/architecture.md lists the layers; a new file gets its place there"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    level, here = layers(), part(module)
    assert here in level
    others = {part(target) for target in imports(module)} - {here}
    wrong = {other for other in others if level.get(other, len(level)) >= level[here]}
    assert not wrong, f"{module} imports what stands beside or above it"


def test_no_circles():
    list(graphlib.TopologicalSorter({module: imports(module) for module in MODULES}).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_the_package_are_relative(module):
    source = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    absolute = [
        node.lineno
        for node in ast.walk(source)
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "equipoise")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "equipoise" for alias in node.names))
    ]
    assert not absolute


def test_two_folders_deep_and_nothing_called_utils():
    assert all(len(file.relative_to(ROOT).parts) <= 3 for file in FILES)
    words = {"utils", "util", "helpers", "helper", "misc"}
    assert not words & ({file.stem for file in FILES} | {file.parent.name for file in FILES})


def public_names():
    """What __init__ re-exports by name."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    return [alias.asname or alias.name for node in nodes for alias in node.names]


@pytest.mark.parametrize("name", public_names())
def test_public_names_are_explained(name):
    value = getattr(eq, name)
    text = inspect.getdoc(value) or ""
    # A docstring of its own: dataclasses and named tuples get one that only repeats their fields.
    assert len(text.split()) > 3
    assert not text.startswith(f"{name}(")
    pages = [*(PROJECT / "docs").rglob("*.md"), PROJECT / "README.md"]
    assert any(re.search(rf"\beq\.{name}\b", page.read_text(encoding="utf-8")) for page in pages), "missing in docs/"


def test_the_page_names_nothing_that_is_not_there():
    names = set(re.findall(r"\beq\.(\w+)", ARCHITECTURE.read_text(encoding="utf-8")))
    assert names >= set(public_names())
    assert all(hasattr(eq, name) for name in names)


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    if part(module) in EXTRAS:
        pytest.importorskip(EXTRAS[part(module)])
    report = []
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module)):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
