"""`occupancy_detection`: is an office occupied? Temperature, humidity, light and CO2 of each minute (UCI 357)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import unknown_name
from ..counter_rng import CounterRNG
from ..data_root import find_data_dir
from ..dataset import Dataset, Split
from ..feature_scaling import FeatureScaling, valid_statistics
from .published_csv import read_table

SENSORS = {"temperature": "Temperature", "humidity": "Humidity", "light": "Light", "co2": "CO2"}
COLUMNS = ("date", *SENSORS.values(), "HumidityRatio", "Occupancy")
ROWS = {"datatraining": 8143, "datatest": 2665, "datatest2": 9752}
FOLDS = {"1": "datatest", "2": "datatest2"}
"""Test sets of the publication: 1 with the door mostly closed, 2 with the door mostly open."""
VAL_FROM = "2015-02-09"
"""First day of the validation split: the last two days of datatraining.txt."""
SOURCE = "It holds datatraining.txt, datatest.txt and datatest2.txt of Occupancy Detection (UCI 357, CC BY 4.0)."


class OccupancyDetection(Dataset):
    """Occupancy Detection (UCI 357): 20,560 minutes in an office; the target is 1 if it is occupied.

    Inputs are one reading per minute, standardized with the training split: "temperature", "humidity", "light" and
    "co2", each (1,). The test split is a published test set; the validation split is the last two days of the
    published training set. See docs/data/occupancy_detection.md.

    Args:
        root: folder that contains ``occupancy``; searched after the environment's EQUIPOISE_DATA.
        fold: "1" tests on datatest.txt, "2" on datatest2.txt.

    Raises:
        ConfigError: unknown fold.
        DataError: the folder or a file is missing, truncated or damaged.
    """

    names = tuple(SENSORS)
    num_outputs = 2

    def __init__(self, root: str | Path | None = None, *, fold: str = "1") -> None:
        if fold not in FOLDS:
            raise unknown_name("OccupancyDetection", "fold", str(fold), FOLDS)
        folder = find_data_dir("occupancy", root, SOURCE)
        readings, label, late = _read(folder, "datatraining")
        scaling = {name: FeatureScaling.fit(values[~late]) for name, values in readings.items()}
        test, test_label, _ = _read(folder, FOLDS[fold])
        every = torch.ones(len(test_label), dtype=torch.bool)
        self.train, self.val, self.test = (
            Split({name: scaling[name](values[row]) for name, values in inputs.items()}, target[row])
            for inputs, target, row in ((readings, label, ~late), (readings, label, late), (test, test_label, every))
        )
        self.noise = {name: valid_statistics(values) for name, values in self.train.inputs.items()}

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs


def _read(folder: Path, part: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Returns the readings {name: (minute, 1)}, the labels, and which minutes are of the last two training days."""
    table = read_table(folder / f"{part}.txt", COLUMNS, rows=ROWS[part], row_names=True)
    readings = {name: table.numbers([column]) for name, column in SENSORS.items()}
    late = torch.tensor([date >= VAL_FROM for date in table.texts("date")])
    return readings, table.labels("Occupancy", 2), late
