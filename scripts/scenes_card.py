"""Prints the counted figures of docs/data/scenes.md, and draws docs/pictures/scenes.png."""

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
    taught = asked(data, "train")
    test = asked(data, "test")
    right = {kind: guessed(taught, test, kind) for kind in QUESTIONS}
    for kind, part in {**right, "mean": float(np.mean(list(right.values())))}.items():
        sys.stdout.write(f"{kind:10} {100 * part:.1f} %\n")
    rows = []
    for level in LEVELS:
        pictures = render_split("train", ACROSS, level, 0).pictures.permute(0, 2, 3, 1).numpy()
        rows.append(
            np.concatenate([np.pad(p, ((2, 2), (2, 2), (0, 0)), constant_values=255) for p in pictures], axis=1)
        )
    sheet = Image.fromarray(np.concatenate(rows))
    PICTURE.parent.mkdir(exist_ok=True)
    sheet.resize((TIMES * sheet.width, TIMES * sheet.height), Image.Resampling.NEAREST).save(PICTURE)


def asked(data: Scenes, split: str) -> dict[str, dict[str, Counter[str]]]:
    """Type -> question -> how often each answer is the true one."""
    found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for place, kind in enumerate(data.kinds(split)):
        if kind != "caption":
            *question, answer = data.words(split, place)
            found[kind][" ".join(question)][answer] += 1
    return found


def guessed(taught: dict, test: dict, kind: str) -> float:
    """Accuracy of the answer that the question had most often in training, or all questions of its type."""
    usual = Counter(answer for answers in taught[kind].values() for answer in answers.elements())
    right = sum(
        answers[(taught[kind].get(question) or usual).most_common(1)[0][0]] for question, answers in test[kind].items()
    )
    return right / sum(answers.total() for answers in test[kind].values())


if __name__ == "__main__":
    main()
