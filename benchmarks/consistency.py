"""Cost of the nuclear norm and its gradient, relative to singular values with autograd.

    python benchmarks/consistency.py            # a minute on two cores; uses a GPU if available

Batches of (8, 192), (4, 384) and (2, 768) supermatrices of row-stochastic maps, float32. The variants alternate within
each round; the ratio is the median over rounds of the time of svd divided by that of the variant. The error is that of
the value, relative to float64 singular values.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from equipoise.consistency import nuclear_norm

SIZES = ((8, 192), (4, 384), (2, 768))
METHODS = ("svd", "gram", "polar")


def once(matrix: torch.Tensor, method: str) -> float:
    leaf = matrix.clone().requires_grad_()
    if matrix.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    nuclear_norm(leaf, method=method).sum().backward()  # type: ignore[arg-type]
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, float32")
    print(f"{'batch, size':14}{'method':8}{'ms':>9}{'svd / it':>10}{'error':>10}")
    for batch, size in SIZES:
        torch.manual_seed(0)
        matrix = torch.randn(batch, size, size, device=options.device).softmax(dim=-1)
        exact = torch.linalg.svdvals(matrix.double()).sum(dim=-1)
        times: dict[str, list[float]] = {method: [] for method in METHODS}
        for turn in range(options.rounds + 1):
            for method in METHODS:
                took = once(matrix, method)
                if turn:
                    times[method].append(took)
        for method in METHODS:
            ratio = statistics.median(a / b for a, b in zip(times["svd"], times[method], strict=True))
            error = float(((nuclear_norm(matrix, method=method) - exact) / exact).abs().max())  # type: ignore[arg-type]
            took = 1e3 * statistics.median(times[method])
            print(f"{batch:4}, {size:<8}{method:8}{took:9.1f}{ratio:10.2f}{error:10.1e}")


if __name__ == "__main__":
    main()
