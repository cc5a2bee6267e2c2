"""Fraction of the questions of ``scenes`` that need their image, by type, against the construction of the data.

    equipoise compare --config scenes_vlm --methods mlp --seeds 1 --out runs
    python benchmarks/scenes_blind.py runs/runs/all/mlp/seed0

``eq.blind`` asks the trained model every question of the test split with its image and with the image of another
question. Every type of question has a number of equally likely answers, so that the image of another question gives
the right answer with probability 1 / answers: of the questions answered correctly, 1 - 1 / answers need their image.
The table compares this with the measured fraction and its 95 % interval (Wilson).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import equipoise as eq
from equipoise.evaluation.minimal_pair_scores import wilson_interval
from equipoise.training.recipes import load_recipe
from equipoise.training.run import load_run_dataset

ANSWERS = {"color": 6, "object": 8, "existence": 2, "state": 2, "count": 4, "relation": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test")
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

    result = eq.blind(target, samples, conditions=("given", "other"), metric="exact", name="mlp")
    print(
        "| question | questions | as given | other image | need the image | 95 % interval | by construction | inside |"
    )
    print("|---|---|---|---|---|---|---|---|")
    given, other = (result.scores[name] > 0.5 for name in ("given", "other"))
    for kind, row in result.by_category.items():
        rows = [number for number, sample in enumerate(samples) if sample["category"] == kind]
        correct = int(given[rows].sum())
        count = int((given & ~other)[rows].sum())
        low, high = wilson_interval(count / correct, correct)
        expected = 1 - 1 / ANSWERS[kind]
        print(
            f"| {kind} | {len(rows)} | {100 * row['given']:.1f} | {100 * row['other']:.1f} | "
            f"{100 * count / correct:.1f} | {100 * low:.1f} to {100 * high:.1f} | {100 * expected:.1f} | "
            f"{'yes' if low <= expected <= high else 'no'} |"
        )


if __name__ == "__main__":
    main()
