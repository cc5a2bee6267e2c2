"""Cost of ``eq.watch``, relative to the model without it and to ``output_attentions=True`` with eager attention.

    python benchmarks/watch.py            # layers as in a 28-layer, 28-head model, context 4096; some minutes, 8 GB
    python benchmarks/watch.py --quick    # the same layers at 1/8 of the width and context 512, seconds

The layers have 28 heads of width 128, 4 key heads and an MLP of 18944 (a language model of seven billion parameters),
random weights, float32, batch 1. Half of the context is an image. Only one of the 28 layers is run: all layers cost the
same, so the ratio of times holds for 28 layers, and memory is printed for one and for 28. The variants alternate within
each round; ratios are medians over rounds. Memory is the peak allocated memory without weights and inputs. The memory
of eager attention at the full context is measured at half of it and multiplied by four, like the size of its matrix.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import equipoise as eq

LAYERS, HEADS, KEY_HEADS, NAMES = 28, 28, 4, ("text", "image")


def model(head_dim: int, hidden: int, layers: int) -> transformers.PreTrainedModel:
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=HEADS * head_dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2Model(config).eval()


def labels(length: int) -> torch.Tensor:
    modality = torch.zeros(length, dtype=torch.int64)
    modality[35 : 35 + length // 2] = 1
    return modality


Variant = Callable[[transformers.PreTrainedModel, torch.Tensor], object]


def unwatched(net, ids):
    return net(input_ids=ids, use_cache=False)


def watched(net, ids):
    with eq.watch(net, modality=labels(ids.shape[1]), names=NAMES) as record:
        net(input_ids=ids, use_cache=False)
    return record


def watched_last(net, ids):
    with eq.watch(net, modality=labels(ids.shape[1]), names=NAMES, queries="last") as record:
        net(input_ids=ids, use_cache=False)
    return record


def eager(net, ids):
    with implementation(net, "eager"):
        return net(input_ids=ids, use_cache=False, output_attentions=True)


@contextlib.contextmanager
def implementation(net, name: str) -> Iterator[None]:
    before = net.config._attn_implementation
    net.set_attn_implementation(name)
    try:
        yield
    finally:
        net.set_attn_implementation(before)


VARIANTS: tuple[Variant, ...] = (unwatched, watched, watched_last, eager)


@torch.no_grad()
def seconds(net, ids, variants, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {v.__name__: [] for v in variants}
    for turn in range(rounds + 1):
        for variant in variants[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            variant(net, ids)
            if turn:
                times[variant.__name__].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def peak(net, ids, variant: Variant) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        variant(net, ids)
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def report(net, length: int, rounds: int, *, whole: bool) -> None:
    ids = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(0))
    variants = VARIANTS if whole else VARIANTS[:3]
    times = seconds(net, ids, variants, rounds)
    peaks = {v.__name__: peak(net, ids, v) for v in variants}
    if not whole:
        half = ids[:, : length // 2]
        grown = 4 * (peak(net, half, eager) - peak(net, half, unwatched))
        peaks["eager"] = peaks["unwatched"] + grown
    kept = HEADS * length * length * 4
    print(f"\ncontext {length}, median of {rounds} rounds")
    print(f"{'':14}{'seconds':>9}{'/ unwatched':>13}{'extra MB, 1 layer':>19}{f'extra MB, {LAYERS} layers':>21}")
    for name, most in peaks.items():
        extra = most - peaks["unwatched"]
        # Eager attention stores the matrix of every layer; eq.watch stores a few sums.
        all_layers = extra + (LAYERS - 1) * kept if name == "eager" else extra
        took = statistics.median(times[name]) if name in times else float("nan")
        ratio = (
            statistics.median(a / b for a, b in zip(times[name], times["unwatched"], strict=True))
            if name in times
            else float("nan")
        )
        print(f"{name:14}{took:9.2f}{ratio:13.3f}{extra / 2**20:19.1f}{all_layers / 2**20:21.1f}")
    of_eager = (peaks["watched"] - peaks["unwatched"]) / (peaks["eager"] - peaks["unwatched"] + (LAYERS - 1) * kept)
    print(f"extra memory of eq.watch relative to eager attention, {LAYERS} layers: {100 * of_eager:.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1/8 of the width, context 512")
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    net = model(16, 2368, 1) if options.quick else model(128, 18944, 1)
    length = options.length or (512 if options.quick else 4096)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    report(net, length, options.rounds or 5, whole=options.quick or length <= 2048)


if __name__ == "__main__":
    main()
