"""One model on the page of a diagnosis: its content, its figures, and the colors of its modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from .plot_style import INK, MODALITY, set_title, shorten, to_svg
from .text_format import method_title
from .verdict_evidence import VerdictEvidence

Content = Mapping[str, Any]


class DiagnosisFigure(NamedTuple):
    """A figure and the sentence under it."""

    svg: Markup
    text: str


class ReportColumn:
    """One model on a page: its content, its place among the models, and the colors of the modalities.

    Args:
        content: what ``Diagnosis.to_dict`` gives.
        place: its number among the models of the page.
        names: all modalities of all models, so that each has one color.
    """

    def __init__(self, content: Content, place: int = 0, names: tuple[str, ...] = ()) -> None:
        self.content, self.place = content, place
        self.name, self.names = str(content["name"]), tuple(content["names"])
        self.found = VerdictEvidence(content)
        self._all = names or self.names

    def details(self, test: str) -> Mapping[str, Any]:
        return self.content["details"].get(test) or {}

    def color(self, name: str) -> str:
        return MODALITY[self._all.index(name) % len(MODALITY)] if name in self._all else INK

    def picture(self, figure: Figure, test: str, text: str) -> DiagnosisFigure:
        """The figure under the model's name, and the sentence that says what is in it."""
        set_title(figure, shorten(self.name))
        return DiagnosisFigure(
            Markup(to_svg(figure, f"d-{test}-{self.place}", f"{method_title(test)} of {self.name}. {text}")), text
        )
