"""Cost of balancers: an epoch of training with each, relative to an epoch of the same model without it.

    python benchmarks/balancers.py                    # all, about five minutes on one core
    python benchmarks/balancers.py --quick            # fewer epochs, larger variance
    python benchmarks/balancers.py --only OGM,PMR     # only these

Both variants alternate within one process, step by step, so that other load on the machine affects both. The ratio is
the median of the ratios of consecutive steps, plus the time of review and end_epoch (mean over epochs) relative to an
epoch of that many steps. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from rollingq import Batch, batches, build, interleaved, ratio_of, seconds

import equipoise as eq
from equipoise import balance
from equipoise.errors import ConfigError

TARGET = 1.15
ATTENTION = {"RollingQ": 1, "ProgressiveRollingQ": 2}
"""Balancers of attention -> depth of the joint attention to measure them with; others use Concat."""
EXTRA = {
    "AGM": "fuses every subset of the modalities, without gradient",
    "CML": "fuses the other modalities once without each modality",
    "DataRemixing": "fuses each modality alone, without gradient",
    "DGL": "fuses each modality alone, forward and backward",
    "LFM": "two additional backward passes while its weight is learned",
    "MLA": "processes every batch once per modality",
    "MMPareto": "one backward pass per loss",
    "DiagnoseRelearn": "one pass over the data at each reset",
    "SampleValuation": "fuses every subset of the modalities",
    "UMT": "forward pass of a teacher for each encoder",
}
"""Balancers with additional computation by definition -> description."""


def model_for(name: str, joint: bool) -> eq.FusionModel:
    """Returns the encoders of benchmarks/rollingq.py with a suitable fusion for the balancer, or joint attention."""
    base = build(64, 1)
    heads = "train" if getattr(balance, name).needs_heads else "probe"
    torch.manual_seed(0)
    depth = ATTENTION.get(name, 1 if joint else None)
    fusion = eq.fusion.Concat(64) if depth is None else eq.fusion.JointAttention(64, depth=depth)
    return eq.FusionModel(dict(base.encoders.items()), fusion, 10, unimodal=heads)


def balancer_for(name: str, model: eq.FusionModel, epochs: int) -> eq.balance.Balancer:
    """Returns the balancer with its default options."""
    kind = getattr(balance, name)
    given = {
        "model": model, "fusion": model.fusion, "layer": getattr(model.fusion, "attention", None), "epochs": epochs,
        "teachers": copy.deepcopy(dict(model.encoders.items())),
    }  # fmt: skip
    return kind(**{key: value for key, value in given.items() if key in inspect.signature(kind).parameters})


def training(model: eq.FusionModel, balancing: eq.BalancerList) -> Callable[[Batch], object]:
    """Returns a function that trains on one batch, with ``steps_per_batch`` optimizer steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    balancing.attach_optimizer(optimizer)

    def step(batch: Batch) -> None:
        for _ in range(balancing.steps_per_batch):
            loss = balancing.loss(model(batch), batch["target"])
            optimizer.zero_grad()
            loss.backward()
            balancing.before_step()
            optimizer.step()

    return step


class Repeated:
    """A few batches, served as an epoch of many."""

    def __init__(self, data: list[Batch], steps: int) -> None:
        self.data, self.steps = data, steps

    def __iter__(self) -> Iterator[Batch]:
        return (self.data[step % len(self.data)] for step in range(self.steps))


def epoch_cost(name: str, joint: bool, steps: int, epochs: int, size: int) -> tuple[float, float]:
    """An epoch's time relative to one without; and the part of it that is paid once an epoch.

    Raises:
        ConfigError: a balancer that the fusion does not suit.
    """
    plain, balanced = model_for(name, joint), model_for(name, joint)
    without = training(plain, eq.BalancerList(plain))
    balancing = eq.BalancerList(balanced, [balancer_for(name, balanced, epochs)])
    with_ = training(balanced, balancing)
    data = batches(8, size)
    train, val = Repeated(data, steps), Repeated(data, max(1, steps // 5))
    interleaved(lambda: without(data[0]), lambda: with_(data[0]), 3)
    first: list[float] = []
    second: list[float] = []
    ends: list[float] = []
    for _ in range(epochs):
        plain.train()
        balanced.train()
        for batch in train:
            a, b = interleaved(lambda batch=batch: without(batch), lambda batch=batch: with_(batch), 1)
            first += a
            second += b
        ends.append(seconds(lambda: ending(balancing, train, val)))
    end = statistics.mean(ends) / (statistics.median(first) * steps)
    return ratio_of(first, second) + end, end


def ending(balancing: eq.BalancerList, train: Iterable[Batch], val: Iterable[Batch]) -> None:
    balancing.review(train, val)
    balancing.end_epoch()


def balancers() -> list[str]:
    found = {kind for _, kind in inspect.getmembers(balance, inspect.isclass) if issubclass(kind, eq.balance.Balancer)}
    return sorted(kind.__name__ for kind in found - {eq.balance.Balancer})


def report(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), batch {args.batch}, {args.steps} steps\n")
    print("| balancer | epoch | part that runs once per epoch | additional computation of the method |")
    print("|---|---|---|---|")
    missed = []
    for name in args.only.split(",") if args.only else balancers():
        try:
            ratio, end = epoch_cost(name, args.joint, args.steps, args.epochs, args.batch)
        except ConfigError:
            print(f"| `{name}` | | | not with this fusion |", flush=True)
            continue
        print(f"| `{name}` | {ratio:.2f} | {end:.2f} | {EXTRA.get(name, '')} |", flush=True)
        if ratio > TARGET and name not in EXTRA:
            missed.append(name)
    print(f"\nTarget: {TARGET} for methods without additional computation; missed by {', '.join(missed) or 'none'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and epochs")
    parser.add_argument("--only", default="", help="comma-separated class names; all by default")
    parser.add_argument("--joint", action="store_true", help="joint attention instead of Concat")
    parser.add_argument("--steps", type=int, default=20, help="steps of an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each balancer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.epochs = 10, 2
    torch.set_num_threads(args.threads)
    # The inputs are noise, so RollingQ may have nothing to rotate.
    warnings.filterwarnings("ignore", message="RollingQ skipped")
    report(args)


if __name__ == "__main__":
    main()
