"""Time and memory of a training step with gradient checkpointing, bf16-mixed and torch.compile.

    python benchmarks/training_options.py            # about two minutes on one core
    python benchmarks/training_options.py --device cuda

All variants train copies of one model on the same batches and alternate within one process; ratios are relative to the
plain step in float32. Stored activations are the tensors that autograd keeps for the backward pass, each storage once.
``torch.compile`` uses the default backend; its first step compiles.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import equipoise as eq
from equipoise.nn import enable_gradient_checkpointing

LENGTH, FEATURES, CLASSES = 256, 40, 10


def build(dim: int, depth: int) -> eq.FusionModel:
    """Returns a model with two transformer encoders and joint attention over 512 tokens, without dropout.

    With dropout, ``torch.compile`` draws other random numbers than the plain model.
    """
    torch.manual_seed(0)
    encoders = {
        name: eq.encoders.SequenceEncoder(FEATURES, max_length=LENGTH, dim=dim, depth=depth, heads=dim // 64)
        for name in ("audio", "video")
    }
    return eq.FusionModel(encoders, eq.fusion.JointAttention(dim, heads=dim // 64, dropout=0.0), CLASSES)


def batches(count: int, size: int, device: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [
        {name: torch.randn(size, LENGTH, FEATURES, generator=generator) for name in ("audio", "video")}
        | {"target": torch.randint(CLASSES, (size,), generator=generator)}
        for _ in range(count)
    ]
    return [{name: value.to(device) for name, value in batch.items()} for batch in inputs]


class Variant:
    """A copy of the model with its options; ``step`` trains on one batch and returns the loss."""

    def __init__(
        self, model: eq.FusionModel, *, bf16: bool = False, checkpointing: bool = False, compiled: bool = False,
        rollingq: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.bf16 = copy.deepcopy(model), bf16
        if checkpointing:
            enable_gradient_checkpointing(self.model)
        balancers = [eq.balance.RollingQ(self.model.fusion.attention, beta=0.0)] if rollingq else []
        self.balancing = eq.BalancerList(self.model, balancers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.call: Callable[..., eq.Output] = torch.compile(self.model) if compiled else self.model
        self.device = next(self.model.parameters()).device.type

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.balancing.loss(self.call(batch), batch["target"])

    def step(self, batch: dict[str, Tensor]) -> float:
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.balancing.before_step()
        self.optimizer.step()
        return float(loss.detach())

    def stored(self, batch: dict[str, Tensor]) -> int:
        """Returns the bytes that autograd stores for the backward pass, without parameters."""
        sizes: dict[int, int] = {}
        parameters = {value.untyped_storage().data_ptr() for value in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(batch)
        del loss
        return sum(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options.dim, options.depth).to(options.device)
    data = batches(options.rounds + 1, options.batch_size, options.device)
    variants = {
        "plain, float32": {},
        "gradient checkpointing": {"checkpointing": True},
        "bf16-mixed": {"bf16": True},
        "bf16-mixed, gradient checkpointing": {"bf16": True, "checkpointing": True},
        "RollingQ": {"rollingq": True},
        "torch.compile": {"compiled": True},
        "torch.compile, RollingQ": {"compiled": True, "rollingq": True},
    }
    runs: dict[str, Variant] = {}
    times: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    clock = time.process_time if options.device == "cpu" else time.perf_counter

    def timed_step(name: str, batch: dict[str, Tensor]) -> float:
        start = clock()
        losses.setdefault(name, []).append(runs[name].step(batch))
        if options.device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    for name, given in variants.items():
        torch.manual_seed(0)
        runs[name] = Variant(model, **given)
        first[name], times[name] = timed_step(name, data[0]), []
    for batch in data[1:]:
        for name, values in times.items():
            values.append(timed_step(name, batch))
    plain = statistics.median(times["plain, float32"])
    stored = runs["plain, float32"].stored(data[0])
    print("| step | time, relative to plain | first step, s | stored activations | largest difference of a loss |")
    print("|---|---|---|---|---|")
    for name, variant in runs.items():
        difference = max(abs(a - b) for a, b in zip(losses[name], losses["plain, float32"], strict=True))
        kept = "" if "compile" in name else f"{variant.stored(data[0]) / stored:.2f}"
        print(
            f"| {name} | {statistics.median(times[name]) / plain:.2f} | {first[name]:.1f} | {kept} | {difference:.1e} |"
        )
    print(f"\nplain: {1000 * plain:.0f} ms, {stored / 2**20:.1f} MiB of activations")


if __name__ == "__main__":
    main()
