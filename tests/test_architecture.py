"""The structure of the package: layers, names, documentation of public names, and the examples in docstrings."""

import ast
import collections
import doctest
import functools
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
# Modules whose examples need a package that is not installed with the library.
EXTRAS = {"equipoise.integrations.huggingface": "transformers", "equipoise.integrations.lmms_eval": "lmms_eval"}
MOST_ROOT_NAMES = 35
# The only class names that may occur twice: users choose between those of `eq.lightning` and of `eq.hf`.
SHARED_CLASSES = {"BalancerCallback", "WatchCallback"}


def layers():
    """name -> level, parsed from docs/architecture.md."""
    block = re.search(r"```layers\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    return {name: level for level, line in enumerate(block.splitlines()) for name in line.split(", ")}


def layer_of(module):
    """The top-level file or package that a module belongs to; "__init__" for the package itself."""
    return module.split(".")[1] if "." in module else "__init__"


def module_name(file):
    names = ["equipoise", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(file): file for file in FILES}


@functools.cache
def parsed(file):
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def page_texts():
    return [page.read_text(encoding="utf-8") for page in (*(PROJECT / "docs").rglob("*.md"), PROJECT / "README.md")]


def imported_modules(module, modules=MODULES):
    """The modules of the package that a module imports, including imports inside functions and for type checking."""
    source = parsed(modules[module])
    home = module.split(".") if modules[module].name == "__init__.py" else module.split(".")[:-1]
    result = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            result.update(alias.name for alias in node.names if alias.name.split(".")[0] == "equipoise")
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target.split(".")[0] == "equipoise":
                # "from . import x" imports the module x if it exists, else a name of __init__.
                inner = {f"{target}.{alias.name}" for alias in node.names}
                result.update(inner & set(modules) or {target})
    return result - {module}


def test_all_import_forms_are_detected(tmp_path):
    (tmp_path / "a.py").write_text(
        "from __future__ import annotations\nimport torch\nimport equipoise.errors\nfrom . import tokens\n"
        "from . import __version__\nfrom .models.fusion_model import FusionModel\n"
        "def f():\n    from .fusion.joint_attention import JointAttention\n"
    )
    modules = MODULES | {"equipoise.a": tmp_path / "a.py"}
    expected = {
        "equipoise.errors",
        "equipoise.tokens",
        "equipoise",
        "equipoise.models.fusion_model",
        "equipoise.fusion.joint_attention",
    }
    assert imported_modules("equipoise.a", modules) == expected


def test_every_file_and_package_is_in_a_layer():
    parts = {layer_of(module) for module in MODULES}
    assert parts == set(layers()), "add new top-level files and packages to the layers in docs/architecture.md"


def test_imports_only_go_down():
    level, wrong = layers(), {}
    for module in MODULES:
        own = layer_of(module)
        others = {layer_of(target) for target in imported_modules(module)} - {own}
        wrong[module] = {other for other in others if level.get(other, len(level)) >= level[own]}
    assert not {module: others for module, others in wrong.items() if others}


def test_imports_have_no_cycles():
    list(graphlib.TopologicalSorter({module: imported_modules(module) for module in MODULES}).static_order())


def test_imports_inside_the_package_are_relative():
    absolute = [
        f"{file}:{node.lineno}"
        for file in FILES
        for node in ast.walk(parsed(file))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "equipoise")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "equipoise" for alias in node.names))
    ]
    assert not absolute


def test_folder_depth_and_no_utils():
    assert all(len(file.relative_to(ROOT).parts) <= 3 for file in FILES)
    words = {"utils", "util", "helpers", "helper", "misc"}
    assert not words & ({file.stem for file in FILES} | {file.parent.name for file in FILES})


def exported_names(file):
    """Names that the body of a module imports or defines, including those imported for type checking only."""
    tree = parsed(file)
    names = {}
    for node in [part for block in tree.body for part in (block.body if isinstance(block, ast.If) else [block])]:
        if isinstance(node, ast.ImportFrom) and node.level:
            names |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = "__init__"
    return names


def public_names():
    """Names of the root package that are imported eagerly, without its submodules."""
    tree = parsed(ROOT / "__init__.py")
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module and node.level]
    names = [alias.asname or alias.name for node in nodes for alias in node.names]
    return [name for name in names if not name.startswith("_")]


def definitions(kind):
    """name -> modules that define a class or function of this name at top level."""
    result = collections.defaultdict(list)
    for module, file in MODULES.items():
        for node in parsed(file).body:
            if isinstance(node, kind) and not node.name.startswith("__"):
                result[node.name].append(module)
    return result


def test_root_package_is_small():
    names = {*public_names(), *eq._LAZY_NAMES}
    assert len(names) <= MOST_ROOT_NAMES


def test_class_names_are_unique():
    twice = {name: modules for name, modules in definitions(ast.ClassDef).items() if len(modules) > 1}
    assert set(twice) <= SHARED_CLASSES, twice


def test_file_names_are_unique():
    names = [file.parent.name if file.name == "__init__.py" else file.stem for file in FILES]
    twice = {name for name, count in collections.Counter(names).items() if count > 1}
    assert not twice


def test_no_module_is_hidden_behind_a_name_of_its_package():
    hidden = []
    for package in (file.parent for file in FILES if file.name == "__init__.py"):
        modules = {path.stem for path in package.glob("*.py")} | {
            path.parent.name for path in package.glob("*/__init__.py")
        }
        names = exported_names(package / "__init__.py")
        hidden += [f"{package.name}.{name}" for name, source in names.items() if name in modules and source]
    assert not hidden


def test_no_module_is_named_after_one_of_its_functions_or_classes():
    wrong = [
        module
        for module, file in MODULES.items()
        if module.rsplit(".", 1)[-1] in {node.name for node in parsed(file).body if hasattr(node, "name")}
    ]
    assert not wrong


@pytest.mark.parametrize("name", public_names())
def test_public_names_are_documented(name):
    value = getattr(eq, name)
    text = inspect.getdoc(value) or ""
    # Dataclasses and named tuples get a docstring that only repeats their fields; it does not count.
    assert len(text.split()) > 3
    assert not text.startswith(f"{name}(")
    assert any(re.search(rf"\beq\.{name}\b", page) for page in page_texts()), "missing in docs/"


def test_page_lists_exactly_the_existing_names():
    names = set(re.findall(r"\beq\.(\w+)", ARCHITECTURE.read_text(encoding="utf-8")))
    assert names >= set(public_names())
    assert all(hasattr(eq, name) for name in names)


def test_modules_have_docstrings():
    assert not [module for module, file in MODULES.items() if not ast.get_docstring(parsed(file))]


def test_modules_can_be_imported():
    for module in MODULES:
        if module not in EXTRAS:
            importlib.import_module(module)


# Other modules have no line that doctest would run.
@pytest.mark.parametrize("module", [module for module, file in MODULES.items() if ">>>" in file.read_text("utf-8")])
def test_examples_run(module):
    if module in EXTRAS:
        pytest.importorskip(EXTRAS[module])
    report = []
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module)):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
