"""Scores of replies: exact, normalized, by choice, or by a function."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

from ...errors import ConfigError, unknown_name
from .question_set import LETTERS, MediaQuestion

Scoring = Callable[[str, MediaQuestion], float]
METRICS = ("exact", "normalized", "choice")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = {"a", "an", "the"}
LEAD = re.compile(
    r"^\s*(?:the\s+)?(?:correct\s+|right\s+|final\s+|best\s+)?(?:answer|choice|option)\s*(?:is|:|=)?\s*:?\s*", re.I
)


def scoring_for(metric: Any, questions: list[MediaQuestion]) -> tuple[str, Scoring]:
    """Returns the name and the function of a metric.

    Args:
        metric: "exact", "normalized", "choice", or a function (reply, sample) -> number from 0 to 1; None is "choice"
            for questions with choices and "normalized" for others.
        questions: all questions.

    Raises:
        ConfigError: an unknown metric, or "choice" for a question without choices.
    """
    if callable(metric):
        return getattr(metric, "__name__", "function"), lambda reply, question: _own(metric, reply, question)
    if metric is None:
        return "choice or normalized", lambda reply, question: (choice if question.choices else normalized)(
            reply, question
        )
    if metric not in METRICS:
        raise unknown_name("blind", "metric", str(metric), METRICS)
    if metric == "choice" and any(not question.choices for question in questions):
        raise ConfigError("blind metric", expected="questions with choices for 'choice'", got="one without",
                          fix="Use 'normalized' or 'exact'.")  # fmt: skip
    return metric, {"exact": exact, "normalized": normalized, "choice": choice}[metric]


def exact(reply: str, question: MediaQuestion) -> float:
    """1 if the reply is an accepted answer, character by character except for spaces at the ends."""
    return float(reply.strip() in question.answers)


def normalized(reply: str, question: MediaQuestion) -> float:
    """1 if the normalized reply is an accepted answer.

    Case, punctuation, articles and a leading "The answer is" are removed, and number words become digits. Yes and no
    also count at the beginning of a longer reply.
    """
    accepted = {normalize(answer) for answer in question.answers}
    if accepted & {"yes", "no"} and yes_or_no(reply) in accepted:
        return 1.0
    return float(bool(accepted & {normalize(reply), normalize(LEAD.sub("", reply)), normalize(_first_line(reply))}))


def choice(reply: str, question: MediaQuestion) -> float:
    """1 if the reply names the right choice."""
    return float(chosen(reply, question.choices) == question.target)


def chosen(reply: str, choices: tuple[str, ...]) -> int | None:
    """Returns the index of the choice that a reply names, by its letter or text; None if it names none or several."""
    texts = [normalize(text) for text in choices]
    body = LEAD.sub("", reply.strip())
    for candidate in (reply, body, _first_line(body)):
        if (text := normalize(candidate)) in texts:
            return texts.index(text)
    letters = LETTERS[: len(choices)]
    match = re.match(rf"^[\s*_(\[]*([{letters}{letters.lower()}])(?:[\s*_)\]]*$|[*_]*[.):\]])", body)
    if match is None:
        match = re.match(rf"^[\s*_(\[]*([{letters}])\b(?!['’])", body)
        # "A" also begins sentences.
        if match is not None and match[1] == "A" and re.match(r"^\W*A\s+\w", body):
            match = None
    if match is not None:
        return letters.index(match[1].upper())
    padded = f" {normalize(reply)} "
    matches = [index for index, text in enumerate(texts) if text and f" {text} " in padded]
    # A choice that is part of another one, such as "bus" in "school bus", does not count.
    matches = [n for n in matches if not any(n != m and f" {texts[n]} " in f" {texts[m]} " for m in matches)]
    return matches[0] if len(matches) == 1 else None


def normalize(text: str) -> str:
    """Lower case, without accents of presentation, punctuation and articles, with digits for number words.

    Example:
        >>> normalize(" The  Two red cars. ")
        '2 red cars'
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    words = re.findall(r"[+-]?\d+(?:\.\d+)?|\w+", text)
    retained = [str(NUMBERS.index(word)) if word in NUMBERS else word for word in words if word not in ARTICLES]
    return " ".join(retained or words)


def yes_or_no(reply: str) -> str | None:
    """Returns "yes" or "no" if a reply starts with it, else None.

    Example:
        >>> yes_or_no("No, there is none."), yes_or_no("It is not clear.")
        ('no', None)
    """
    words = normalize(LEAD.sub("", reply)).split()
    return words[0] if words and words[0] in ("yes", "no") else None


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


def _own(metric: Callable[[str, Any], Any], reply: str, question: MediaQuestion) -> float:
    value = float(metric(reply, question.sample))
    if not 0 <= value <= 1:
        raise ConfigError("blind metric", expected="a number from 0 to 1", got=str(value))
    return value
