"""Prints the question-only baseline of docs/data/scenes.md, and draws docs/pictures/scenes.png."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from equipoise.data.sets.scene_questions import QUESTIONS
from equipoise.data.sets.scenes import LEVELS, Scenes, render_split

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "scenes.png"
ACROSS, TIMES = 12, 2


def main() -> None:
    data = Scenes()
    train, test = count_answers(data, "train"), count_answers(data, "test")
    accuracies = {kind: question_only_accuracy(train, test, kind) for kind in QUESTIONS}
    for kind, accuracy in {**accuracies, "mean": float(np.mean(list(accuracies.values())))}.items():
        sys.stdout.write(f"{kind:10} {100 * accuracy:.1f} %\n")
    rows = []
    for level in LEVELS:
        pictures = render_split("train", ACROSS, level, 0).pictures.permute(0, 2, 3, 1).numpy()
        rows.append(
            np.concatenate([np.pad(p, ((2, 2), (2, 2), (0, 0)), constant_values=255) for p in pictures], axis=1)
        )
    sheet = Image.fromarray(np.concatenate(rows))
    PICTURE.parent.mkdir(exist_ok=True)
    sheet.resize((TIMES * sheet.width, TIMES * sheet.height), Image.Resampling.NEAREST).save(PICTURE)


def count_answers(data: Scenes, split: str) -> dict[str, dict[str, Counter[str]]]:
    """Returns type -> question -> number of occurrences of each correct answer."""
    found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for index, kind in enumerate(data.kinds(split)):
        if kind != "caption":
            *question, answer = data.words(split, index)
            found[kind][" ".join(question)][answer] += 1
    return found


def question_only_accuracy(train: dict, test: dict, kind: str) -> float:
    """Returns the accuracy of the most frequent training answer to the question, or to all questions of its type."""
    overall = Counter(answer for answers in train[kind].values() for answer in answers.elements())
    correct = sum(
        answers[(train[kind].get(question) or overall).most_common(1)[0][0]] for question, answers in test[kind].items()
    )
    return correct / sum(answers.total() for answers in test[kind].values())


if __name__ == "__main__":
    main()
