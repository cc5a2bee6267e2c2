"""Time of a prediction with eq.Reliability, relative to that of the model alone, for 2, 3 and 5 modalities.

    python benchmarks/reliability_cost.py    # about one minute on one core
    EQUIPOISE_DATA=DATA python benchmarks/reliability_cost.py --recipes av_digits utd_mhad mosi occupancy_detection

Without ``--recipes``, the encoders are those of the recipe av_digits (transformers of two layers of width 64), with
random data and 2000 training samples. With it, encoders, training and test data are those of each recipe. The model is
not trained: time does not depend on the weights. Each ratio is the median over rounds in which both predictions
alternate, in CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

import equipoise as eq
from equipoise.training import recipes
from equipoise.training.method_factory import build_model, parse_method
from equipoise.training.run import load_run_dataset

LENGTH, FEATURES, CLASSES, TRAIN = 60, 40, 10, 2000
FUSIONS = (eq.fusion.Concat, eq.fusion.JointAttention)
Batches = Iterable[dict[str, torch.Tensor]]


def batch(names: list[str], size: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(size, LENGTH, FEATURES, generator=generator) for name in names}
    return inputs | {"target": torch.randint(CLASSES, (size,), generator=generator)}


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def ratio(model: eq.FusionModel, reliable: eq.Reliability, inputs: dict[str, torch.Tensor]) -> float:
    """Returns the time of a wrapped prediction relative to that of the model, of one round."""
    with torch.no_grad():
        plain = seconds(lambda: model(inputs))
        return seconds(lambda: reliable(inputs)) / plain


def measure(
    model: eq.FusionModel, train: Batches, val: Batches, inputs: dict[str, torch.Tensor], options: argparse.Namespace
) -> str:
    """Returns the number of subsets and the ratios of both forms, as cells of the table."""
    ratios = []
    for form in ("marginal", "conformal"):
        reliable = eq.Reliability.fit(model.eval(), train, val, form=form, prototypes=options.prototypes)
        ratios.append(statistics.median(ratio(model, reliable, inputs) for _ in range(options.rounds)))
    return f"{len(reliable.subsets)} | {type(model.fusion).__name__} | {ratios[0]:.2f} | {ratios[1]:.2f} |"


def measure_random(options: argparse.Namespace) -> None:
    print("| modalities | subsets | fusion | marginal | conformal |")
    print("|---|---|---|---|---|")
    for count in (2, 3, 5):
        names = [f"modality{number}" for number in range(count)]
        train = [batch(names, 200, seed) for seed in range(TRAIN // 200)]
        inputs = batch(names, options.batch_size, 100)
        for fusion in FUSIONS:
            torch.manual_seed(0)
            encoders = {
                name: eq.encoders.SequenceEncoder(FEATURES, max_length=LENGTH, dim=64, depth=2, stride=4)
                for name in names
            }
            model = eq.FusionModel(encoders, fusion(64), CLASSES)
            print(f"| {count} | {measure(model, train, [batch(names, 100, 101)], inputs, options)}", flush=True)


def measure_recipe(name: str, options: argparse.Namespace) -> None:
    recipe = recipes.load_recipe(name)
    source = load_run_dataset(recipe, recipe.folds[0] if recipe.folds else None)
    train, val = (list(source.batches(split, 256, seed=0, epoch=0, train=False)) for split in ("train", "val"))
    inputs = next(iter(source.batches("test", options.batch_size, seed=0, epoch=0, train=False)))
    for base in ("concat", "joint"):
        torch.manual_seed(0)
        model: Any = build_model(parse_method(base, recipe), recipe, source)[0]
        cells = measure(model, train, val, inputs, options)
        print(f"| {name} | {len(source.names)} | {len(source.split('train'))} | {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=100_000, help="of the distance to the training data")
    parser.add_argument("--recipes", nargs="+", default=(), help="measure with the encoders and data of these recipes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.recipes:
        return measure_random(options)
    print("| recipe | modalities | training samples | subsets | fusion | marginal | conformal |")
    print("|---|---|---|---|---|---|---|")
    for name in options.recipes:
        measure_recipe(name, options)


if __name__ == "__main__":
    main()
