"""occupancy_estimation: windows of the published table, and errors for damaged files."""

import shutil
from datetime import datetime, timedelta

import pytest
import torch

from equipoise.data import load_dataset
from equipoise.data.sets.occupancy_estimation import COLUMNS, DAYS, LONGEST_GAP, ROWS, SENSORS
from equipoise.errors import ConfigError, DataError
from helpers.published_data import DATA, requires_data

PER_DAY = 1447
"""Readings of each day of the synthetic table."""


@pytest.fixture(scope="module")
def synthetic_folder(tmp_path_factory):
    """A folder with a table of the published size; sensor 1 of the light counts readings."""
    folder = tmp_path_factory.mktemp("data") / "occupancy"
    folder.mkdir()
    days = sorted(day for group in DAYS.values() for day in group)
    lines = [",".join(COLUMNS)]
    for row in range(ROWS):
        day, reading = divmod(row, PER_DAY)
        moment = datetime.fromisoformat(days[day]) + timedelta(seconds=30 * reading)
        fields = [str(row) if column == "S1_Light" else str(row % 5) for column in COLUMNS[2:-1]]
        lines.append(",".join([f"{moment:%Y-%m-%d,%H:%M:%S}", *fields, str(row % 4)]))
    (folder / "est.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def table_copy(synthetic_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    shutil.copytree(synthetic_folder, tmp_path / "occupancy")
    return tmp_path / "occupancy/est.csv"


@requires_data("occupancy")
def test_published_splits():
    data = load_dataset("occupancy_estimation", root=DATA)
    assert data.shapes == {name: (10, len(columns)) for name, columns in SENSORS.items()}
    assert data.train.target.bincount(minlength=4).tolist() == [1696, 98, 126, 175]
    assert data.val.target.bincount(minlength=4).tolist() == [994, 127, 195, 65]
    assert data.test.target.bincount(minlength=4).tolist() == [1403, 0, 46, 96]
    for split in (data.train, data.val, data.test):
        for name in data.names:
            times = split.times[name]
            assert (times[:, 0] == 0).all()
            assert 0 < times.diff(dim=1).min() <= times.diff(dim=1).max() <= LONGEST_GAP
            assert (split.inputs[name][~split.mask[name]] == 0).all()
            assert split.inputs[name].isfinite().all()
    # The table has empty fields, in some windows for every reading of a sensor.
    assert not data.train.mask["sound"].all()
    assert not data.train.mask["temperature"].any(dim=1).all()


def test_windows_do_not_cross_splits(synthetic_folder, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    data = load_dataset("occupancy_estimation", root=synthetic_folder.parent, window=7, stride=3)
    dates = [line.split(",")[0] for line in (synthetic_folder / "est.csv").read_text().splitlines()[1:]]
    train = torch.tensor([float(row) for row in range(ROWS) if dates[row] in DAYS["train"]], dtype=torch.float64)
    seen = {}
    for split, days in DAYS.items():
        light = data.split(split).inputs["light"][..., 0].double()
        rows = (light * train.std(correction=0) + train.mean()).round().long()
        assert (rows.diff(dim=1) == 1).all()
        assert {dates[row] for row in rows.flatten().tolist()} == set(days)
        assert torch.equal(data.split(split).target, rows[:, -1] % 4)
        seen[split] = set(rows.flatten().tolist())
    assert len(set.union(*seen.values())) == sum(map(len, seen.values()))


def test_empty_fields_are_masked(table_copy):
    lines = table_copy.read_text().splitlines()
    fields = lines[1 + 20].split(",")
    fields[COLUMNS.index("S3_Sound")] = ""
    lines[1 + 20] = ",".join(fields)
    table_copy.write_text("\n".join(lines) + "\n")
    data = load_dataset("occupancy_estimation", root=table_copy.parents[1], window=1, stride=1)
    assert (~data.train.mask["sound"]).nonzero().tolist() == [[20, 0]]
    assert (data.train.inputs["sound"][20] == 0).all()
    assert all(data.train.mask[name].all() for name in data.names if name != "sound")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: text.rindex(",", 0, 200_000)], r"est.csv' line \d+: expected 19 fields, got \d+"),
        (
            lambda text: text.replace("2017-12-22,", "22/12/2017,", 1),
            r"est.csv' line 2: expected a date and a time, got",
        ),
        (
            lambda text: text.replace(",00:01:00,", ",00:00:10,", 1),
            "line 4: expected a time after that of the line before",
        ),
        (
            lambda text: text.replace(",0,0\n", ",0,9\n", 1),
            "column 'Room_Occupancy_Count': expected a class from 0 to 3",
        ),
        (lambda text: text.replace("S5_CO2_Slope", "slope"), "expected a header with the columns Date, Time, S1_Temp"),
        (lambda text: text[: text[:-1].rindex("\n") + 1], "expected the 10,129 rows of the published file, got 10,128"),
        (
            lambda text: text.replace("2017-12-23", "2017-12-22T"),
            "line 1449: expected a date and a time, got '2017-12-22T",
        ),
    ],
)
def test_damaged_files(table_copy, damage, message):
    table_copy.write_text(damage(table_copy.read_text()))
    with pytest.raises(DataError, match=message):
        load_dataset("occupancy_estimation", root=table_copy.parents[1])


def test_missing_file_and_options(table_copy):
    with pytest.raises(ConfigError, match=r"OccupancyEstimation: expected window >= 1 and stride >= 1, got window = 0"):
        load_dataset("occupancy_estimation", root=table_copy.parents[1], window=0)
    with pytest.raises(DataError, match=r"est.csv': expected at least 9999 readings of .* \(train\), got \d+"):
        load_dataset("occupancy_estimation", root=table_copy.parents[1], window=9999)
    table_copy.unlink()
    with pytest.raises(DataError, match=r"est.csv': expected a CSV file, got no such file"):
        load_dataset("occupancy_estimation", root=table_copy.parents[1])
