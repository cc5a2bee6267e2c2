"""Sphinx configuration: MyST pages, an API reference generated from the packages' exports, furo."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
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
html_static_path = ["_static"]
html_css_files = ["tables.css"]
pygments_dark_style = "github-dark"
exclude_patterns = ["_build", "pictures"]
# Code blocks of the pages are run by the test suite, notebooks by nbclient; the build itself runs nothing.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Reference", "notes_style")]
napoleon_use_ivar = True
napoleon_attr_annotations = False
default_role = "code"
highlight_language = "none"
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
    documented: dict[object, str] = {}
    # The top level comes last: what it shares with a family is documented on the page of the family.
    for family, title in sorted(FAMILIES.items(), key=lambda item: not item[0]):
        path = f"equipoise.{family}" if family else "equipoise"
        label = f"eq.{family}" if family else "eq"
        lines = [f"{title}: ``{label}``", "=" * (len(title) + len(label) + 6), "", f".. currentmodule:: {path}", ""]
        names = public_names(family)
        module = importlib.import_module("equipoise")
        module = getattr(module, family) if family else module
        lines += [".. autosummary::", "", *(f"   {name}" for name in names), ""]
        for name in names:
            value = getattr(module, name)
            kind = "class" if inspect.isclass(value) else "function"
            if (home := documented.setdefault(value, family)) == family:
                lines += [f".. auto{kind}:: {name}", *(["   :members:"] if kind == "class" else []), ""]
            else:
                lines += [f".. py:{kind}:: {name}", "", f"   The same as :py:obj:`equipoise.{home}.{name}`.", ""]
        text = "\n".join(lines)
        target = folder / f"{family or 'equipoise'}.rst"
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


EMPHASIS = re.compile(r"\*{1,2}[A-Za-z][A-Za-z ,-]*\*{1,2}(?!\w)")
STRAY = re.compile(r"(?<!\\)[*|]|(?<=\w)_(?!\w)")


def escape_stray_markup(line: str) -> str:
    """Escapes ``*``, ``|`` and trailing ``_`` that stand for operators, and keeps emphasized words."""
    words = EMPHASIS.findall(line)
    pieces = [STRAY.sub(lambda match: "\\" + match.group(0), piece) for piece in EMPHASIS.split(line)]
    return "".join(piece + word for piece, word in zip(pieces, [*words, ""], strict=True))


def process_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes formulas in docstrings, such as ``|f - c| * x``, valid reStructuredText outside of code."""
    literal_indent = None
    doctest = quoted = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal_indent is not None and line.strip() and indent <= literal_indent:
            literal_indent = None
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        if literal_indent is None and not doctest:
            bullet = re.match(r"\s*(?:\* )?", line).group(0)
            pieces = re.split(r"(``|`[^`]+`)", line[len(bullet) :])
            for at, piece in enumerate(pieces):
                if piece == "``":
                    quoted = not quoted
                elif not quoted and not piece.startswith("`"):
                    pieces[at] = escape_stray_markup(piece)
            lines[number] = bullet + "".join(pieces)
            if line.rstrip().endswith("::"):
                literal_indent = indent


def skip_member(app, what, name, obj, skip, options) -> bool | None:
    """Leaves out the fields of named tuples that have no docstring of their own."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app) -> None:
    # Before napoleon, which turns the sections of docstrings into reStructuredText.
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("autodoc-skip-member", skip_member)


def copy_notebooks() -> None:
    """Copies notebooks/ into the folder of the pages, where Sphinx finds them."""
    shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)


write_reference()
copy_notebooks()
