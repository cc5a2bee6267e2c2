"""Layout of AV-MNIST: MultiBench's arrays of images, spectrograms and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from .kinetics_sounds import read_array
from .published_layout import Layout, RawSample, Scan, Settings
from .raw_folder import Place

SIDE = 28
VALIDATION = 12
"""The last twelfth of the training arrays is for validation: 5,000 of 60,000."""


class AVMNIST(Layout):
    """AV-MNIST: handwritten digits with a quarter of their energy, and spectrograms of spoken digits.

    Both are divided by 255. The published arrays may pair images with recordings of other digits: they were appended
    by several processes in the order in which these finished.
    """

    name = "av_mnist"
    title = "AV-MNIST"
    source = "https://github.com/pliang279/MultiBench (avmnist)"
    license = "MNIST: CC BY-SA 3.0; FSDD: CC BY-SA 4.0; ESC-50: CC BY-NC 3.0"
    columns = {"image": "array", "audio": "array"}  # noqa: RUF012
    places = {  # noqa: RUF012
        f"{kind}{split}": Place((f"{folder}{split}_{what}.npy", f"avmnist/{folder}{split}_{what}.npy"), content)
        for kind, folder, what, content in (
            ("image_", "image/", "data", "(sample, 784) or (sample, 28, 28)"),
            ("audio_", "audio/", "data", "(sample, 112, 112)"),
            ("labels_", "", "labels", "(sample,)"),
        )
        for split in ("train", "test")
    }
    published = {"train": 55_000, "val": 5_000, "test": 10_000}  # noqa: RUF012

    def scan(self, settings: Settings) -> Scan:
        samples, dropped = [], {}
        for split in ("train", "test"):
            paths = {kind: settings.raw.require(f"{kind}_{split}") for kind in ("image", "audio", "labels")}
            labels, images = read_array(paths["labels"], 1), _images(paths["image"])
            audio = read_array(paths["audio"], 3)
            for kind, array in (("image", images), ("audio", audio)):
                if len(array) != len(labels):
                    raise DataError(
                        f"array '{paths[kind]}'", expected=f"as many samples as labels = {len(labels)}",
                        got=f"{len(array)}",
                    )  # fmt: skip
            last = len(labels) - len(labels) // VALIDATION if split == "train" else len(labels)
            for row, value in enumerate(labels.tolist()):
                name = f"{split}_{row:05d}"
                if value != int(value) or not 0 <= value <= 9:
                    dropped[name] = f"label of '{name}': expected a digit, got {value}."
                    continue
                files = {kind: [str(path)] for kind, path in paths.items()}
                part = "val" if row >= last else split
                samples.append(RawSample(name, part, int(value), "", str(int(value)), files, {"row": row}))
        return Scan(samples, dropped, classes=[str(digit) for digit in range(10)])

    def convert(self, sample: RawSample, settings: Settings) -> dict[str, Any]:
        row = sample.rows["row"]
        image = np.array(_images(Path(sample.files["image"][0]))[row], np.float32).reshape(SIDE, SIDE)
        audio = np.array(read_array(Path(sample.files["audio"][0]), 3)[row], np.float32)
        return {"image": image / 255, "audio": audio / 255}


def _images(path: Path) -> np.ndarray:
    """Returns (sample, 784) or (sample, 28, 28).

    Raises:
        DataError: as ``read_array``, or images of another size.
    """
    try:
        images = read_array(path, 2)
    except DataError as error:
        if "numbers in 2 dimensions" not in error.expected:
            raise
        images = read_array(path, 3)
    if int(np.prod(images.shape[1:])) != SIDE * SIDE:
        raise DataError(f"array '{path}'", expected=f"images of {SIDE} x {SIDE} pixels", got=f"shape {images.shape}")
    return images
