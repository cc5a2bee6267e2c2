"""Score of trained runs under damage, with and without eq.Reliability, and the cost of a wrapped prediction.

    equipoise compare --config utd_mhad --methods inertial,skeleton,concat_aux+corruption,ensemble+corruption --seeds 3 --out runs
    python benchmarks/reliability.py runs --methods concat_aux+corruption,ensemble+corruption --seeds 3

Each run is wrapped by Reliability.fit on its training and validation split and tested on the test split with one modality
damaged at a time, at the given severities. "seen" are the damages that resemble the noise of the training and the
calibration, "unseen" the other ones. The best intact modality is the better of the other modalities alone, trained
separately (runs named after the modalities) or, without such runs, the model with all others masked. The cost is the
median time of a wrapped prediction, relative to the model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import equipoise as eq
from equipoise.data import loader
from equipoise.diagnostics import corruptions
from equipoise.diagnostics.task_scores import task_score
from equipoise.fusion.subset_tokens import keep_modalities
from equipoise.training import recipes
from equipoise.training.run import load_run_dataset
from equipoise.training.run_loading import with_data

SEEN = ("white_noise", "own_noise", "additive", "partial")
"""White noise in various ways: part of the training with corruption and of the calibration."""
LEFT_OUT = ("missing",)
"""Known to the model, not damage that has to be recognized."""


def scores(
    model: Any, reliable: eq.Reliability, batches: list[dict[str, Any]], alone: bool = False
) -> dict[str, float]:
    """Score of the model and of the wrapper, from the same encoder outputs; also of each modality alone."""
    found: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        tokens = model.encode(batch) if reliable.distance != "input" else reliable.encode(batch)
        found.setdefault("plain", []).append(model.fuse(tokens).logits)
        found.setdefault("reliable", []).append(reliable.fuse(tokens).logits)
        for name in model.names if alone else ():
            found.setdefault(name, []).append(model.fuse(keep_modalities(tokens, [name])).logits)
    target = torch.cat([batch["target"] for batch in batches])
    return {key: float(task_score(torch.cat(parts), target, model.task)) for key, parts in found.items()}


def seconds(call: Any, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(folder: Path, options: argparse.Namespace, unimodal: dict[str, float]) -> dict[str, Any]:
    model: Any = eq.load(folder, data=options.data)
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))["run"]
    recipe = with_data(recipes.load_recipe(folder / "recipe.yaml"), options.data)
    source = load_run_dataset(recipe, content["fold"])
    train, val = (loader(source, split, 256, seed=0, train=False) for split in ("train", "val"))
    reliable = eq.Reliability.fit(model, train, val, distance=options.distance, form=options.form)
    batches = list(loader(source, "test", 256, seed=0, train=False))
    with torch.no_grad():
        clean = scores(model, reliable, batches, alone=True)
        alone = {name: unimodal.get(name, clean[name]) for name in model.names}
        result: dict[str, Any] = {"clean": clean, "alone": alone, "damaged": {}}
        for name in model.names:
            kind = corruptions.infer_kind(batches[0][name])
            for corruption in corruptions.corruption_names(kind):
                for severity in () if corruption in LEFT_OUT else options.severities:
                    damaged = [
                        corruptions.corrupt_batch(
                            batch, name, corruption, severity=severity, seed=number, statistics=source.noise[name]
                        )
                        for number, batch in enumerate(batches)
                    ]
                    intact = max(score for other, score in alone.items() if other != name)
                    result["damaged"][f"{name}/{corruption}/{severity}"] = scores(model, reliable, damaged) | {
                        "intact": intact
                    }
        inputs = batches[0]
        result["cost"] = seconds(lambda: reliable(inputs)) / seconds(lambda: model(inputs))
    return result


def summary(runs: list[dict[str, Any]], which: str) -> list[float]:
    """Means over runs, in percent: clean, seen, unseen, worst, share of damages within two points of the best intact."""
    rows = []
    for run in runs:
        seen = [one[which] for key, one in run["damaged"].items() if key.split("/")[1] in SEEN]
        unseen = [one[which] for key, one in run["damaged"].items() if key.split("/")[1] not in SEEN]
        near = [one[which] >= one["intact"] - 0.02 for one in run["damaged"].values()]
        rows.append(
            [run["clean"][which], statistics.mean(seen), statistics.mean(unseen), min(unseen), statistics.mean(near)]
        )
    return [100 * statistics.mean(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--methods", default="concat_aux+corruption,ensemble+corruption")
    parser.add_argument("--fold", default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--severities", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--distance", default="knn")
    parser.add_argument("--form", default="marginal")
    parser.add_argument("--data", default=None, help="new location of the data set")
    parser.add_argument("--out", type=Path, default=None, help="writes all scores as JSON")
    options = parser.parse_args()
    kept: dict[str, list[dict[str, Any]]] = {}
    for method in options.methods.split(","):
        for seed in range(options.seeds):
            base = options.runs / "runs" / options.fold
            unimodal = {}
            for other in base.iterdir():
                run = other / f"seed{seed}" / "run.json"
                if "+" not in other.name and run.is_file():
                    metrics = json.loads(run.read_text(encoding="utf-8"))["run"]["metrics"]
                    unimodal[other.name] = metrics.get("accuracy", metrics.get("negative_error"))
            kept.setdefault(method, []).append(measure(base / method / f"seed{seed}", options, unimodal))
            print(f"{method}, seed {seed} done", flush=True)
            if options.out:
                options.out.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    print("| method | clean | noise (seen) | unseen damage | worst unseen | near the best intact | cost |")
    print("|---|---|---|---|---|---|---|")
    for method, runs in kept.items():
        for which, suffix in (("plain", ""), ("reliable", "+reliability")):
            cells = [f"{value:.1f}" for value in summary(runs, which)]
            cost = "1" if which == "plain" else f"{statistics.median(run['cost'] for run in runs):.2f}"
            print(f"| {method}{suffix} | {' | '.join(cells)} | {cost} |")


if __name__ == "__main__":
    main()
