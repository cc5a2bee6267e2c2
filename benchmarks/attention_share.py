"""Cost of the exact attention share, relative to plain fused attention and to materializing the attention matrix.

    python benchmarks/attention_share.py            # lengths 2048 and 4096, about five minutes on two cores
    python benchmarks/attention_share.py --quick    # length 512, seconds

Batch 2, 8 heads of width 64, three modalities of unequal length, float32. The variants alternate within each round, and
the table contains the median over rounds of the ratio to plain attention in the same round, so that other load on the
machine affects all variants. Peak memory is the maximum allocated memory, including inputs and the buffers of the
kernels.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from equipoise.nn.attention import attend
from equipoise.nn.attention.fused_share import _explicit, _two_passes

BATCH, HEADS, DIM, MODALITIES = 2, 8, 64, 3


def layout(length: int) -> torch.Tensor:
    """Returns labels of three blocks whose borders are not aligned with the tiles of the kernels."""
    first, second = length // 2 + 3, length // 3
    return torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([first, second, length - first - second]))


def plain(query, key, value, modality):
    return F.scaled_dot_product_attention(query, key, value), None


def share(query, key, value, modality):
    return attend(query, key, value, modality=modality, num_modalities=MODALITIES)


def two_passes(query, key, value, modality):
    return _two_passes(query, key, value, modality, MODALITIES, None, False, DIM**-0.5, 0.0)


def materialized(query, key, value, modality):
    return _explicit(query, key, value, modality, MODALITIES, None, False, DIM**-0.5, 0.0)


VARIANTS = {f.__name__: f for f in (plain, share, two_passes, materialized)}


def inputs(length: int, backward: bool):
    torch.manual_seed(0)
    heads = [torch.randn(BATCH, HEADS, length, DIM, requires_grad=backward) for _ in range(3)]
    return heads, torch.randn(BATCH, HEADS, length, DIM), layout(length)


def once(variant: str, heads, grad, modality, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        output, _ = VARIANTS[variant](*heads, modality)
        if backward:
            torch.autograd.grad(output, heads, grad)


def seconds(length: int, backward: bool, rounds: int) -> dict[str, list[float]]:
    heads, grad, modality = inputs(length, backward)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:
        once(variant, heads, grad, modality, backward)
    for turn in range(rounds):
        for variant in list(VARIANTS)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            once(variant, heads, grad, modality, backward)
            times[variant].append(time.perf_counter() - start)
    return times


def peak(variant: str, length: int, backward: bool) -> int:
    """Returns the peak number of allocated bytes, from the inputs to the result, as recorded by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        once(variant, *inputs(length, backward), backward)
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def compare(length: int, backward: bool, rounds: int) -> None:
    times = seconds(length, backward, rounds)
    peaks = {variant: peak(variant, length, backward) for variant in VARIANTS}
    print(f"\nlength {length}, {'forward and backward' if backward else 'forward'}, median of {rounds} rounds")
    print(f"{'':14}{'ms':>9}{'/ plain':>9}{'/ matrix':>10}{'peak MB':>9}{'/ plain':>9}")
    for variant in VARIANTS:
        ratios = [
            statistics.median(a / b for a, b in zip(times[variant], times[other], strict=True))
            for other in ("plain", "materialized")
        ]
        print(
            f"{variant:14}{1e3 * statistics.median(times[variant]):9.1f}{ratios[0]:9.3f}{ratios[1]:10.3f}"
            f"{peaks[variant] / 2**20:9.1f}{peaks[variant] / peaks['plain']:9.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="length 512 and few rounds")
    parser.add_argument("--lengths", type=int, nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = options.lengths or ([512] if options.quick else [2048, 4096])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, B {BATCH} H {HEADS} D {DIM}")
    for length in lengths:
        rounds = options.rounds or (5 if options.quick else max(7, 40000 // length))
        for backward in (False, True):
            compare(length, backward, rounds)


if __name__ == "__main__":
    main()
