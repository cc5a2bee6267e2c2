"""Cost of RollingQ: an epoch of training, one rotation, and inference after merging.

    python benchmarks/rollingq.py            # about five minutes on one core
    python benchmarks/rollingq.py --quick    # about one minute, larger variance

Both variants alternate within one process, step by step. The ratio is the median of the ratios of consecutive steps, so
that other load on the machine affects both; the seconds are medians of each variant.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.geometry import rotation_between, rotation_svd

Batch = dict[str, Tensor]
Step = Callable[[Batch], object]


def build(dim: int, heads: int) -> eq.FusionModel:
    """Returns a model with two encoders of two layers (60 frames of 40 bands, 28 x 28 images) and joint attention."""
    torch.manual_seed(0)
    encoders = {
        "audio": eq.encoders.SequenceEncoder(40, max_length=60, dim=dim, stride=4, depth=2),
        "image": eq.encoders.PatchEncoder(1, (28, 28), patch=4, dim=dim, depth=2),
    }
    return eq.FusionModel(encoders, eq.fusion.JointAttention(dim, heads=heads), 10)


def batches(number: int, size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "audio": torch.randn(size, 60, 40, generator=generator),
            "image": torch.randn(size, 1, 28, 28, generator=generator),
            "target": torch.randint(10, (size,), generator=generator),
        }
        for _ in range(number)
    ]


def training(model: eq.FusionModel) -> Step:
    """Returns a function that runs one optimizer step on a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(batch: Batch) -> None:
        output = model(batch)
        loss = model.loss(output.logits, batch["target"]) + model.unimodal_loss(output, batch["target"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Returns seconds per call of two alternating actions; the order changes in each round."""
    a, b = [], []
    for number in range(rounds):
        for action, times in ((first, a), (second, b)) if number % 2 else ((second, b), (first, a)):
            times.append(seconds(action))
    return a, b


def ratio_of(first: list[float], second: list[float]) -> float:
    """Returns the median of second / first over consecutive calls."""
    return statistics.median(b / a for a, b in zip(first, second, strict=True))


def epoch_cost(dim: int, heads: int, steps: int, epochs: int, size: int) -> tuple[float, float, float, float]:
    """Returns the median seconds of an epoch without and with RollingQ and of ``end_epoch``, and the ratio of
    epochs.
    """
    plain, rolled = build(dim, heads), build(dim, heads)
    balancer = eq.balance.RollingQ(rolled.fusion.attention, rho=1.0, beta=0.0, max_rotations=None)
    one, other = training(plain), training(rolled)
    data = batches(8, size)
    interleaved(lambda: one(data[0]), lambda: other(data[0]), 3)
    without, with_, ends = [], [], []
    for _ in range(epochs):
        turn = iter(range(2 * steps))
        a, b = interleaved(
            lambda t=turn: one(data[next(t) // 2 % 8]), lambda t=turn: other(data[next(t) // 2 % 8]), steps
        )
        without += a
        with_ += b
        ends.append(seconds(balancer.end_epoch))
    end, plain_epoch = statistics.median(ends), statistics.median(without) * steps
    ratio = ratio_of(without, with_) + end / plain_epoch
    return plain_epoch, statistics.median(with_) * steps + end, end, ratio


def rotation_cost(dim: int, repeats: int) -> tuple[float, float]:
    """Returns the median seconds of the minimal rotation and of the rotation by SVD."""
    generator = torch.Generator().manual_seed(2)
    source, target = (torch.randn(dim, generator=generator) for _ in range(2))
    minimal = [seconds(lambda: rotation_between(source, target)) for _ in range(10 * repeats)]
    svd = [seconds(lambda: rotation_svd(source, target)) for _ in range(repeats)]
    return statistics.median(minimal), statistics.median(svd)


def inference_cost(dim: int, heads: int, calls: int, size: int) -> tuple[float, float, float, bool, int, int]:
    """Returns the median seconds of a forward pass without RollingQ and after merging, their ratio, whether the state
    dict keys are equal, and both parameter counts."""
    plain = build(dim, heads)
    merged = copy.deepcopy(plain)
    balancer = eq.balance.RollingQ(merged.fusion.attention, rho=1.0, beta=0.0)
    data = batches(1, size)[0]
    merged(data)
    if not balancer.end_epoch()["rotated"]:
        raise SystemExit("no rotation to merge")
    eq.merge_rotations(merged)
    same = list(plain.state_dict()) == list(merged.state_dict())
    plain.eval()
    merged.eval()
    with torch.inference_mode():
        interleaved(lambda: plain(data), lambda: merged(data), 5)
        a, b = interleaved(lambda: plain(data), lambda: merged(data), calls)
    return statistics.median(a), statistics.median(b), ratio_of(a, b), same, parameters(plain), parameters(merged)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def report(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), batch {args.batch}\n")
    print(f"{'an epoch of ' + str(args.steps) + ' steps':<34}{'without':>12}{'with':>12}{'ratio':>9}   target")
    for dim, heads, share in ((64, 1, 1.0), (64, 4, 1.0), (256, 1, 0.34)):
        without, with_, end, ratio = epoch_cost(dim, heads, args.steps, max(1, round(args.epochs * share)), args.batch)
        name = f"dim {dim}, {heads} head(s), end {end * 1e3:.1f} ms"
        print(f"{name:<34}{without:>10.2f} s{with_:>10.2f} s{ratio:>9.4f}   <= 1.02", flush=True)
    print(f"\n{'one rotation':<34}{'minimal':>12}{'svd':>12}{'ratio':>9}   target")
    for dim in (64, 768):
        fast, slow = rotation_cost(dim, args.repeats)
        target = ">= 50" if dim == 768 else ""
        print(f"{f'd = {dim}':<34}{fast * 1e3:>9.2f} ms{slow * 1e3:>9.2f} ms{slow / fast:>9.1f}   {target}", flush=True)
    print(f"\n{'inference after merging':<34}{'vanilla':>12}{'merged':>12}{'ratio':>9}   target")
    for dim, heads in ((64, 1), (256, 4)):
        a, b, ratio, same, before, after = inference_cost(dim, heads, args.calls, args.batch)
        keys = "same keys" if same else "OTHER KEYS"
        print(f"{f'dim {dim}, {heads} head(s)':<34}{a * 1e3:>9.2f} ms{b * 1e3:>9.2f} ms{ratio:>9.4f}   1.00 +- 0.02")
        print(f"{'  parameters':<34}{before:>12,}{after:>12,}   {keys}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs and calls")
    parser.add_argument("--steps", type=int, default=60, help="steps of an epoch")
    parser.add_argument("--epochs", type=int, default=9, help="epochs of each setting")
    parser.add_argument("--calls", type=int, default=200, help="forward passes of each side")
    parser.add_argument("--repeats", type=int, default=9, help="rotations by SVD")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.calls, args.repeats = 2, 60, 3
    torch.set_num_threads(args.threads)
    report(args)


if __name__ == "__main__":
    main()
