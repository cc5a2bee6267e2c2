"""Throughput of training on a table, relative to the same loop on tensors in memory.

python benchmarks/throughput.py [--samples 2000] [--large 4]

For vectors, wav files and images, it generates a table, builds the model of ``equipoise train --data``, and trains one
warm-up epoch and three measured ones with 0, 1 and 2 workers. The baseline iterates over prepared batches in memory.
``--large GB`` also trains one epoch on a generated table of that size on disk and prints the peak memory of the
process.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
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
from equipoise.training import method_factory, recipes
from equipoise.training.own_data import default_encoder

BATCH, EPOCHS = 64, 3


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


def large(folder: Path, gigabytes: float) -> None:
    """Trains on a table of this size on disk and prints the peak memory."""
    import datasets

    width, rows = 512, int(gigabytes * 1e9 / 512 / 4)

    def generate():
        random = np.random.default_rng(0)
        for number in range(rows):
            vector = random.standard_normal(width, dtype=np.float32)
            yield {"first": vector[:256], "second": vector[256:], "label": number % 4}

    features = datasets.Features(
        first=datasets.List(datasets.Value("float32")), second=datasets.List(datasets.Value("float32")),
        label=datasets.ClassLabel(names=list("abcd")),
    )  # fmt: skip
    datasets.Dataset.from_generator(generate, features=features, cache_dir=str(folder / "cache")).save_to_disk(
        str(folder / "large")
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = ManifestDataset(str(folder / "large"), target="label")
    model, optimizer = build(source)
    start = time.perf_counter()
    count = train(model, optimizer, loader(source, "train", 256, seed=0, train=True))
    with open("/proc/self/status") as file:
        anonymous = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
    print(f"{gigabytes} GB, {rows:,} rows: {count / (time.perf_counter() - start):.0f} samples/s, anonymous memory "
          f"{anonymous / 1e6:.2f} GB, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB "
          f"({before / 1e6:.2f} GB before), of which mapped pages of the file can be dropped at any time")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--large", type=float, default=0.0, metavar="GB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("vector", "audio", "image"):
            compare(Path(folder), kind, options.samples)
        if options.large:
            large(Path(folder), options.large)


if __name__ == "__main__":
    main()
