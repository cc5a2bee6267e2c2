"""Sentences on what scores with and without the medium say."""

from __future__ import annotations

from typing import Any

import numpy as np

BIAS = 0.15
"""Difference between the rates of yes in replies and answers from which a bias is reported."""
LEVEL = 0.05


def verdict_sentences(result: Any) -> list[str]:
    """Returns the sentences for a ``QuestionResult``: how many questions need the medium, what the target uses, and what
    limits these statements."""
    medium = {"image": "the image", "audio": "the audio"}.get(result.medium, "the media")
    accuracy, without = result.accuracy["given"], result.without
    if np.isnan(accuracy):
        return ["No question was answered: every call failed."]
    sentences = []
    if without is not None and result.as_well is not None:
        change = result.difference(without)
        interval = change["interval"]
        between = "" if interval is None else f", 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
        sentences.append(
            f"{100 * result.as_well:.0f} % of these questions are answered as well without {medium} (accuracy "
            f"{100 * accuracy:.1f} % with it, {100 * result.accuracy[without]:.1f} % without, difference "
            f"{100 * change['difference']:.1f} points{between})."
        )
        sentences.append(_use(result, medium, accuracy, change))
    sentences += _other(result, medium)
    sentences += _bias(result, medium)
    if result.failed:
        sentences.append(
            f"{result.failed} of {len(result.questions) * len(result.conditions)} calls failed and are not scored; the "
            f"first: {next(iter(result.errors.values()))}."
        )
    return sentences


def _use(result: Any, medium: str, accuracy: float, change: dict[str, Any]) -> str:
    chance, interval = result.chance, result.interval("given")
    if chance == 1:
        return "All questions have the same answer, so that these scores say nothing about what is used."
    if interval is None or (interval[0] <= chance and accuracy <= chance + 0.5 * (1 - chance)):
        return (
            f"The answers are at random as far as {len(result.questions)} questions show: an accuracy of {100 * accuracy:.1f} % "
            f"is not above chance, {100 * chance:.1f} %."
        )
    rest = result.accuracy[result.without]
    if change["p"] < LEVEL and change["difference"] > 0:
        if result.interval(result.without) is not None and result.interval(result.without)[0] <= chance:
            return (
                f"The answers come from {medium}: without it, the accuracy is not above chance, {100 * chance:.1f} %."
            )
        return (
            f"The answers come partly from {medium}: {len(result.needing)} questions need it, and "
            f"{len(result.answered_without)} are answered without it."
        )
    if change["p"] < LEVEL:
        return f"The accuracy is higher without {medium}: it distracts from the answers."
    return (
        f"The answers come from the text alone: no use of {medium} is found, and {100 * rest:.1f} % of the questions are "
        "answered without it."
    )


def _other(result: Any, medium: str) -> list[str]:
    if "other" not in result.conditions or not np.isfinite(result.scores["other"]).any() or result.without is None:
        return []
    change = result.difference("other")
    if change["p"] is None or change["p"] >= LEVEL or change["difference"] <= 0:
        return []
    if result.accuracy["other"] < result.accuracy[result.without] - 0.02:
        return [
            f"{medium[4:].capitalize()} of another question misleads: accuracy {100 * result.accuracy['other']:.1f} %."
        ]
    return []


def _bias(result: Any, medium: str) -> list[str]:
    counts = result.yes_no.get("given")
    if not counts:
        return []
    difference = counts["yes_replies"] - counts["yes_answers"]
    if abs(difference) < BIAS:
        return []
    word = "yes" if difference > 0 else "no"
    replied, right = (
        (counts["yes_replies"], counts["yes_answers"])
        if word == "yes"
        else (1 - counts["yes_replies"], 1 - counts["yes_answers"])
    )
    return [
        f"There is a bias to {word}: it is the reply to {100 * replied:.0f} % of the yes-or-no questions, and the answer to "
        f"{100 * right:.0f} %."
    ]
