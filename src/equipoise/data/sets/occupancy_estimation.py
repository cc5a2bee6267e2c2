"""`occupancy_estimation`: how many people are in a room? Windows of five kinds of sensors (UCI 864)."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError, DataError
from ..counter_rng import CounterRNG
from ..data_root import find_data_dir
from ..dataset import Dataset, Split
from ..feature_scaling import FeatureScaling, valid_statistics
from .published_csv import AGAIN, Table, read_table

SENSORS = {
    "temperature": ("S1_Temp", "S2_Temp", "S3_Temp", "S4_Temp"),
    "light": ("S1_Light", "S2_Light", "S3_Light", "S4_Light"),
    "sound": ("S1_Sound", "S2_Sound", "S3_Sound", "S4_Sound"),
    "co2": ("S5_CO2", "S5_CO2_Slope"),
    "motion": ("S6_PIR", "S7_PIR"),
}
COLUMNS = ("Date", "Time", *[column for group in SENSORS.values() for column in group], "Room_Occupancy_Count")
ROWS = 10_129
DAYS = {
    "train": ("2017-12-22", "2017-12-24", "2017-12-25"),
    "val": ("2017-12-23",),
    "test": ("2017-12-26", "2018-01-10", "2018-01-11"),
}
"""Whole days, so that no window of one split overlaps another split."""
LONGEST_GAP = 120.0
"""Seconds between readings of the same window; readings are 30 s apart, and single ones are missing."""
SOURCE = "It holds est.csv, the table of Room Occupancy Estimation (UCI 864, CC BY 4.0)."


class OccupancyEstimation(Dataset):
    """Room Occupancy Estimation (UCI 864): windows of readings every 30 s; the target is the number of people, 0 to 3.

    Inputs are "temperature" (window, 4), "light" (window, 4), "sound" (window, 4), "co2" (window, 2: concentration and
    slope) and "motion" (window, 2), standardized with the training split. The target is the count at the last reading
    of the window. A reading with an empty field is masked for that modality; times are seconds since the first reading
    of the window. Splits are whole days. See docs/data/occupancy_estimation.md.

    Args:
        root: folder that contains ``occupancy``; searched after the environment's EQUIPOISE_DATA.
        window: readings of a window; 10 are five minutes.
        stride: readings between the ends of successive windows.

    Raises:
        ConfigError: window or stride below 1.
        DataError: the folder or file is missing, truncated or damaged, or a split has no window of this length.
    """

    names = tuple(SENSORS)
    num_outputs = 4

    def __init__(self, root: str | Path | None = None, *, window: int = 10, stride: int = 2) -> None:
        if min(window, stride) < 1:
            raise ConfigError(
                "OccupancyEstimation",
                expected="window >= 1 and stride >= 1",
                got=f"window = {window}, stride = {stride}",
            )
        path = find_data_dir("occupancy", root, SOURCE) / "est.csv"
        table = read_table(path, COLUMNS, rows=ROWS)
        seconds, count = _seconds(table), table.labels("Room_Occupancy_Count", 4)
        readings = {name: table.numbers(columns, missing=True) for name, columns in SENSORS.items()}
        complete = {name: ~values.isnan().any(dim=1) for name, values in readings.items()}
        index = {name: _windows(table, days, seconds, window, stride, name) for name, days in DAYS.items()}
        days = torch.tensor([day in DAYS["train"] for day in table.texts("Date")])
        scaling = {name: FeatureScaling.fit(values[days & complete[name]]) for name, values in readings.items()}
        standardized = {name: scaling[name](values, complete[name]) for name, values in readings.items()}
        self.train, self.val, self.test = (
            Split(
                {name: values[rows] for name, values in standardized.items()},
                count[rows[:, -1]],
                mask={name: valid[rows] for name, valid in complete.items()},
                times={name: (seconds[rows] - seconds[rows[:, :1]]).float() for name in SENSORS},
            )
            for rows in index.values()
        )
        self.noise = {
            name: valid_statistics(values, self.train.mask[name]) for name, values in self.train.inputs.items()
        }

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs


def _seconds(table: Table) -> Float[Tensor, " reading"]:
    """Returns the time of every reading in seconds; readings must be in order."""
    seconds: list[float] = []
    start = None
    for line, (day, time) in enumerate(zip(table.texts("Date"), table.texts("Time"), strict=True)):
        who = f"'{table.path}' line {line + table.first_line}"
        try:
            moment = datetime.strptime(f"{day} {time}", "%Y-%m-%d %H:%M:%S")
        except ValueError as error:
            raise DataError(who, expected="a date and a time", got=repr(f"{day} {time}"[:60]), fix=AGAIN) from error
        start = start or moment
        seconds.append((moment - start).total_seconds())
        if line and seconds[-1] <= seconds[-2]:
            raise DataError(who, expected="a time after that of the line before", got=f"{day} {time}", fix=AGAIN)
    return torch.tensor(seconds, dtype=torch.float64)


def _windows(
    table: Table, days: tuple[str, ...], seconds: Tensor, window: int, stride: int, split: str
) -> Int[Tensor, "sample window"]:
    """Returns the readings of all windows within the days of a split and have no gap."""
    inside: Bool[Tensor, " reading"] = torch.tensor([day in days for day in table.texts("Date")])
    rows = inside.nonzero()[:, 0]
    if len(rows) < window:
        raise DataError(
            f"'{table.path}'", expected=f"at least {window} readings of {', '.join(days)} ({split})", got=f"{len(rows)}"
        )
    candidates = rows.unfold(0, window, stride)
    gap = seconds[candidates].diff(dim=1).amax(dim=1) if window > 1 else torch.zeros(len(candidates))
    usable = candidates[gap <= LONGEST_GAP]
    if not len(usable):
        raise DataError(f"'{table.path}'", expected=f"{split} windows without a gap", got=f"none of {window} readings")
    return usable
