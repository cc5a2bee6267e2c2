"""Prints the tables of docs/methods/vision_language.md from the results of a comparison.

equipoise compare --config scenes_vlm --out runs python scripts/scenes_tables.py runs/results.json"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from equipoise.data.sets.scene_questions import QUESTIONS
from equipoise.data.sets.scenes import Scenes
from equipoise.models.vision_language.grounding import pointing_metrics
from equipoise.training.method_factory import build_model, parse_method
from equipoise.training.recipes import load_recipe

METHODS = ("linear", "mlp", "qformer", "resampler", "gated")
PICTURES = ("", "_shuffled", "_blank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--untrained", action="store_true", help="also print the pointing metrics of untrained models")
    chosen = parser.parse_args()
    results = json.loads(chosen.results.read_text(encoding="utf-8"))
    rows = {(row["method"], row["metric"]): row for row in results["summary"]}
    methods = [method for method in METHODS if (method, "accuracy") in rows]
    for made in (by_type, compared, pointed):
        sys.stdout.write(made(rows, methods) + "\n\n")
    if chosen.untrained:
        sys.stdout.write(pointed(untrained(("mlp", "gated")), ("mlp", "gated")) + "\n")


def by_type(rows: dict, methods: Sequence[str]) -> str:
    """Table of question type x connector: accuracy with the matching, another sample's and a blank image."""

    def cell(method: str, kind: str) -> str:
        values = [rows[method, f"accuracy{picture}{kind}"]["mean"] for picture in PICTURES]
        return " / ".join(f"{100 * value:.0f}" for value in values)

    lines = [[name or "all", *(cell(method, f"/{name}" if name else "") for method in methods)]
             for name in (*QUESTIONS, "")]  # fmt: skip
    return table(["question", *methods], lines)


def compared(rows: dict, methods: Sequence[str]) -> str:
    """Table of connector x metric: mean and deviation over seeds, and the accuracy difference to the reference."""
    wanted = ("accuracy", "accuracy_known", "accuracy_new", "caption_exact", "caption_f1")
    lines = []
    for method in methods:
        row = rows[method, "accuracy"]
        against = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        p = "" if row.get("p") is None else f"{row['p']:.2f}"
        figures = [spread(rows[method, name]) for name in wanted]
        lines.append([method, *figures, against, p, f"{rows[method, 'parameters']['mean'] / 1e3:.0f} k"])
    head = ["connector", "accuracy", "known", "new", "captions exact", "words F1", "to linear", "p", "parameters"]
    return table(head, lines)


def pointed(rows: dict, methods: Sequence[str]) -> str:
    """Table of connector x pointing metric."""
    wanted = ("pointing", "chance", "pointing_mean", "pointing_choice", "chance_choice", "share_picture")
    lines = [
        [method, kind, *(spread(rows[method, f"{name}/{kind}"]) for name in wanted)]
        for method in methods for kind in ("color", "shape") if (method, f"pointing/{kind}") in rows
    ]  # fmt: skip
    head = ["connector", "words", "best head", "chance", "all heads", "among objects", "chance", "to image"]
    return table(head, lines)


@torch.no_grad()
def untrained(methods: Sequence[str], seeds: int = 3) -> dict:
    """Pointing metrics of randomly initialized models."""
    recipe = load_recipe("scenes_vlm")
    source, rows = Scenes(level=recipe.data["level"]), {}
    for method in methods:
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model, _ = build_model(parse_method(method, recipe), recipe, source)
            found.append(pointing_metrics(model.eval(), source))  # type: ignore[arg-type]
        for name in found[0]:
            values = [metrics[name] for metrics in found]
            rows[method, name] = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
    return rows


def spread(row: dict) -> str:
    sd = "" if not row["sd"] else f" ± {100 * row['sd']:.1f}"
    return f"{100 * row['mean']:.1f}{sd}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    written = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([written[0], "|" + "---|" * len(head), *written[1:]])


if __name__ == "__main__":
    main()
