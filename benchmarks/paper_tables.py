"""Tables 2, 3, 8, 9 and 10 of the RollingQ paper, computed from a finished comparison and printed
in Markdown next to the published values.

    python benchmarks/paper_tables.py RUNS                     # tables 2, 3, 8 and 9
    python benchmarks/paper_tables.py RUNS --ood OODRUNS       # and 10

RUNS is the output folder of `equipoise compare --config av_digits --out RUNS` with the methods joint, joint+rollingq,
deep, deep+progressive, audio, image and ensemble+corruption; OODRUNS is that of `--config av_digits_ood`. Unfinished
runs are omitted. The models are loaded and evaluated on the test split; nothing is trained.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from pathlib import Path

import torch
from paper_cells import Figures, Table, markdown

import equipoise as eq
from equipoise import data
from equipoise.diagnostics.corruption_test import corruption_curve
from equipoise.diagnostics.modality_masking import mask_modality
from equipoise.diagnostics.noise_test import noise_response
from equipoise.diagnostics.ood_test import ood
from equipoise.diagnostics.quag_test import quag
from equipoise.errors import ConfigError, DataError
from equipoise.training import recipes
from equipoise.training.run import load_run_dataset

AUDIO, IMAGE = "audio", "image"
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCH = 256


@functools.lru_cache(maxsize=3)
def batches(source: data.Dataset, kind: str | None = None) -> list[dict[str, torch.Tensor]]:
    """Returns the batches of the test split, or of the ``"near"`` or ``"far"`` out-of-distribution samples."""
    shown = source if kind is None else data.ood_split(source, kind)
    return list(data.loader(shown, "test", BATCH, seed=0, train=False, rank=0, world=1))


def correlate_noise(model: eq.FusionModel, source: data.Dataset) -> dict[str, float]:
    with warnings.catch_warnings():
        # The correlation with constant attention is NaN, which is printed as an empty cell.
        warnings.simplefilter("ignore", UserWarning)
        found = noise_response(model, batches(source), modality=AUDIO, noise=source.noise)
    return {"r": found.r, "sure": float(found.p < 0.01)}


def measure_levels(model: eq.FusionModel, source: data.Dataset) -> dict[str, float]:
    _, deviation = source.noise[AUDIO]
    curve = corruption_curve(model, batches(source), modality=AUDIO, levels=LEVELS, std=deviation)
    return {f"{level:.2f}": score for level, score in zip(curve.levels, curve.accuracy, strict=True)}


def measure_masking(model: eq.FusionModel, source: data.Dataset) -> dict[str, float]:
    found = mask_modality(model, batches(source))
    return {"full": found.full, AUDIO: found.without[IMAGE], IMAGE: found.without[AUDIO]}


def average_attention(model: eq.FusionModel, source: data.Dataset) -> dict[str, float]:
    found = quag(model, batches(source), operators=["unimodal", "crossmodal", f"avg-{AUDIO}", f"avg-{IMAGE}"])
    return {"origin": found.origin, **found.scores}


def average_all(model: eq.FusionModel, source: data.Dataset) -> dict[str, float]:
    found = quag(model, batches(source), operators=["all"])
    return {"origin": found.origin, **found.scores}


def detect_unknown(model: eq.FusionModel, source: data.Dataset) -> dict[str, float]:
    figures = {}
    for kind in ("near", "far"):
        found = ood(model, batches(source), batches(source, kind))
        figures |= {"accuracy": found.accuracy, f"fpr95/{kind}": found.fpr95, f"auroc/{kind}": found.auroc}
    return figures


TABLES = (
    Table(
        "2", "Pearson's r between replacing the audio by noise and the attention to the image", "CREMA-D / KS",
        "joint", "joint+rollingq", correlate_noise,
        {"r": "r", "sure": "fraction of seeds with p < 0.01"},
        {"r": ((0.52, 0.44), (0.76, 0.78)), "sure": ((1.0, 1.0), (1.0, 1.0))},
        scale=1,
    ),
    Table(
        "3", "Gaussian noise on the audio: accuracy (drop)", "KS", "joint", "joint+rollingq", measure_levels,
        {f"{level:.2f}": f"level {level:.2f}" for level in LEVELS},
        {
            "0.00": ((67.0,), (69.3,)), "0.25": ((62.7,), (67.2,)), "0.50": ((52.9,), (58.2,)),
            "0.75": ((43.2,), (47.5,)), "1.00": ((34.7,), (40.6,)),
        },
        origin="0.00",
    ),
    Table(
        "8", "Accuracy with one modality masked in the fusion", "KS", "joint", "joint+rollingq", measure_masking,
        {"full": "both", AUDIO: "audio (image masked)", IMAGE: "image (audio masked)"},
        {"full": ((67.0,), (69.3,)), AUDIO: ((46.6,), (47.4,)), IMAGE: ((40.3,), (42.1,))},
        alone={AUDIO: (AUDIO, 53.9), IMAGE: (IMAGE, 57.0)},
    ),
    Table(
        "9", "QUAG on two layers: accuracy (drop)", "KS", "deep", "deep+progressive", average_attention,
        {
            "origin": "unchanged", "unimodal": "unimodal", "crossmodal": "crossmodal", f"avg-{AUDIO}": "audio averaged",
            f"avg-{IMAGE}": "image averaged",
        },
        {
            "origin": ((69.1,), (70.1,)), "unimodal": ((67.8,), (63.8,)), "crossmodal": ((65.5,), (63.8,)),
            f"avg-{AUDIO}": ((64.8,), (62.9,)), f"avg-{IMAGE}": ((65.6,), (62.1,)),
        },
        origin="origin", also=(),
    ),
    Table(
        "9, text", "Attention of one layer averaged within both modalities: accuracy (drop)", "CREMA-D / KS",
        "joint", "joint+rollingq", average_all, {"origin": "unchanged", "all": "both averaged"},
        # For RollingQ, the text only states that the change is less than 1 point.
        {"origin": ((48.8, 67.0), (51.9, 69.3)), "all": ((46.5, 68.2), ())}, origin="origin",
    ),
)  # fmt: skip

OOD_TABLE = Table(
    "10", "Detection of unknown classes by the GEN score; unknown classes are the positives for "
          "FPR95", "HMDB51", "joint", "joint+rollingq",
    detect_unknown,
    {
        "accuracy": "accuracy on the known classes", "fpr95/near": "near: FPR95 (lower is better)",
        "auroc/near": "near: AUROC", "fpr95/far": "far: FPR95 (lower is better)", "auroc/far": "far: AUROC",
    },
    {
        "accuracy": ((51.6, 48.7), (54.0, 51.8)), "fpr95/near": ((77.3,), (74.9,)), "auroc/near": ((64.4,), (68.6,)),
        "fpr95/far": ((77.9,), (76.9,)), "auroc/far": ((70.4,), (73.2,)),
    },
)  # fmt: skip


def fold_of(folder: Path, wanted: str | None) -> str:
    """Returns the given fold, or the only one of the comparison.

    Raises:
        DataError: not the folder of a comparison. ConfigError: an unknown fold, or several folds and none is given.
    """
    folds = sorted(path.name for path in (folder / "runs").glob("*") if path.is_dir())
    if not folds:
        raise DataError(
            "paper_tables", expected="the folder of a comparison, with runs/<fold>/<method>/seed<n>",
            got=f"'{folder}' without runs", fix="Give --out of equipoise compare.",
        )  # fmt: skip
    if wanted in folds or (wanted is None and len(folds) == 1):
        return wanted or folds[0]
    got = f"--fold {wanted}" if wanted else "no --fold"
    raise ConfigError("paper_tables", expected=f"one of the folds {', '.join(folds)}", got=got)


def find_finished(folder: Path, fold: str, method: str, seeds: int | None) -> dict[int, Path]:
    """Returns seed -> folder of the finished runs of a method, limited to the first ``seeds`` seeds if given."""
    found = {
        int(path.parent.name.removeprefix("seed")): path.parent
        for path in (folder / "runs" / fold / method).glob("seed*/run.json")
    }
    return {seed: found[seed] for seed in sorted(found) if seeds is None or seed < seeds}


def measure(table: Table, folder: Path, fold: str, seeds: int | None) -> Figures:
    """Returns the values of the methods of a table, and the accuracy of the unimodal models."""
    figures: Figures = {}
    for method in table.methods:
        for seed, run in find_finished(folder, fold, method, seeds).items():
            print(f"table {table.number}: {method}, seed {seed}", file=sys.stderr, flush=True)
            stored = json.loads((run / "run.json").read_text(encoding="utf-8"))["run"]
            source = load_run_dataset(recipes.load_recipe(run / "recipe.yaml"), stored["fold"])
            for name, value in table.measure(eq.load(run), source).items():
                figures.setdefault(method, {}).setdefault(name, {})[seed] = value
    for modality, _ in table.alone.values():
        for seed, run in find_finished(folder, fold, modality, seeds).items():
            stored = json.loads((run / "run.json").read_text(encoding="utf-8"))["run"]
            figures.setdefault(modality, {}).setdefault("accuracy", {})[seed] = stored["metrics"]["accuracy"]
    return figures


def describe(folder: Path, fold: str) -> str:
    """Returns a description of a comparison: data set, fold and held-out classes."""
    recipe = recipes.load_recipe(next(iter(sorted((folder / "runs" / fold).glob("*/seed*/recipe.yaml")))))
    held = ", ".join(map(str, recipe.data.get("held_out", ())))
    without = f", without the classes {held}" if held else ""
    return recipe.data["name"] + ("" if fold == "all" else f", fold {fold}") + without


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of a comparison")
    parser.add_argument("--ood", type=Path, help="folder of a comparison with held-out classes")
    parser.add_argument("--seeds", type=int, help="number of seeds to use; by default all finished ones")
    parser.add_argument("--fold", help="fold to evaluate if there are several")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("Data and model size differ from the paper: signs of differences are comparable, values are not.")
    print("Mean ± sample standard deviation over seeds; differences on the same seeds; accuracies in %.")
    selected = [(table, args.runs) for table in TABLES] + ([(OOD_TABLE, args.ood)] if args.ood else [])
    for table, folder in selected:
        fold = fold_of(folder, args.fold)
        found = measure(table, folder, fold, args.seeds)
        print(f"\n{markdown(table, found, describe(folder, fold))}", flush=True)


if __name__ == "__main__":
    main()
