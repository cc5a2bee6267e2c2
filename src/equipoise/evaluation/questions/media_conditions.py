"""Media of a question under each condition: as given, blank, of another question, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...data.media_files import load_image
from ...errors import ConfigError
from .question_set import RATE, MediaQuestion

CONDITIONS = ("given", "blank", "other", "none")
"""Conditions of a black box; ``none`` is the question alone."""
STEER = "steer "
"""Start of the names of conditions under which the attention to the media is steered."""
MEAN_OF = 64
"""Number of images whose mean gives the color of blank images."""
Media = tuple[tuple[str, Any], ...]


class MediaConditions:
    """The media of questions under each condition.

    A blank image has the mean color of the first images, since the mean of the image itself would reveal its colors; a
    blank sound is silence of the same length. The media of another question are drawn by a seeded permutation without
    fixed points, and differ from the question's own.

    Args:
        questions: all questions.
        seed: of the permutation.
        other: whether the condition "other" is needed.
        rate: sample rate in Hz of sounds that are loaded from files.
        who: start of error messages.

    Raises:
        ConfigError: "other" is needed and all questions have the same media.
    """

    def __init__(
        self, questions: Sequence[MediaQuestion], seed: int = 0, *, other: bool = True, rate: int = RATE,
        who: str = "blind",
    ) -> None:  # fmt: skip
        self._questions, self._rate = questions, rate
        self._color: np.ndarray | None = None
        self._partners = _partners([_identity(question) for question in questions], seed, who) if other else []

    @property
    def order(self) -> list[int]:
        """Indices of the questions, most of them after the question whose media they get under "other"."""
        order: list[int] = []
        known: set[int] = set()
        for index in range(len(self._questions)):
            path = []
            while index not in known:
                known.add(index)
                path.append(index)
                index = self._partners[index] if self._partners else index
            order += reversed(path)
        return order

    def media(self, question: MediaQuestion, condition: str) -> Media:
        """Loads the media of a question under a condition."""
        if condition == "none":
            return ()
        if condition == "other":
            return self._questions[self._partners[question.index]].load(self._rate)
        media = question.load(self._rate)
        return (
            media
            if condition in ("given", "hidden") or condition.startswith(STEER)
            else tuple((name, self._blank(name, value)) for name, value in media)
        )

    def _blank(self, name: str, value: Any) -> Any:
        if name == "audio":
            return np.zeros_like(np.asarray(value))
        color = self._mean_color()
        if isinstance(value, Image.Image):
            return Image.new("RGB", value.size, tuple(round(part) for part in color))
        array = np.asarray(value)
        return np.full_like(array, np.asarray(_array_mean(self._questions)).astype(array.dtype))

    def _mean_color(self) -> np.ndarray:
        color = self._color
        if color is None:
            means = []
            for question in self._questions[:MEAN_OF]:
                for name, value in question.load():
                    if name == "image" and isinstance(value, Image.Image):
                        # As files are read; the range of the modes I and F is unknown.
                        colors = value.convert("RGB") if value.mode in ("RGB", "I", "F") else load_image(value)
                        means.append(np.asarray(colors, dtype=float).reshape(-1, 3).mean(axis=0))
            color = self._color = np.mean(means, axis=0) if means else np.full(3, 127.0)
        return color


def _array_mean(questions: Sequence[MediaQuestion]) -> float:
    arrays = [np.asarray(value) for question in questions[:MEAN_OF] for name, value in question.load()
              if name == "image" and not isinstance(value, Image.Image)]  # fmt: skip
    return float(np.mean([array.mean() for array in arrays]))


def _identity(question: MediaQuestion) -> str:
    """A digest of the media without loading files, so that questions about the same image are recognized."""
    values = [value.resolve() if isinstance(value, Path) else value for _, value in question.media]
    return digest(tuple((name, value) for (name, _), value in zip(question.media, values, strict=True)))


def digest(media: Media) -> str:
    """A hash of the content of media, or of the paths of files that are not loaded."""
    parts = hashlib.sha256()
    for name, value in media:
        parts.update(name.encode())
        if isinstance(value, Image.Image):
            parts.update(f"{value.mode}{value.size}".encode() + value.tobytes())
        elif isinstance(value, (bytes, str, Path)):
            parts.update(value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape"))
        elif isinstance(value, dict):
            parts.update(repr(sorted(value.items(), key=str)).encode())
        else:
            array = np.ascontiguousarray(np.asarray(value))
            parts.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return parts.hexdigest()


def _partners(identities: Sequence[str], seed: int, who: str) -> list[int]:
    """Returns, for each question, the index of a question with different media."""
    count = len(identities)
    order = np.random.default_rng(seed).permutation(count)
    partners = [0] * count
    for position, index in enumerate(order):
        for step in range(1, count):
            candidate = int(order[(position + step) % count])
            if identities[candidate] != identities[index]:
                partners[index] = candidate
                break
        else:
            raise ConfigError(
                f"{who} conditions", expected="questions with different media for the condition 'other'",
                got="the same media for all questions", fix="Leave out 'other': conditions=('given', 'blank', 'none').",
            )  # fmt: skip
    return partners
