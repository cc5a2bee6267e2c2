"""Reports as self-contained HTML pages, with figures, tables and findings in sentences."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import require_extra

if TYPE_CHECKING:
    from .comparison_page import page as page
    from .comparison_page import report as report
    from .results_view import ResultsView as ResultsView

# Imported at first use, since pages need matplotlib and Jinja: attribute -> module that defines it.
_LAZY_NAMES = {"page": ".comparison_page", "report": ".comparison_page", "ResultsView": ".results_view"}


def __getattr__(name: str):
    if name in _LAZY_NAMES:
        with require_extra(f"eq.report.{name}"):
            return getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
    raise AttributeError(f"module 'equipoise.report' has no attribute '{name}'")
