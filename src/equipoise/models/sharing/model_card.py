"""The model card, ``README.md``: how to load the model, the findings of its diagnosis, and its results."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ...diagnostics.suite import Diagnosis

MOST = 60
"""Largest number of metrics in the card."""


def write_model_card(
    model: nn.Module,
    *,
    repo_id: str | None = None,
    diagnosis: Diagnosis | None = None,
    run: Mapping[str, Any] | None = None,
) -> str:
    """Returns the card as Markdown with a YAML header; names and sentences are escaped.

    Args:
        model: the model.
        repo_id: its name on the Hub, for the example.
        diagnosis: findings and metrics to include.
        run: the run that trained it, as in ``results.json``; used for the results without a diagnosis.
    """
    names = getattr(model, "names", ())
    place = repo_id or "FOLDER"
    lines = [
        "---",
        "library_name: equipoise",
        "tags:",
        "- equipoise",
        "- multimodal",
        "---",
        "",
        f"# {_plain(place if repo_id else type(model).__name__)}",
        "",
        f"A `{type(model).__name__}` of [equipoise](https://pypi.org/project/equipoise/). Modalities: "
        f"{', '.join(map(_plain, names)) or 'unknown'}. Task: {_plain(str(getattr(model, 'task', 'unknown')))}. "
        f"Parameters: {sum(p.numel() for p in model.parameters()):,}.",
        "",
        "```python",
        "import equipoise as eq",
        "",
        f'model = eq.load("{re.sub("[^A-Za-z0-9._/-]", "", place)}")',
        "```",
    ]
    if run is not None:
        fold = f", fold {_plain(str(run['fold']))}" if run.get("fold") else ""
        lines += ["", f"Trained by the method `{_plain(str(run['method']))}` with seed {int(run['seed'])}{fold}."]
    if diagnosis is not None:
        first, *findings = str(diagnosis).splitlines()
        lines += ["", "## Findings", "", f"{_plain(first)} ({diagnosis.samples:,} samples)", ""]
        lines += [f"- {_plain(line)}" for line in findings]
        lines += [f"- not tested: {_plain(name)}, {_plain(reason)}" for name, reason in diagnosis.skipped.items()]
    metrics = diagnosis.metrics if diagnosis is not None else (run or {}).get("metrics") or {}
    known = {n: v for n, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
    if known:
        lines += ["", "## Results", "", "| metric | value |", "|---|---|"]
        lines += [f"| {_plain(name)} | {value:.4g} |" for name, value in list(known.items())[:MOST]]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Returns a text in one line, without HTML, links, table cells or code."""
    return re.sub(r"([\\`|\[\]*_<>!#])", r"\\\1", " ".join(text.split()))
