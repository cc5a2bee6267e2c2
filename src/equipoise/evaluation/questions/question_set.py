"""Questions about images or sounds: reads and checks samples."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...data.media_files import load_image, read_audio
from ...errors import ConfigError, DataError

RATE = 16_000
"""Sample rate in Hz to which sound files are resampled."""
FIELDS = {"image": "image", "images": "image", "audio": "audio"}
"""Field of a sample -> its modality."""
LETTERS = string.ascii_uppercase


@dataclass(frozen=True, eq=False)
class MediaQuestion:
    """A question, its media and its answer.

    Attributes:
        index: position in the data.
        sample: the sample as it was given.
        media: (modality, file or content) of each image and sound, in order.
        text: the question.
        answers: accepted answers; the right choice if there are choices.
        choices: possible answers; empty for open questions.
        target: index of the right choice; None for open questions.
        category: for results by category; "" for none.
    """

    index: int
    sample: Mapping[str, Any]
    media: tuple[tuple[str, Any], ...]
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    target: int | None = None
    category: str = ""

    @property
    def prompt(self) -> str:
        """The question, followed by its choices with letters."""
        if not self.choices:
            return self.text
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.text, *lines, "Answer with the letter of the right choice."])

    def load(self, rate: int = RATE) -> tuple[tuple[str, Any], ...]:
        """Loads files: images become RGB images, sounds arrays (sample,) at a sample rate; other content stays."""
        return tuple((name, load_medium(name, value, f"sample {self.index}", rate)) for name, value in self.media)


def load_medium(name: str, value: Any, who: str, rate: int = RATE) -> Any:
    """Loads an image or a sound, where it is a file or the content of one."""
    if isinstance(value, Mapping) and ("path" in value or "bytes" in value):
        # As data sets of Hugging Face hold media.
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, Path, bytes)):
        return value
    return load_image(value, who=f"{who} image") if name == "image" else read_audio(value, rate, who=f"{who} audio")


def checked_medium(name: str, value: Any, index: int) -> Any:
    """Returns an image or a sound as files are read; processors cut 16-bit images at 255, and take stereo for a batch.

    Args:
        name: "image" or "audio".
        value: what ``load_medium`` returns.
        index: of the question.

    Raises:
        DataError: a sound other than a floating array (sample,); an image of unknown range.
    """
    who = f"evaluate sample {index} {name}"
    if name == "audio":
        array = hasattr(value, "__array__") and not isinstance(value, Tensor)
        return read_audio(np.asarray(value) if array else value, RATE, who=who)
    return load_image(value, who=who) if isinstance(value, Image.Image) and value.mode != "RGB" else value


def read_questions(
    samples: Iterable[Mapping[str, Any]], *, who: str = "blind", root: str | Path | None = None,
    check_files: bool = True,
) -> list[MediaQuestion]:  # fmt: skip
    """Reads samples with "image", "images" or "audio", "question", "answer" and optionally "choices" and "category".

    Args:
        samples: dicts. "answer" is a text, a list of accepted texts, or with "choices" the right choice, its letter or
            its index from 0. Media are files, Pillow images or arrays.
        who: start of the error messages.
        root: folder of relative paths.
        check_files: whether to check that all files exist.

    Raises:
        DataError: no samples, or one without a question, an answer or media; choices of different types, duplicate
            choices, an answer that is no choice, a missing file.
    """
    questions = [_question(index, sample, who, root) for index, sample in enumerate(samples)]
    if not questions:
        raise DataError(who, expected="at least one question", got="none")
    for question in questions if check_files else ():
        for name, value in question.media:
            if isinstance(value, (str, Path)) and not Path(value).is_file():
                raise DataError(
                    f"{who} sample {question.index}", expected=f"an existing {name} file", got=f"'{value}'",
                    fix="Relative paths start at the folder of the table, or at root=.",
                )  # fmt: skip
    return questions


def _question(index: int, sample: Any, who: str, root: str | Path | None) -> MediaQuestion:
    location = f"{who} sample {index}"
    if not isinstance(sample, Mapping):
        raise DataError(
            location, expected='a dict with "image" or "audio", "question" and "answer"', got=repr(sample)[:80]
        )
    text = sample.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError(location, expected='a text "question"', got=_shown(text))
    media = _media(sample, location, root)
    category = sample.get("category")
    choices = _choices(sample.get("choices"), location)
    answers, target = _answer(sample.get("answer"), choices, location)
    return MediaQuestion(
        index, sample, media, text.strip(), answers, choices, target, "" if category is None else str(category)
    )


def _media(sample: Mapping[str, Any], location: str, root: str | Path | None) -> tuple[tuple[str, Any], ...]:
    media: list[tuple[str, Any]] = []
    for field, name in FIELDS.items():
        value = sample.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        for one in values:
            if isinstance(one, (str, Path)):
                one = Path(one) if root is None else Path(root) / one
            elif not isinstance(one, (bytes, Mapping, Image.Image, np.ndarray)) and not hasattr(one, "__array__"):
                raise DataError(location, expected=f"{field} as a file, a Pillow image or an array", got=_shown(one))
            media.append((name, one))
    if not media:
        raise DataError(
            location, expected='an "image", "images" or "audio"', got=f"the fields {', '.join(map(str, sample))}"
        )
    return tuple(media)


def _choices(value: Any, location: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        # A cell of a csv file.
        value = [part.strip() for part in value.split("|")] if value.strip() else []
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise DataError(location, expected='"choices" as a list of texts', got=_shown(value))
    values = [one for one in value if one is not None]
    kinds = {"number" if isinstance(one, (int, float)) and not isinstance(one, bool) else type(one).__name__
             for one in values}  # fmt: skip
    if len(kinds) > 1 or kinds - {"str", "number"}:
        raise DataError(
            location, expected='"choices" that are all texts, or all numbers', got=", ".join(sorted(kinds)),
            fix="Write all choices as texts.",
        )  # fmt: skip
    texts = tuple(str(one).strip() for one in values)
    if not texts:
        return ()
    if len(texts) == 1 or len(set(texts)) < len(texts) or not all(texts) or len(texts) > len(LETTERS):
        raise DataError(location, expected="from 2 to 26 different choices", got=_shown(list(texts)))
    return texts


def _answer(value: Any, choices: Sequence[str], location: str) -> tuple[tuple[str, ...], int | None]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    missing = [one for one in values if one is None or (isinstance(one, str) and not one.strip())]
    if not values or missing or not all(isinstance(one, (str, int, float)) for one in values):
        raise DataError(location, expected='an "answer"', got=_shown(value), fix="Remove questions without an answer.")
    if not choices:
        return tuple(text for one in values for text in _texts(one)), None
    if len(values) > 1:
        raise DataError(location, expected="a single right choice", got=_shown(value))
    (one,) = values
    if str(one).strip() in choices:
        target = choices.index(str(one).strip())
    elif isinstance(one, int) and not isinstance(one, bool) and 0 <= one < len(choices):
        target = one
    elif isinstance(one, str) and one.strip().upper() in LETTERS[: len(choices)]:
        target = LETTERS.index(one.strip().upper())
    else:
        raise DataError(
            location, expected=f"an answer among the choices {_shown(list(choices))}", got=_shown(one),
            fix="Give the choice itself, its letter, or its index from 0.",
        )  # fmt: skip
    return (choices[target],), target


def _texts(value: Any) -> tuple[str, ...]:
    """The accepted texts of an answer; tables turn "true" into a truth value."""
    if isinstance(value, bool):
        return ("yes", "true") if value else ("no", "false")
    return (str(value).strip(),)


def _shown(value: Any) -> str:
    text = repr(value)
    return "none" if value is None else text if len(text) <= 80 else f"{text[:77]}..."


def check_choice(who: str, kind: str, values: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """Checks that all values are known and none occurs twice.

    Raises:
        ConfigError: an unknown or repeated value, or none.
    """
    if isinstance(values, str):
        values = (values,)
    wrong = [value for value in values if value not in choices]
    if wrong or not values or len(set(values)) < len(values):
        raise ConfigError(
            f"{who} {kind}", expected=f"some of {', '.join(choices)}, each once", got=_shown(list(values)),
        )  # fmt: skip
    return tuple(values)
