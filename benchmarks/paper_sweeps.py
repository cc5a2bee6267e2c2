"""Tables 5, 6 and 11 and figures 7 to 9 of the RollingQ paper, on other data, next to the published values.

    python benchmarks/paper_sweeps.py table5 --config utd_mhad --seeds 3 --out sweeps       # batch size
    python benchmarks/paper_sweeps.py table6 --config utd_mhad --seeds 3 --out sweeps       # layers of the encoders
    python benchmarks/paper_sweeps.py table11 --config utd_mhad --seeds 3 --out sweeps    # first fused block
    python benchmarks/paper_sweeps.py figures --config utd_mhad --seeds 3 --out sweeps    # gradients and attention

The paper's tables 5 and 11 are on CREMA-D, table 6 is on Kinetics-Sounds. Encoder and fusion have four blocks
together in table 11, as in the paper; the recipe is used unchanged otherwise. ``figures`` measures, after each epoch,
the gradient norm of each encoder and the share of attention on the validation split: of joint attention (figure 7)
and by fusion depth, without (figure 8) and with RollingQ (figure 9). Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from equipoise.diagnostics.encoder_gradients import gradient_norms
from equipoise.diagnostics.prediction_collection import collect_predictions
from equipoise.training import comparison, recipes
from equipoise.training.recipes import Recipe
from equipoise.training.run import execute_run, load_run_dataset, quiet_lightning, single_thread
from equipoise.training.run_spec import RunSpec

BLOCKS = 4


def with_batch_size(recipe: Recipe, value: int) -> Recipe:
    return recipe.with_train(batch_size=value)


def with_layers(recipe: Recipe, value: int) -> Recipe:
    return replace(recipe, encoders={name: {**options, "depth": value} for name, options in recipe.encoders.items()})


def with_fusion_from(recipe: Recipe, block: int) -> Recipe:
    """Blocks before this one belong to the encoders, the others to the fusion."""
    fused = {
        "fusion": "mid",
        "depth": BLOCKS + 1 - block,
        "heads": next(iter(recipe.encoders.values())).get("heads", 1),
    }
    return replace(with_layers(recipe, block - 1), fusions={**recipe.fusions, "fused": fused})


class Sweep(NamedTuple):
    """A table: its rows, how a recipe is changed for each, the fusion, and accuracies (without, with) of the paper."""

    title: str
    change: Callable[[Recipe, int], Recipe]
    base: str
    paper: dict[int, tuple[float, float]]


SWEEPS = {
    "table5": Sweep("batch size", with_batch_size, "joint", {16: (49.1, 50.6), 64: (48.8, 51.9), 256: (47.8, 48.5)}),
    "table6": Sweep("encoder layers", with_layers, "joint", {2: (57.6, 58.5), 4: (67.0, 69.3), 6: (73.6, 74.6)}),
    "table11": Sweep("from block", with_fusion_from, "fused", {2: (42.3, 42.5), 3: (41.1, 42.2), 4: (41.4, 43.7)}),
}


def table(name: str, recipe: Recipe, options: argparse.Namespace) -> None:
    sweep = SWEEPS[name]
    print(f"| {sweep.title} | without | with RollingQ | difference | paper: without | with | difference |")
    print("|---|---|---|---|---|---|---|")
    for value, (before, after) in sweep.paper.items():
        methods = [sweep.base, f"{sweep.base}+rollingq"]
        results = comparison.compare(
            sweep.change(replace(recipe, references={}), value), methods, seeds=options.seeds, folds=recipe.folds[:1],
            out=options.out / f"{options.config}_{name}_{value}", title=options.config, workers=0,
        )  # fmt: skip
        rows = [row for row in results["summary"] if row["metric"] == "accuracy"]
        cells = [f"{100 * row['mean']:.1f}" + (f" ± {100 * row['sd']:.1f}" if row["sd"] else "") for row in rows]
        other = rows[-1]
        p = "" if other["p"] is None else f", p = {other['p']:.3f}"
        cells.append(f"{100 * other['difference']:+.1f} (higher on {other['higher']} of {other['pairs']}{p})")
        print(f"| {value} | {' | '.join(cells)} | {before} | {after} | {after - before:+.1f} |", flush=True)


class Gradients(pl.Callback):
    """Measures gradient norms and shares of attention on validation batches after each epoch."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches
        self.rows: list[dict[str, dict[str, float]]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        model = pl_module.model
        share = collect_predictions(model, self.batches).share
        assert share is not None
        norms = gradient_norms(model, self.batches).parameters
        shares = dict(zip(model.names, share.mean(dim=(0, 1)).tolist(), strict=True))
        self.rows.append({"gradient": dict(norms), "share": shares})


def figures(recipe: Recipe, options: argparse.Namespace) -> None:
    variants = [("7", "joint", recipe)]
    for figure, method in (("8", "fused"), ("9", "fused+rollingq")):
        variants += [(f"{figure}, from block {block}", method, with_fusion_from(recipe, block)) for block in (2, 3, 4)]
    print("| figure | epoch | gradient norm of the encoders | share of attention |")
    print("|---|---|---|---|")
    for title, method, changed in variants:
        runs = []
        for seed in range(options.seeds):
            fold = recipe.folds[0] if recipe.folds else None
            folder = options.out / f"{options.config}_figure{title.replace(', from block ', '_')}" / f"seed{seed}"
            file = folder / "gradients.json"
            if not file.is_file():
                source = load_run_dataset(changed, fold)
                index = torch.arange(min(256, len(source.split("val"))))
                callback = Gradients([source.batch("val", index, seed=0, epoch=0, train=False)])
                with single_thread(), quiet_lightning():
                    execute_run(
                        RunSpec(changed, method, seed, fold), folder,
                        trainer_options={"callbacks": [callback], "accelerator": "cpu"},
                    )  # fmt: skip
                file.write_text(json.dumps(callback.rows), encoding="utf-8")
            runs.append(json.loads(file.read_text(encoding="utf-8")))
        last = len(runs[0]) - 1
        for epoch in dict.fromkeys((0, last // 4, last // 2, last)):
            cells = [
                ", ".join(
                    f"{name} {scale * statistics.mean(run[epoch][kind][name] for run in runs):.{digits}f}"
                    for name in runs[0][epoch][kind]
                )
                for kind, scale, digits in (("gradient", 1, 4), ("share", 100, 0))
            ]
            print(f"| {title} | {epoch + 1} | {' | '.join(cells)} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SWEEPS, "figures"])
    parser.add_argument("--config", default="utd_mhad")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=None, help="in place of those of the recipe")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    recipe = recipes.load_recipe(options.config)
    if options.epochs is not None:
        recipe = recipe.with_train(epochs=options.epochs)
    if options.what == "figures":
        figures(recipe, options)
    else:
        table(options.what, recipe, options)


if __name__ == "__main__":
    main()
