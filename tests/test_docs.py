"""The code of the documentation: every Python block, every notebook and every link works."""

import re
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTARTS = (ROOT / "docs" / "start" / "quickstarts.md").read_text(encoding="utf-8")


def code_blocks(page: Path) -> list[str]:
    """The Python blocks of a page, without the indentation of a list around them."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(text) for _, text in blocks]


def test_quickstarts_are_short():
    assert len(re.findall(r"^## \d", QUICKSTARTS, re.MULTILINE)) == 5
    for block in re.findall(r"```(?:python|sh)\n(.*?)```", QUICKSTARTS, re.DOTALL):
        assert len([line for line in block.splitlines() if line.strip()]) <= 15, block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch, tmp_path):
    # The kernel's event loop and sockets are not ours to check for warnings.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = [cell for cell in notebook.cells if cell.get("outputs")]
    assert len(printed) >= 3
