"""Sentences that summarize the scores with and without the image or sound."""

from __future__ import annotations

from typing import Any

import numpy as np

BIAS = 0.15
"""Difference between the rates of yes in replies and answers from which a bias is reported."""
LEVEL = 0.05


def verdict_sentences(result: Any) -> list[str]:
    """Returns the sentences on a ``QuestionResult``.

    They say how many questions need the image or sound, whether the model uses it, whether it is biased to yes or no,
    which calls failed, and which conditions and values the model does not have.
    """
    medium = {"image": "the image", "audio": "the audio"}.get(result.medium, "the media")
    accuracy, without = result.accuracy["given"], result.without
    if np.isnan(accuracy):
        first = "".join(f"; the first: {error}" for error in list(result.errors.values())[:1])
        return [f"No question was answered: every call failed{first}.", *result.notes]
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
    return [*sentences, *result.notes]


def _use(result: Any, medium: str, accuracy: float, change: dict[str, Any]) -> str:
    chance, interval = result.chance, result.interval("given")
    if chance == 1:
        return f"All questions have the same answer, so the scores do not show whether the model uses {medium}."
    if interval is None or (interval[0] <= chance and accuracy <= chance + 0.5 * (1 - chance)):
        return (
            f"The accuracy of {100 * accuracy:.1f} % on {len(result.questions)} questions is not significantly above "
            f"chance, {100 * chance:.1f} %."
        )
    rest = result.accuracy[result.without]
    if change["p"] < LEVEL and change["difference"] > 0:
        if result.interval(result.without) is not None and result.interval(result.without)[0] <= chance:
            return (
                f"The answers depend on {medium}: without it, the accuracy is not significantly above chance, "
                f"{100 * chance:.1f} %."
            )
        return (
            f"The answers depend partly on {medium}: {len(result.needing)} questions need it, and "
            f"{len(result.answered_without)} are answered without it."
        )
    if change["p"] < LEVEL:
        return f"The accuracy is significantly higher without {medium}."
    return f"No significant use of {medium}: {100 * rest:.1f} % of the questions are answered correctly without it."


def _other(result: Any, medium: str) -> list[str]:
    if "other" not in result.conditions or not np.isfinite(result.scores["other"]).any() or result.without is None:
        return []
    change = result.difference("other")
    if change["p"] is None or change["p"] >= LEVEL or change["difference"] <= 0:
        return []
    if result.accuracy["other"] < result.accuracy[result.without] - 0.02:
        return [
            f"With {medium} of another question, the accuracy is lower than without {medium}: "
            f"{100 * result.accuracy['other']:.1f} %."
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
        f"There is a bias to {word}: it is the reply to {100 * replied:.0f} % of the yes-or-no questions, and the "
        f"answer to {100 * right:.0f} %."
    ]
