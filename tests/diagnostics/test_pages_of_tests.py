"""The pages of docs/diagnostics: complete, and what they show runs."""

import re
from pathlib import Path

import pytest
import torch

import equipoise as eq
from helpers.fusion import batch, joint_model

PAGES = Path(__file__).parents[2] / "docs" / "diagnostics"
NAMES = sorted(page.stem for page in PAGES.glob("*.md"))
HEADINGS = ("Formula", "Call", "Interpretation", "When it misleads")


@pytest.mark.parametrize("page", NAMES)
def test_page_is_complete_and_its_code_runs(page, capsys):
    torch.manual_seed(0)
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    assert all(f"\n## {heading}\n" in text for heading in HEADINGS)
    loader = [batch(seed=seed) for seed in range(2)]
    # A later block goes on where an earlier one ended.
    given = {"model": joint_model(), "loader": loader, "known_loader": loader, "unknown_loader": [batch(seed=5)]}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), given)
    message = capsys.readouterr().out
    assert "nan" not in message
    assert re.search(r"\d\.\d", message)


@pytest.mark.parametrize("page", NAMES)
def test_page_refers_to_existing_names(page):
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    assert all(hasattr(eq, name) for name in re.findall(r"`eq\.(\w+)", text))
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (PAGES / link).exists()
    root = PAGES.parent.parent
    for file in re.findall(r"`((?:diagnose|tests)/\w+\.py)`", text):
        assert (root / file).exists() or (root / "src" / "equipoise" / file).exists()
