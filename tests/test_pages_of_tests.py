"""The code on the pages of docs/tests runs."""

import re
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).parent.parent / "docs" / "tests"


@pytest.mark.parametrize("page", ["collapse", "gap", "keys", "spread"])
def test_blocks_run(page, capsys):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    # A later block goes on where an earlier one ended.
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
    assert "nan" not in capsys.readouterr().out
