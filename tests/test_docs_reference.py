"""The API reference lists every public name."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def configuration():
    spec = importlib.util.spec_from_file_location("docs_configuration", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Warnings of Sphinx and its extensions about one another are not about this package.
@pytest.mark.filterwarnings("ignore")
def test_every_public_name_is_in_the_inventory(configuration, tmp_path):
    sphinx = pytest.importorskip("sphinx.application")
    inventory = pytest.importorskip("sphinx.util.inventory")
    # The reference pages alone: building the whole site is the job of the documentation build.
    source = tmp_path / "docs"
    (source / "reference").mkdir(parents=True)
    for page in (DOCS / "reference").glob("*.rst"):
        (source / "reference" / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    (source / "index.rst").write_text(
        "Reference\n=========\n\n.. toctree::\n   :glob:\n\n   reference/*\n", encoding="utf-8"
    )
    options = {"extensions": ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]}
    app = sphinx.Sphinx(
        source, None, tmp_path / "out", tmp_path / "cache", "html", confoverrides=options, status=None, warning=None
    )
    app.build()
    listed = inventory.InventoryFile.loads((tmp_path / "out" / "objects.inv").read_bytes(), uri="").data
    names = set(listed["py:class"]) | set(listed["py:function"])
    for family in configuration.FAMILIES:
        prefix = f"equipoise.{family}." if family else "equipoise."
        for name in configuration.public_names(family):
            assert prefix + name in names
