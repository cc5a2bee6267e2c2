"""Throughput of training on a table, relative to the same loop on tensors in memory.

python benchmarks/throughput.py [--samples 2000] [--large 30 --real 4 [--table] [--batches 500]]

For vectors, wav files and images, it generates a table, builds the model of ``equipoise train --data``, and trains one
warm-up epoch and three measured ones with 0, 1 and 2 workers. The baseline iterates over prepared batches in memory.
``--large GB`` instead trains on parquet shards of that size and prints the peak memory of the process: as a stream, or
with ``--table`` as a memory-mapped table, which is first converted to a cache of the same size. ``--real GB`` writes
only so much, and links each shard several times."""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile
import torch
from PIL import Image

from equipoise.data import loader
from equipoise.data.sets.manifest import ManifestDataset
from equipoise.data.sets.stream import StreamDataset
from equipoise.training import method_factory, recipes
from equipoise.training.own_data import default_encoder

BATCH, EPOCHS = 64, 3
SHARD_ROWS = 31_250
"""Rows of a shard of ``--large``, 64 MB."""


def write_table(folder: Path, kind: str, samples: int) -> Path:
    """Writes a table with two modalities of one kind."""
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {"label": np.arange(samples) % 4}
    for name in ("first", "second"):
        if kind == "vector":
            columns |= {f"{name}_{i}": random.standard_normal(samples) for i in range(64)}
            continue
        files = []
        for number in range(samples):
            file = folder / f"{name}{number}.{'wav' if kind == 'audio' else 'png'}"
            if kind == "audio":
                soundfile.write(file, 0.1 * random.standard_normal(8_000), 8_000)
            else:
                Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
            files.append(file.name)
        columns[name] = files
    path = folder / f"{kind}.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def build(source: ManifestDataset) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Builds the model that ``train --data`` would."""
    recipe = recipes.Recipe(
        data={"name": "manifest"}, encoders={name: default_encoder(source, name) for name in source.names}
    )
    torch.manual_seed(0)
    model, _ = method_factory.build_model(method_factory.parse_method("joint", recipe), recipe, source)
    return model, torch.optim.AdamW(model.parameters())


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[dict[str, Any]]) -> int:
    """Trains one epoch; returns the number of samples."""
    count = 0
    for batch in batches:
        loss = model.loss(model(batch).logits, batch["target"])  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count += len(batch["target"])
    return count


def measure(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, epochs: Iterable[Iterable[dict[str, Any]]]
) -> float:
    """Returns samples per second of all epochs but the first."""
    count, start = 0, 0.0
    for number, batches in enumerate(epochs):
        if number == 1:
            start = time.perf_counter()
        samples = train(model, optimizer, batches)
        count += samples if number else 0
    return count / (time.perf_counter() - start)


def compare(folder: Path, kind: str, samples: int) -> None:
    """Prints the throughput of one kind of input."""
    source = ManifestDataset(str(write_table(folder, kind, samples)), target="label")
    model, optimizer = build(source)
    kept = list(loader(source, "train", BATCH, seed=0, train=True))
    bare = measure(model, optimizer, [kept] * (EPOCHS + 1))
    print(f"{kind:8} in memory            {bare:8.0f} samples/s")
    for workers in (0, 1, 2):
        fresh = ManifestDataset(str(folder / f"{kind}.csv"), target="label")
        batches = loader(fresh, "train", BATCH, seed=0, train=True, workers=workers)
        speed = measure(model, optimizer, [batches] * (EPOCHS + 1))
        print(f"{kind:8} table, {workers} workers     {speed:8.0f} samples/s, {speed / bare:.2f} of in memory")


def write_shards(folder: Path, gigabytes: float, real: float) -> int:
    """Writes shards with two vectors of width 256, and links to them; returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    shards = max(1, round(gigabytes * 1e9 / (SHARD_ROWS * 2 * 256 * 4)))
    written = max(1, min(shards, round(real / gigabytes * shards)))
    for number in range(shards):
        path = folder / f"{number:05}.parquet"
        if number >= written:
            os.link(folder / f"{number % written:05}.parquet", path)
            continue
        values = [pa.array(random.standard_normal(SHARD_ROWS * 256, dtype=np.float32)) for _ in range(2)]
        first, second = (pa.FixedSizeListArray.from_arrays(one, 256).cast(pa.list_(pa.float32())) for one in values)
        label = pa.array([f"class{one}" for one in random.integers(4, size=SHARD_ROWS)])
        table = pa.table({"first": first, "second": second, "label": label})
        pq.write_table(table, path, row_group_size=2_000, compression="none", use_dictionary=False)
    return shards * SHARD_ROWS


class PeakMemory:
    """Samples the memory of this process in a thread: anonymous memory, and with mapped pages of files."""

    def __init__(self) -> None:
        self.peak = {"RssAnon": 0, "VmRSS": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            with open("/proc/self/status") as file:
                for line in file:
                    name = line.split(":")[0]
                    if name in self.peak:
                        self.peak[name] = max(self.peak[name], int(line.split()[1]))


def large(folder: Path, options: argparse.Namespace) -> None:
    """Trains on shards of a given size and prints the peak memory."""
    rows = write_shards(folder, options.large, options.real or options.large)
    kind = ManifestDataset if options.table else StreamDataset
    with PeakMemory() as memory:
        start = time.perf_counter()
        source = kind(str(folder), target="label")
        model, optimizer = build(source)
        opened = time.perf_counter() - start
        start = time.perf_counter()
        batches = itertools.islice(loader(source, "train", 256, seed=0, train=True), options.batches)
        speed = train(model, optimizer, batches) / (time.perf_counter() - start)
    anonymous, whole = (memory.peak[name] / 1e6 for name in ("RssAnon", "VmRSS"))
    print(f"{options.large} GB, {rows:,} rows, {'table' if options.table else 'stream'}: opened in {opened:.0f} s, "
          f"{speed:.0f} samples/s, peak {anonymous:.2f} GB anonymous, {whole:.2f} GB with mapped pages")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--large", type=float, default=0.0, metavar="GB")
    parser.add_argument(
        "--real", type=float, default=0.0, metavar="GB", help="size on disk; by default that of --large"
    )
    parser.add_argument("--table", action="store_true", help="read --large as a memory-mapped table")
    parser.add_argument("--batches", type=int, default=None, help="batches of --large to train on; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.large:
            return large(Path(folder), options)
        for kind in ("vector", "audio", "image"):
            compare(Path(folder), kind, options.samples)


if __name__ == "__main__":
    main()
