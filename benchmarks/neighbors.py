"""Time and memory of the distance of eq.Reliability: all training samples, or a random subset as prototypes.

    python benchmarks/neighbors.py --samples 1000000

Features have a low-dimensional structure (clusters on a random 16-dimensional subspace, with noise). "agreement" is the
rank correlation of the distances of new samples, of which a half are damaged by an offset, with those to all training
samples; "AUROC" is that of the offset samples."""

from __future__ import annotations

import argparse
import resource
import time

import torch

from equipoise.diagnostics import auroc
from equipoise.reliability.training_distance import TrainingDistance, TrainingFeatures


def make_features(count: int, width: int, random: torch.Generator, basis: torch.Tensor) -> torch.Tensor:
    centers = 3 * torch.randn(100, len(basis), generator=torch.Generator().manual_seed(1))
    chosen = torch.randint(100, (count,), generator=random)
    inner = centers[chosen] + torch.randn(count, len(basis), generator=random)
    return inner @ basis + 0.3 * torch.randn(count, width, generator=random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[0, 100_000, 20_000])
    options = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(16, options.width, generator=random) / 4
    new = make_features(options.queries, options.width, random, basis)
    damaged = torch.arange(options.queries) % 2 == 0
    new[damaged] += 0.5 * torch.randn(int(damaged.sum()), options.width, generator=random)
    found: list[torch.Tensor] = []
    rows = []
    # The smallest first: the peak memory of a process does not shrink.
    for most in sorted(options.prototypes, key=lambda value: value or options.samples):
        parts = TrainingFeatures(torch.Generator().manual_seed(0), most or options.samples)
        stream = torch.Generator().manual_seed(2)
        start = time.process_time()
        for _ in range(0, options.samples, 10_000):
            parts.add(make_features(10_000, options.width, stream, basis))
        distance = TrainingDistance()
        distance.fit(parts, covariance=False, who="neighbors")
        fitted = time.process_time() - start
        start = time.process_time()
        found.append(distance(new).double())
        taken = (time.process_time() - start) / options.queries
        size = distance.references.numel() * distance.references.element_size() / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        area = auroc(found[-1][damaged], found[-1][~damaged])
        cells = [
            f"{options.samples:,}",
            f"{len(distance.references):,}",
            f"{fitted:.0f}",
            f"{size:.0f}",
            f"{peak:.0f}",
            f"{1000 * taken:.2f}",
        ]
        rows.append([*cells, f"{area:.3f}"])
    print(
        "| training samples | kept | fit, s | kept features, MB | peak memory, MB | ms per sample | AUROC | agreement |"
    )
    print("|---|---|---|---|---|---|---|---|")
    ranks = torch.stack([values.argsort().argsort().double() for values in found])
    for cells, agreement in zip(rows, torch.corrcoef(ranks)[-1].tolist(), strict=True):
        print(f"| {' | '.join(cells)} | {agreement:.3f} |")


if __name__ == "__main__":
    main()
