"""Cost of a MODA layer: aligned keys and modular attention, relative to plain fused attention.

    python benchmarks/moda.py            # length 2048, about two minutes on two cores
    python benchmarks/moda.py --quick    # length 512, seconds

Batch 2, 8 heads of width 64, two modalities of unequal length, float32. "duplex" is `DuplexAligner` with plain
attention, the default of `eq.fusion.MODA` and `eq.hf.apply_moda`. "modular" adds the split into self- and
cross-attention, merged by mass; "gate" merges by a learned gate, "pseudo" adds pseudo-attention; "ragged" has different
labels for each sample, so that tokens are gathered. The variants alternate within each round; the table contains the
median over rounds of the ratio to plain attention in the same round, in CPU time, which depends less on other load than
wall-clock time. Projections, which are the same for all variants, are excluded.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from equipoise.nn.attention.modular import PseudoAttention, modular_attention
from equipoise.nn.duplex import DuplexAligner

BATCH, HEADS, DIM = 2, 8, 64
ALIGNER = DuplexAligner(DIM)
GATE = torch.zeros(HEADS, 1, requires_grad=True)


def plain(query, key, value, blocks, ragged):
    return F.scaled_dot_product_attention(query, key, value)


def duplex(query, key, value, blocks, ragged):
    return F.scaled_dot_product_attention(query, ALIGNER(key, value, modality=blocks).key, value)


def modular(query, key, value, blocks, ragged, **options):
    key = ALIGNER(key, value, modality=blocks).key
    return modular_attention(query, key, value, modality=blocks, **options).output


def gate(query, key, value, blocks, ragged):
    return modular(query, key, value, blocks, ragged, merge="gate", gate=GATE)


def pseudo(query, key, value, blocks, ragged):
    return modular(query, key, value, blocks, ragged, pseudo=PseudoAttention(count="all_masked"))


def ragged(query, key, value, blocks, ragged):
    return modular(query, key, value, ragged, ragged)


def causal(query, key, value, blocks, ragged):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def causal_modular(query, key, value, blocks, ragged):
    key = ALIGNER(key, value, modality=blocks, is_causal=True).key
    return modular_attention(query, key, value, modality=blocks, is_causal=True, pseudo=PseudoAttention()).output


VARIANTS = {f.__name__: f for f in (plain, duplex, modular, gate, pseudo, ragged, causal, causal_modular)}
BASELINE = {"causal": "causal", "causal_modular": "causal"}


def inputs(length: int, backward: bool):
    torch.manual_seed(0)
    heads = [torch.randn(BATCH, HEADS, length, DIM, requires_grad=backward) for _ in range(3)]
    blocks = (torch.arange(length) > length // 3).long()
    rolled = torch.stack([blocks.roll(17 * sample) for sample in range(BATCH)])
    return heads, torch.randn(BATCH, HEADS, length, DIM), blocks, rolled


def once(variant: str, heads, grad, blocks, rolled, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        output = VARIANTS[variant](*heads, blocks, rolled)
        if backward:
            torch.autograd.grad(output, heads, grad)


def compare(length: int, backward: bool, rounds: int) -> None:
    given = inputs(length, backward)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:
        once(variant, *given, backward)
    for turn in range(rounds):
        for variant in list(VARIANTS)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            once(variant, *given, backward)
            times[variant].append(time.process_time() - start)
    print(f"\nlength {length}, {'forward and backward' if backward else 'forward'}, median of {rounds} rounds")
    print(f"{'':16}{'ms':>9}{'/ plain':>9}")
    for variant in VARIANTS:
        other = times[BASELINE.get(variant, "plain")]
        ratio = statistics.median(a / b for a, b in zip(times[variant], other, strict=True))
        print(f"{variant:16}{1e3 * statistics.median(times[variant]):9.1f}{ratio:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="length 512 and few rounds")
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    length = options.length or (512 if options.quick else 2048)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, B {BATCH} H {HEADS} D {DIM}")
    for backward in (False, True):
        compare(length, backward, options.rounds or (5 if options.quick else 15))


if __name__ == "__main__":
    main()
