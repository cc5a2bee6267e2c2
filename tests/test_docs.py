"""The code of the documentation: every Python block, every notebook and every link works."""

import re
import textwrap
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from helpers import fusion, raw_layouts, vlms

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts)]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FAST_NOTEBOOK = "measure_vlm"
QUICKSTARTS = (DOCS / "start" / "quickstarts.md").read_text(encoding="utf-8")
# Pages that the tests of their part of the package run, with inputs of their own.
RUN_ELSEWHERE = (
    "data/av_digits.md", "data/digits.md", "data/emoji.md", "diagnostics/", "methods/", "diagnose.md", "evaluate.md",
    "hugging_face.md", "look.md", "whisper.md",
)  # fmt: skip


def code_blocks(page: Path) -> list[str]:
    """The Python blocks of a page, without the indentation of a list around them."""
    text = page.read_text(encoding="utf-8")
    return [textwrap.dedent(code) for code in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUN_HERE = [
    page for page in PAGES if code_blocks(page) and not page_name(page).removeprefix("docs/").startswith(RUN_ELSEWHERE)
]


def vlm_context() -> dict[str, object]:
    """The names of the blocks that generate from an image: a small model, and a processor that returns its inputs."""
    model, inputs = vlms.llava()
    return {"vlm": model, "image": None, "prompt": "", "processor": lambda **_: {**inputs, "max_new_tokens": 2}}


def answer_context() -> dict[str, object]:
    """The names of the blocks that measure an answer: a small model, its inputs, and the labels of two tokens."""
    model, inputs = vlms.llava()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return {"model": model.eval(), "inputs": inputs, "labels": labels}


def training_context() -> dict[str, object]:
    """The names of the blocks that train and test a model."""
    model = fusion.joint_model()
    loader = [fusion.batch(seed=seed) for seed in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "train_loader": loader, "test_loader": loader}


@pytest.mark.parametrize("page", RUN_HERE, ids=page_name)
def test_python_blocks_run_in_order(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    if page.name in {"README.md", "index.md"}:
        names |= vlm_context() | training_context()
    if page.name == "published.md":
        raw_layouts.make_raw("cremad", Path("downloads/CREMA-D"))
    if page.name == "steer.md":
        names |= answer_context()
    for block in code_blocks(page):
        exec(compile(block, page_name(page), "exec"), names)


def test_quickstarts_are_short():
    assert len(re.findall(r"^## \d", QUICKSTARTS, re.MULTILINE)) == 5
    for block in re.findall(r"```(?:python|sh)\n(.*?)```", QUICKSTARTS, re.DOTALL):
        assert len([line for line in block.splitlines() if line.strip()]) <= 15, block


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_point_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:tests|benchmarks|docs|examples|notebooks|scripts)/[\w/.-]+\.\w+", text)
    named += [f"src/equipoise/{name}" for name in re.findall(r"`((?:[a-z_]+/)+\w+\.py)`", text)]
    missing = [
        name for name in named if not (ROOT / name).exists() and not (ROOT / name[len("src/equipoise/") :]).exists()
    ]
    assert not missing


def test_fast_notebook_exists():
    assert FAST_NOTEBOOK in {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem == FAST_NOTEBOOK else pytest.mark.slow, id=path.stem)
        for path in NOTEBOOKS
    ],
)
# Warnings of the client's own event loop are not about the notebooks.
@pytest.mark.filterwarnings("ignore")
def test_notebooks_run(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert len([cell for cell in notebook.cells if cell.get("outputs")]) >= 3
