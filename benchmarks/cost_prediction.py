"""Predicted cost of three runs, relative to their real cost: ``python benchmarks/cost_prediction.py``.

Each prediction and each run is a process of its own with one thread. A run is repeated to count its FLOPs, since
counting slows it down. The data of mosi and occupancy_detection are read from the folder ``EQUIPOISE_DATA``.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl

from equipoise.diagnostics.flop_count import FlopCount
from equipoise.training import RunSpec, execute_run, predict_cost
from equipoise.training.peak_memory import PeakMemory
from equipoise.training.recipes import load_recipe

RUNS = (
    ("digits", "joint+rollingq", None),
    ("mosi", "concat+mmpareto", None),
    ("occupancy_detection", "ensemble+corruption", "1"),
)
CPU = {"accelerator": "cpu"}


class CountedTraining(pl.Callback):
    """Counts the FLOPs of all training batches."""

    def __init__(self):
        self.flops = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count = FlopCount().__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count.__exit__(None, None, None)
        self.flops += self.count.flops


def measure(kind, name, method, fold):
    """Returns {quantity: value} of a prediction, a run, or a run whose FLOPs are counted."""
    job = RunSpec(load_recipe(name), method, 0, fold)
    if kind == "predicted":
        cost = predict_cost(job, trainer_options=CPU)
        return {
            "parameters": cost.parameters,
            "flops": cost.flops,
            "memory": cost.process_bytes,
            "seconds": cost.seconds,
        }
    memory, counted = PeakMemory(), CountedTraining()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = execute_run(
            job, Path(folder), trainer_options={**CPU, "callbacks": [counted] if kind == "counted" else []}
        )
    seconds = time.perf_counter() - started
    if kind == "counted":
        return {"flops": counted.flops}
    return {"parameters": run["metrics"]["parameters"], "memory": memory.process(), "seconds": seconds}


def in_process(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kind, name, method, fold = sys.argv[1:]
        print(json.dumps(measure(kind, name, method, None if fold == "None" else fold)))
        sys.exit()
    print("| run | parameters | FLOPs | of the real run | peak memory | of the real run | time | of the real run |")
    print("|---|---|---|---|---|---|---|---|")
    for name, method, fold in RUNS:
        predicted = in_process("predicted", name, method, fold)
        real = {**in_process("real", name, method, fold), **in_process("counted", name, method, fold)}
        assert predicted["parameters"] == real["parameters"]
        flops, memory, seconds = (predicted[part] / real[part] for part in ("flops", "memory", "seconds"))
        print(
            f"| {method} on {name} | {real['parameters']:,} | {real['flops'] / 1e9:.1f} G | {flops:.3f} | "
            f"{real['memory'] / 2**20:.0f} MiB | {memory:.3f} | {real['seconds']:.0f} s | {seconds:.2f} |", flush=True,
        )  # fmt: skip
