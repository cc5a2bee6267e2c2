"""Accuracy of trained runs under damage, with and without eq.Reliability, and the cost of a wrapped prediction.

    equipoise compare --config utd_mhad --methods inertial,skeleton,concat_aux+corruption --seeds 3 --out runs
    python benchmarks/reliability.py runs --seeds 3 --out utd_mhad.json
    python benchmarks/reliability_table.py utd_mhad.json

Each run is wrapped by Reliability.fit on its training and validation split and tested on the test split with one
modality damaged at a time. The damage of a test was never used for calibration: the corruptions are divided into
families (FAMILIES), and for each family another wrapper is calibrated with the corruptions of the other families alone.
Clean inputs are predicted by the wrapper that is calibrated with all corruptions. The family "noise" resembles the
damage in training with corruption.

The best intact modality is the better of the other modalities alone, trained separately (runs named after the
modalities). The cost is the median time of a wrapped prediction, relative to that of the model."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import equipoise as eq
from equipoise.diagnostics import corruptions
from equipoise.training import recipes
from equipoise.training.run import load_run_dataset
from equipoise.training.run_loading import with_data

FAMILIES = {
    "loss": ("zeros", "constant", "frozen", "dropped"),
    "gain": ("gain", "attenuation", "clipping"),
    "time": ("blur", "shift", "shuffled"),
    "noise": ("white_noise", "own_noise", "partial", "additive"),
    "drift": ("drift",),
    "swapped": ("swapped",),
}
FAMILY = {name: family for family, names in FAMILIES.items() for name in names}


SETTINGS = ("severities", "distance", "form", "prototypes", "corruptions", "most_val", "most_test")
"""Options that measurements depend on."""


def split_batches(source: Any, split: str, most: int) -> list[dict[str, Any]]:
    """Batches of a split, of evenly spaced samples where it has more than ``most``."""
    count = len(source.split(split))
    index = torch.arange(count) if count <= most else torch.arange(most) * count // most
    return [source.batch(split, part, seed=0, epoch=0, train=False) for part in index.split(256)]


def seconds(call: Any, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def tested_groups(source: Any, most: int) -> list[str] | None:
    """Groups (subjects, speakers) of the samples of ``split_batches(source, "test", most)``."""
    groups = source.test.groups
    return groups if groups is None or len(groups) <= most else [groups[i * len(groups) // most] for i in range(most)]


def correct(logits: list[Any], target: torch.Tensor) -> torch.Tensor:
    return (torch.cat(logits).argmax(dim=1) == target).double()


def measure(folder: Path, options: argparse.Namespace, only: str | None = None) -> dict[str, Any]:
    """Outcomes of a run: clean, and for each damage (of the family ``only``), with and without reliability."""
    model: Any = eq.load(folder, data=options.data)
    if model.task != "classification":
        raise SystemExit("this benchmark needs a classification")
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))["run"]
    source = load_run_dataset(with_data(recipes.load_recipe(folder / "recipe.yaml"), options.data), content["fold"])
    train, val, test = (
        split_batches(source, split, most)
        for split, most in (("train", 10**9), ("val", options.most_val), ("test", options.most_test))
    )
    given: dict[str, Any] = {"distance": options.distance, "form": options.form, "prototypes": options.prototypes}
    if options.corruptions:
        given["corruptions"] = options.corruptions.split(",")
    kinds = {name: corruptions.infer_kind(test[0][name]) for name in model.names}
    tested = {
        c: FAMILY[c] for kind in kinds.values() for c in corruptions.corruption_names(kind)
        if c in FAMILY and only in (None, FAMILY[c])
    }  # fmt: skip
    wrappers: dict[str, Any] = {}
    if not options.corruptions:
        for family in dict.fromkeys(tested.values()):
            others = [c for c in corruptions.corruption_names() if FAMILY.get(c, family) != family]
            wrappers[family] = eq.Reliability.fit(model, train, val, **given, corruptions=others)
    whole = wrappers[only] if only in wrappers else eq.Reliability.fit(model, train, val, **given)
    target = torch.cat([batch["target"] for batch in test])
    encoded = [whole.encode(batch) for batch in test]
    result: dict[str, Any] = {
        "clean": [
            float(correct([part.fuse(tokens).logits for tokens in encoded], target).mean()) for part in (model, whole)
        ],
        "agreement": float(whole.log_agreement.exp()),
        "damaged": {},
    }
    sums = {key: [torch.zeros(len(target)).double(), torch.zeros(len(target)).double()] for key in ("seen", "unseen")}
    counts = dict.fromkeys(sums, 0)
    for name, kind in kinds.items():
        for corruption in corruptions.corruption_names(kind):
            for severity in options.severities if corruption in tested else ():
                found: tuple[list[Any], list[Any]] = ([], [])
                reliable = wrappers.get(FAMILY[corruption], whole)
                for number, (batch, tokens) in enumerate(zip(test, encoded, strict=True)):
                    damaged = corruptions.corrupt_batch(
                        batch, name, corruption, severity=severity, seed=number, statistics=source.noise[name]
                    )
                    # The other modalities are not encoded again.
                    alone = {
                        key: None if key in model.names and key != name else value for key, value in damaged.items()
                    }
                    tokens = {**tokens, name: whole.encode(alone)[name]}
                    found[0].append(model.fuse(tokens).logits)
                    found[1].append(reliable.fuse(tokens).logits)
                outcomes = [correct(part, target) for part in found]
                result["damaged"][f"{name}/{corruption}/{severity}"] = [float(part.mean()) for part in outcomes]
                key = "seen" if FAMILY[corruption] == "noise" else "unseen"
                counts[key] += 1
                for total, part in zip(sums[key], outcomes, strict=True):
                    total += part
    result["samples"] = {
        key: [[round(value, 4) for value in (part / max(1, counts[key])).tolist()] for part in parts]
        for key, parts in sums.items()
    }
    result["counts"] = counts
    result["groups"] = tested_groups(source, options.most_test)
    result["cost"] = seconds(lambda: whole(test[0])) / seconds(lambda: model(test[0])) if options.cost else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--methods", default=None, help="by default all runs of two or more modalities")
    parser.add_argument("--fold", default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--severities", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--distance", default="knn")
    parser.add_argument("--form", default="marginal")
    parser.add_argument("--prototypes", type=int, default=100_000)
    parser.add_argument(
        "--corruptions", default=None, help="calibrates with these alone, in place of the other families"
    )
    parser.add_argument("--most-val", type=int, default=500, help="largest number of validation samples")
    parser.add_argument("--most-test", type=int, default=1000, help="largest number of test samples")
    parser.add_argument("--cost", action="store_true", help="also measures the time of a prediction")
    parser.add_argument("--data", default=None, help="new location of the data set")
    parser.add_argument("--out", type=Path, required=True, help="file of the results; known runs are not repeated")
    options = parser.parse_args()
    base = options.runs / "runs" / options.fold
    settings = {name: getattr(options, name) for name in SETTINGS}
    kept: dict[str, Any] = {
        "set": options.runs.name, "fold": options.fold, "settings": settings, "alone": {}, "runs": {}
    }  # fmt: skip
    if options.out.is_file():
        kept = json.loads(options.out.read_text(encoding="utf-8"))
        if kept.get("settings", settings) != settings:
            raise SystemExit(f"{options.out} was measured with {kept['settings']}; choose another --out")
    names = options.methods.split(",") if options.methods else sorted(path.name for path in base.iterdir())
    for seed in range(options.seeds):
        for path in base.glob(f"*/seed{seed}/run.json"):
            run = json.loads(path.read_text(encoding="utf-8"))["run"]
            if "+" not in run["method"]:
                kept["alone"].setdefault(run["method"], {})[str(seed)] = run["metrics"]["accuracy"]
        for method in names:
            folder = base / method / f"seed{seed}"
            if str(seed) in kept["runs"].get(method, {}) or not (folder / "run.json").is_file():
                continue
            with torch.no_grad():
                if len(getattr(eq.load(folder, data=options.data), "names", ())) > 1:
                    kept["runs"].setdefault(method, {})[str(seed)] = measure(folder, options)
            options.out.write_text(json.dumps(kept), encoding="utf-8")
            print(f"{method}, seed {seed} done", flush=True)
    options.out.write_text(json.dumps(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
