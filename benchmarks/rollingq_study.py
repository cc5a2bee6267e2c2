"""RollingQ against a control: does it matter where the query is rotated to, and how long does a rotation last?

    python benchmarks/rollingq_study.py run mosi --seeds 5 --out study
    python benchmarks/rollingq_study.py run occupancy_detection --folds 1,2 --seeds 5 --out study
    python benchmarks/rollingq_study.py run av_digits --pretrained MODELS/whisper-tiny.en MODELS/dinov2-small \
        --sgd 0.001 --epochs 30 --seeds 3 --name pretrained --out study
    python benchmarks/rollingq_study.py table study

Joint attention of a packaged recipe is trained with its RollingQ, with a rotation by the same angle in a random
direction, and without a rotation; each with the recipe's optimizer and with SGD (momentum 0.9, learning rate
``--sgd``). With ``--turns 3`` the query is rotated up to three times.

Accuracy and r (attention against replacement by noise; own: noise with the level of each sample) are compared with
joint attention without a rotation, paired on seeds and folds, by a two-sided t-test. With ``--pretrained``, inputs are
token features of frozen pretrained encoders, see ``pretrained_digits.py``. The attention imbalance (AIR) of
the most attended modality is measured on one fixed validation batch before and after each optimizer step of the epoch
that follows the first rotation. The effect of the rotation at step k is the difference from the run without it, which
sees the same batches.

Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from pretrained_digits import pretrained_digits

import equipoise as eq
from equipoise.diagnostics.prediction_collection import collect_predictions
from equipoise.results import result_rows
from equipoise.results.significance import SURE
from equipoise.training import comparison, recipes
from equipoise.training.run import execute_run, load_run_dataset, quiet_lightning, single_thread

STEPS = 200
"""Steps of the traced epoch that are measured at most."""


class Trace(pl.Callback):
    """Measures the AIR of the most attended modality on fixed samples, step by step, in one epoch."""

    def __init__(self, batch: dict[str, Any], epoch: int) -> None:
        self.batch, self.epoch = batch, epoch
        self.cosines: list[list[float]] = []

    def _measure(self, model: Any) -> None:
        found = collect_predictions(model, [self.batch]).cosine
        assert found is not None
        self.cosines.append(found.nanmean(dim=(0, 1)).tolist())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx < STEPS:
            self._measure(pl_module.model)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # The last batch of an epoch: its state is before the next rotation.
        last = batch_idx + 1 == trainer.num_training_batches
        if last and trainer.current_epoch in (self.epoch - 1, self.epoch):
            self._measure(pl_module.model)


def study_recipe(name: str, options: argparse.Namespace) -> recipes.Recipe:
    """The packaged recipe with a variant under SGD and a random rotation."""
    recipe, turns, sgd = recipes.load_recipe(name), options.turns, options.sgd
    if options.pretrained:
        encoder = {"name": "SequenceEncoder", "dim": 64, "depth": 1, "heads": 4}
        recipe = replace(recipe, encoders=dict.fromkeys(recipe.encoders, encoder), data={"name": "pretrained_digits"})
    if options.epochs:
        recipe = replace(recipe, train=replace(recipe.train, epochs=options.epochs))
    rolling = {**recipe.balancers["rollingq"], "max_rotations": turns, "beta": 0.0}
    control = {**rolling, "balancer": "rollingq", "rotation": "random"}
    return replace(
        recipe,
        fusions={**recipe.fusions, "sgd": {"fusion": "joint", "train": {"optimizer": "sgd", "learning_rate": sgd}}},
        balancers={**recipe.balancers, "rollingq": rolling, "random": control},
        references={f"{base}+{part}": base for base in ("joint", "sgd") for part in ("rollingq", "random")},
        reference=None,
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    recipe = study_recipe(options.set, options)
    names = [f"{base}{part}" for base in options.bases for part in ("", "+rollingq", "+random")]
    folds = options.folds.split(",") if options.folds else []
    out = options.out / (options.name or (options.set if options.turns == 1 else f"{options.set}_{options.turns}"))
    plan = comparison.plan_runs(recipe, names, options.seeds, folds)
    sources: dict[str | None, Any] = {}
    runs = []
    for job in plan:
        folder = job.folder(out)
        if job.fold not in sources:
            if options.pretrained:
                sources[job.fold] = pretrained_digits(*options.pretrained[:2], fold=job.fold or "A", cache=options.out)
            else:
                sources[job.fold] = load_run_dataset(recipe, job.fold)
        source = sources[job.fold]
        samples = torch.arange(min(256, len(source.split("val"))))
        batch = source.batch("val", samples, seed=0, epoch=0, train=False)
        if not (folder / "trace.json").is_file() and folder.is_dir():
            # Interrupted: a resumed run would lack a part of its trace.
            shutil.rmtree(folder)
        trace = Trace(batch, recipe.balancers["rollingq"].get("warmup_epochs", 0) + 1)
        with single_thread(), quiet_lightning():
            result = execute_run(
                job, folder, trainer_options={"callbacks": [trace], "accelerator": "cpu"}, dataset=source
            )
        runs += [] if result is None else [result]
        if not (folder / "trace.json").is_file():
            (folder / "trace.json").write_text(json.dumps(trace.cosines), encoding="utf-8")
            print(f"{options.set} {job.method}, seed {job.seed}, fold {job.fold} done", flush=True)
        content = result_rows.build_results(runs, comparison.run_protocol(recipe, plan, options.set))
        result_rows.write_results(out / "results.json", content)


def effects(folder: Path, method: str, reference: str) -> dict[str, list[float]]:
    """For each run the AIR before the rotation, and its changes by the rotation after some steps."""
    found: dict[str, list[float]] = {name: [] for name in ("before", "0", "10", "20", "end")}
    for path in sorted(folder.glob(f"runs/*/{method}/seed*/trace.json")):
        other = path.parents[2] / reference / path.parent.name / "trace.json"
        turned, plain = (torch.tensor(json.loads(one.read_text())) for one in (path, other))
        most = int(plain[0].argmax())
        air = [part[:, most] - (part.sum(dim=1) - part[:, most]) / (part.shape[1] - 1) for part in (turned, plain)]
        change = air[0] - air[1]
        found["before"].append(float(air[1][0]))
        for name, step in (("0", 1), ("10", 11), ("20", 21), ("end", -1)):
            # Entry 0 is before the rotation, entry 1 directly after it.
            if step < len(change):
                found[name].append(float(change[step]))
    return found


def table(options: argparse.Namespace) -> None:
    print(
        "| set | optimizer | rotation | runs | accuracy | r | r, own | AIR before | after 0 steps | 10 | 20 | epoch |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for folder in sorted(path.parent for path in options.out.glob("*/results.json")):
        summary = eq.results.load_results(folder / "results.json")["summary"]
        cells = {(row["method"], row["metric"]): row for row in summary}
        for base, optimizer in (("joint", "recipe"), ("sgd", "SGD")):
            for part, name in (("rollingq", "anchor"), ("random", "random")):
                method = f"{base}+{part}"
                if (method, "accuracy") not in cells:
                    continue
                columns = [_difference(cells.get((method, m)), s) for m, s in METRICS]
                traced = effects(folder, method, base)
                count = cells[method, "accuracy"]["n"]
                lasting = [statistics.mean(values) if values else float("nan") for values in traced.values()]
                columns += [f"{value:+.2f}" if value == value else "" for value in lasting]
                print(f"| {folder.name} | {optimizer} | {name} | {count} | {' | '.join(columns)} |")
    print(f"\nBold: p < {SURE}.")


METRICS = (("accuracy", 100), ("noise_attention_r", 1), ("noise_attention_r_own", 1))


def _difference(row: Any, scale: int) -> str:
    if row is None or row.get("difference") is None:
        return ""
    text = f"{scale * row['difference']:+.{1 if scale > 1 else 2}f}"
    p = row.get("p")
    return (
        text
        if p is None
        else f"{'**' + text + '**' if p < SURE else text} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="train the methods on a set")
    one.add_argument("set", help="name of a packaged recipe with joint and rollingq")
    one.add_argument("--seeds", type=int, default=5)
    one.add_argument("--folds", default="")
    one.add_argument("--sgd", type=float, default=0.05, help="learning rate of SGD")
    one.add_argument(
        "--bases", type=lambda text: text.split(","), default=["joint", "sgd"],
        help="joint (optimizer of the recipe), sgd, or both",
    )  # fmt: skip
    one.add_argument("--epochs", type=int, help="by default those of the recipe")
    one.add_argument(
        "--pretrained", type=Path, nargs=2, metavar=("WHISPER", "DINOV2"),
        help="av_digits as features of these frozen encoders, folders of transformers",
    )  # fmt: skip
    one.add_argument("--name", help="name of the lines in the table; by default the set")
    one.add_argument("--turns", type=int, default=1, help="largest number of rotations")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(action=run)
    other = commands.add_parser("table", help="the table of all sets in a folder")
    other.add_argument("out", type=Path)
    other.set_defaults(action=table)
    options = parser.parse_args()
    options.action(options)


if __name__ == "__main__":
    main()
