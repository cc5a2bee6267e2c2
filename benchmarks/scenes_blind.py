"""Fraction of the questions of ``scenes`` that need their image, by type, against the construction of the data.

    equipoise compare --config scenes_vlm --methods mlp --seeds 1 --out runs
    python benchmarks/scenes_blind.py runs/runs/all/mlp/seed0

``eq.blind`` asks the trained model every question of the test split with its image and with the images of five other
questions (``--others``). Other images are drawn independently of the right answer, so that a reply to one is right by
chance: of the questions answered correctly, 1 - sum_a p(a) q(a) need their image, with p the frequencies of the right
answers and q those of the replies to other images. That is 1 - 1 / answers if the replies are the possible answers
equally often; a model that replies "zero" when the image lacks the thing to count does not. The table compares both
with the measured fraction, the mean over the other images, and its 95 % interval (bootstrap over questions). Four
minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

import equipoise as eq
from equipoise.results.bootstrap import mean_of_resamples, percentile_interval
from equipoise.training.recipes import load_recipe
from equipoise.training.run import load_run_dataset

ANSWERS = {"color": 6, "object": 8, "existence": 2, "state": 2, "count": 4, "relation": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--others", type=int, default=5, help="images of other questions for each question")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = eq.load(options.run).eval()
    source = load_run_dataset(load_recipe(options.run / "recipe.yaml"), None)
    kinds = source.kinds(options.split)
    batches = source.batches(options.split, 500, seed=0, epoch=0, train=False)
    images = torch.cat([batch["image"] for batch in batches])
    samples = []
    for index, kind in enumerate(kinds):
        if kind != "caption":
            *question, answer = source.words(options.split, index)
            samples.append({
                "image": images[index].numpy(), "question": " ".join(question), "answer": answer, "category": kind,
            })  # fmt: skip

    @torch.no_grad()
    def target(image: object, prompt: str) -> str:
        text = torch.tensor([[model.ids[word] for word in prompt.split()]])
        answer = model.answer({"image": torch.as_tensor(image)[None], "text": text})
        return model.words[int(answer)]

    results = [
        eq.blind(target, samples, conditions=("given", "other"), metric="exact", seed=seed, name="mlp")
        for seed in range(options.others)
    ]
    print("| question | questions | as given | other | need the image | 95 % interval | expected | inside | even |")
    print("|---|---|---|---|---|---|---|---|---|")
    given = results[0].scores["given"] > 0.5
    wrong = np.mean([result.scores["other"] <= 0.5 for result in results], axis=0)
    replies = np.array([result.replies["other"] for result in results])
    categories, right = (np.array([sample[key] for sample in samples]) for key in ("category", "answer"))
    for kind in dict.fromkeys(categories.tolist()):
        rows = categories == kind
        needed = wrong[rows & given]
        low, high = percentile_interval(mean_of_resamples(needed)) or (math.nan, math.nan)
        chance = sum((right[rows & given] == a).mean() * (replies[:, rows] == a).mean() for a in set(right[rows]))
        print(
            f"| {kind} | {rows.sum()} | {100 * given[rows].mean():.1f} | {100 - 100 * wrong[rows].mean():.1f} | "
            f"{100 * needed.mean():.1f} | {100 * low:.1f} to {100 * high:.1f} | {100 - 100 * chance:.1f} | "
            f"{'yes' if low <= 1 - chance <= high else 'no'} | {100 - 100 / ANSWERS[kind]:.1f} |"
        )


if __name__ == "__main__":
    main()
