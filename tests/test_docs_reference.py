"""The API reference lists every public name."""

import importlib.util
import os
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def configuration():
    spec = importlib.util.spec_from_file_location("docs_configuration", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_reference(folder):
    """Builds the reference pages alone; returns the folder of the site."""
    sphinx = pytest.importorskip("sphinx.application")
    source = folder / "docs"
    (source / "reference").mkdir(parents=True)
    for page in (DOCS / "reference").glob("*.rst"):
        (source / "reference" / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    (source / "index.rst").write_text(
        "Reference\n=========\n\n.. toctree::\n   :glob:\n\n   reference/*\n", encoding="utf-8"
    )
    options = {"extensions": ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]}
    app = sphinx.Sphinx(
        source, None, folder / "out", folder / "cache", "html", confoverrides=options, status=None, warning=None
    )
    app.build()
    return folder / "out"


# Warnings of Sphinx and its extensions about one another are not about this package.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_every_public_name_is_in_the_inventory(configuration, tmp_path):
    """Reads the site in the folder EQUIPOISE_SITE, if it is set."""
    inventory = pytest.importorskip("sphinx.util.inventory")
    site = Path(os.environ["EQUIPOISE_SITE"]) if "EQUIPOISE_SITE" in os.environ else build_reference(tmp_path)
    listed = inventory.InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    names = set(listed["py:class"]) | set(listed["py:function"])
    for family in configuration.FAMILIES:
        prefix = f"equipoise.{family}." if family else "equipoise."
        for name in configuration.public_names(family):
            assert prefix + name in names
