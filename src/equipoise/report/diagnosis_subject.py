"""One model on the page of a diagnosis: its content, metrics, and the colors of its modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from .html_page import FigureBlock
from .plot_style import INK, MODALITY, set_title, shorten, to_svg
from .text_format import method_title
from .verdict_evidence import VerdictEvidence

Content = Mapping[str, Any]


class ReportColumn:
    """One model on a page: its content, its index among the models, and the colors of the modalities.

    Args:
        content: a ``Diagnosis.to_dict()``.
        index: number of the model on the page.
        names: modalities of all models, so that each has the same color everywhere.
    """

    def __init__(self, content: Content, index: int = 0, names: tuple[str, ...] = ()) -> None:
        self.content, self.index = content, index
        self.name, self.names = str(content["name"]), tuple(content["names"])
        self.found = VerdictEvidence(content)
        self._all = names or self.names

    def details(self, test: str) -> Mapping[str, Any]:
        return self.content["details"].get(test) or {}

    def color(self, name: str) -> str:
        return MODALITY[self._all.index(name) % len(MODALITY)] if name in self._all else INK

    def render(self, figure: Figure, test: str, text: str) -> FigureBlock:
        """The figure with the name of the model as title, and its caption."""
        set_title(figure, shorten(self.name))
        return FigureBlock(
            Markup(to_svg(figure, f"d-{test}-{self.index}", f"{method_title(test)} of {self.name}. {text}")), text
        )
