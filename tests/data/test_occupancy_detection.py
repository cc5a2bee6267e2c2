"""occupancy_detection: the published files, and errors for damaged ones."""

import shutil

import pytest
import torch

from equipoise.data import load_dataset
from equipoise.data.sets.occupancy_detection import ROWS
from equipoise.errors import ConfigError, DataError
from helpers.published_data import DATA, requires_data

HEADER = '"date","Temperature","Humidity","Light","CO2","HumidityRatio","Occupancy"\n'


@pytest.fixture(scope="module")
def synthetic_folder(tmp_path_factory):
    """A folder with files of the published sizes."""
    folder = tmp_path_factory.mktemp("data") / "occupancy"
    folder.mkdir()
    for part, rows in ROWS.items():
        lines = [
            f'"{row}","2015-02-{4 + 6 * row // rows:02d} '
            f'12:00:00",{20 + row % 3},{25 + row % 5},{row % 7},500,0.004,{row % 2}\n'
            for row in range(rows)
        ]
        (folder / f"{part}.txt").write_text(HEADER + "".join(lines))
    return folder


@requires_data("occupancy")
@pytest.mark.parametrize(("fold", "test"), [("1", [1693, 972]), ("2", [7703, 2049])])
def test_published_splits(fold, test):
    data = load_dataset("occupancy_detection", root=DATA, fold=fold)
    assert data.names == ("temperature", "humidity", "light", "co2")
    assert set(data.shapes.values()) == {(1,)}
    assert data.train.target.bincount().tolist() == [4988, 1141]
    assert data.val.target.bincount().tolist() == [1426, 588]
    assert data.test.target.bincount().tolist() == test
    for name, values in data.train.inputs.items():
        assert data.noise[name] == pytest.approx((0, 1), abs=1e-5)
        torch.testing.assert_close(values.std(correction=0), torch.tensor(1.0))


def test_validation_uses_the_last_training_days(synthetic_folder, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    data = load_dataset("occupancy_detection", root=synthetic_folder.parent)
    expected = sum(4 + 6 * row // ROWS["datatraining"] < 9 for row in range(ROWS["datatraining"]))
    assert [len(data.train), len(data.val), len(data.test)] == [expected, ROWS["datatraining"] - expected, 2665]
    # A constant sensor is centered, not divided by 0.
    assert (data.train.inputs["co2"] == 0).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: text[: text.rindex(",", 0, 200_000)],
            r"datatraining.txt' line \d+: expected 7 fields, got [1-6]",
        ),
        (lambda text: text.replace(",25,", ",?,", 1), "column 'Humidity': expected a finite number, got '\\?'"),
        (lambda text: text.replace("Light", "Lux"), "expected a header with the columns date, Temperature"),
        (lambda text: text.replace(",0\n", ",2\n", 1), "column 'Occupancy': expected a class from 0 to 1, got '2'"),
        (lambda text: text[: text.rindex('"8142"')], "expected the 8,143 rows of the published file, got 8,142"),
        (lambda text: "", "expected a header .*got an empty file"),
    ],
)
def test_damaged_files(synthetic_folder, tmp_path, monkeypatch, damage, message):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    shutil.copytree(synthetic_folder, tmp_path / "occupancy")
    path = tmp_path / "occupancy/datatraining.txt"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        load_dataset("occupancy_detection", root=tmp_path)


def test_missing_folder_and_unknown_fold(tmp_path, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    with pytest.raises(DataError, match=r"occupancy: expected a folder .*UCI 357"):
        load_dataset("occupancy_detection", root=tmp_path)
    with pytest.raises(ConfigError, match=r"OccupancyDetection: expected a known fold, got '3'"):
        load_dataset("occupancy_detection", fold="3")
