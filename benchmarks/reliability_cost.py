"""Time of a prediction with eq.Reliability, relative to that of the model alone, for 2, 3 and 5 modalities.

    python benchmarks/reliability_cost.py    # about one minute on one core

The encoders are those of the recipe av_digits (transformers of two layers of width 64). The model is not trained: time
does not depend on the weights. Each ratio is the median over rounds in which both predictions alternate, in CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import equipoise as eq

LENGTH, FEATURES, CLASSES, TRAIN = 60, 40, 10, 2000
FUSIONS = {"Concat": eq.fusion.Concat, "JointAttention": eq.fusion.JointAttention}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=100_000, help="of the distance to the training data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| modalities | subsets | fusion | marginal | conformal |")
    print("|---|---|---|---|---|")
    for count in (2, 3, 5):
        names = [f"modality{number}" for number in range(count)]
        train = [batch(names, 200, seed) for seed in range(TRAIN // 200)]
        inputs = batch(names, options.batch_size, 100)
        for title, fusion in FUSIONS.items():
            torch.manual_seed(0)
            encoders = {
                name: eq.encoders.SequenceEncoder(FEATURES, max_length=LENGTH, dim=64, depth=2, stride=4)
                for name in names
            }
            model = eq.FusionModel(encoders, fusion(64), CLASSES).eval()
            ratios = {}
            for form in ("marginal", "conformal"):
                reliable = eq.Reliability.fit(
                    model, train, [batch(names, 100, 101)], form=form, prototypes=options.prototypes
                )
                times = [ratio(model, reliable, inputs) for _ in range(options.rounds)]
                ratios[form] = statistics.median(times)
            print(
                f"| {count} | {len(reliable.subsets)} | {title} | {ratios['marginal']:.2f} | "
                f"{ratios['conformal']:.2f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
