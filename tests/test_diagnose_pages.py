"""The pages of docs/tests: complete, and what they show runs."""

import re
from pathlib import Path

import pytest

from equipoise import diagnose
from small_fusion import batch, model

PAGES = Path(__file__).parent.parent / "docs" / "tests"
OURS = ("corruption", "gradients", "masking", "ood", "shapley")


@pytest.mark.parametrize("page", OURS)
def test_a_page_is_complete_and_its_code_runs(page, capsys):
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for heading in ("Formula", "Call", "What the figure means", "When it misleads"):
        assert f"\n## {heading}\n" in text
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    loader = [batch(seed=seed) for seed in range(2)]
    exec(block, {"model": model(), "loader": loader, "known_loader": loader, "unknown_loader": [batch(seed=5)]})
    assert re.search(r"\d\.\d", capsys.readouterr().out)


@pytest.mark.parametrize("page", OURS)
def test_a_page_names_what_is_there(page):
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    first = text.split("\n*", 1)[0]
    assert all(hasattr(diagnose, name) for name in re.findall(r"`eq\.(\w+)", first))
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (PAGES / link).exists()
    root = PAGES.parent.parent
    for file in re.findall(r"`((?:diagnose|tests)/\w+\.py)`", text):
        assert (root / file).exists() or (root / "src" / "equipoise" / file).exists()
