"""Winoground scores of vision-language models that were trained on ``scenes``, on the minimal pairs of its captions.

    equipoise train --config scenes_vlm --method mlp --seed 0 --out runs/mlp0
    python benchmarks/minimal_pairs.py runs/mlp0

The score of a caption is its log-likelihood, with the end token, after "<image> describe". Images have no noise. The
kinds are "color" and "order", which the captions of ``scenes`` can express: objects are listed from left to right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import equipoise as eq
from equipoise.data import load_dataset
from equipoise.data.sets.text_codes import END, IDS, PAD
from equipoise.evaluation import MinimalPairScores
from equipoise.training.recipes import load_recipe
from equipoise.training.run import load_run_dataset


@torch.no_grad()
def caption_scores(model: torch.nn.Module, images: Tensor, text: Tensor) -> Tensor:
    """Returns log p(caption and end token | image) of (sample, 3, 48, 48) images and the texts of ``minimal_pairs``."""
    length = (text != IDS[PAD]).sum(dim=1)
    text = F.pad(text, (0, 1), value=IDS[PAD]).scatter(1, length[:, None], IDS[END])
    labels = text.masked_fill(text == IDS[PAD], -100)
    labels[:, :2] = -100
    stream = model.stream(model.patches(images), text, labels)
    steps = torch.log_softmax(model.logits(stream)[:, :-1].double(), dim=-1)
    target = stream.labels[:, 1:]
    return steps.gather(2, target.clamp(min=0)[..., None])[..., 0].masked_fill(target < 0, 0).sum(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for run in options.runs:
        model = eq.load(run).eval()
        scenes = load_run_dataset(load_recipe(run / "recipe.yaml"), None)
        source = load_dataset(
            "minimal_pairs", pairs=options.pairs, level=scenes.level, kinds=("color", "order"), seed=options.seed
        )
        images = scenes.standardized(source.test.inputs["image"]).unflatten(0, (-1, 2))
        text = source.test.inputs["text"].unflatten(0, (-1, 2))
        # Zero is the mean of the standardized training images.
        versions = [images[:, 0], images[:, 1], torch.zeros_like(images[:, 0])]
        scores = torch.stack(
            [torch.stack([caption_scores(model, image, text[:, n]) for n in (0, 1)], dim=1) for image in versions],
            dim=1,
        )
        print(f"{run}\n{MinimalPairScores(source.pairs('test'), scores[:, :2], scores[:, 2]).table()}\n")


if __name__ == "__main__":
    main()
