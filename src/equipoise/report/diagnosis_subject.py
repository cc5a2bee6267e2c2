"""One model on the page of a diagnosis: its content, its figures, and the colours of its modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from .canvas import INK, MODALITY, headed, shorten, to_svg
from .evidence import Evidence
from .wording import title

Content = Mapping[str, Any]


class Picture(NamedTuple):
    """A figure and the sentence under it."""

    svg: Markup
    text: str


class Subject:
    """One model on a page: its content, its place among the models, and the colours of the modalities.

    Args:
        content: what ``Diagnosis.to_dict`` gives.
        place: its number among the models of the page.
        names: all modalities of all models, so that each has one colour.
    """

    def __init__(self, content: Content, place: int = 0, names: tuple[str, ...] = ()) -> None:
        self.content, self.place = content, place
        self.name, self.names = str(content["name"]), tuple(content["names"])
        self.found = Evidence(content)
        self._all = names or self.names

    def details(self, test: str) -> Mapping[str, Any]:
        return self.content["details"].get(test) or {}

    def colour(self, name: str) -> str:
        return MODALITY[self._all.index(name) % len(MODALITY)] if name in self._all else INK

    def picture(self, figure: Figure, test: str, text: str) -> Picture:
        """The figure under the model's name, and the sentence that says what is in it."""
        headed(figure, shorten(self.name))
        return Picture(Markup(to_svg(figure, f"d-{test}-{self.place}", f"{title(test)} of {self.name}. {text}")), text)
