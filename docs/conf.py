"""Sphinx configuration: MyST pages, an API reference generated from the packages' exports, furo."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))

project = "equipoise"
author = "The equipoise authors"
copyright = "The equipoise authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "equipoise"
html_static_path: list[str] = []
exclude_patterns = ["_build", "pictures"]
# Code blocks of the pages are run by the test suite, notebooks by nbclient; the build itself runs nothing.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Reference", "notes_style")]
# Files outside docs/ are linked on the repository's page.
suppress_warnings = ["myst.xref_missing", "misc.highlighting_failure"]

FAMILIES = {
    "": "Top level",
    "nn": "Attention and transformer layers",
    "encoders": "Encoders",
    "fusion": "Fusion",
    "balance": "Balancers",
    "alignment": "Alignment",
    "consistency": "Attention consistency",
    "diagnostics": "Diagnostics",
    "geometry": "Geometry",
    "models": "Models",
    "data": "Data",
    "results": "Results",
    "hf": "Hugging Face",
    "lightning": "Lightning",
}


def public_names(family: str) -> list[str]:
    """Names of classes and functions that ``equipoise.<family>`` exports, in alphabetical order."""
    module = importlib.import_module("equipoise")
    if family:
        module = getattr(module, family)
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    if not family:
        names = [*names, *module._LAZY_NAMES]
    found = []
    for name in names:
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("equipoise")
        if ours and (inspect.isclass(value) or inspect.isfunction(value)):
            # A submodule's file also sees what it imports: only its own definitions count there.
            if inspect.ismodule(module) and not hasattr(module, "__path__") and value.__module__ != module.__name__:
                continue
            found.append(name)
    return sorted(found, key=str.lower)


def write_reference() -> None:
    """Writes docs/reference/<family>.rst from the exports, so that no public name is missing."""
    folder = HERE / "reference"
    folder.mkdir(exist_ok=True)
    for family, title in FAMILIES.items():
        path = f"equipoise.{family}" if family else "equipoise"
        label = f"eq.{family}" if family else "eq"
        lines = [f"{title}: ``{label}``", "=" * (len(title) + len(label) + 6), "", f".. currentmodule:: {path}", ""]
        names = public_names(family)
        module = importlib.import_module("equipoise")
        module = getattr(module, family) if family else module
        lines += [".. autosummary::", "", *(f"   {name}" for name in names), ""]
        for name in names:
            kind = "autoclass" if inspect.isclass(getattr(module, name)) else "autofunction"
            lines += [f".. {kind}:: {name}", *(["   :members:"] if kind == "autoclass" else []), ""]
        text = "\n".join(lines)
        target = folder / f"{family or 'equipoise'}.rst"
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


write_reference()
