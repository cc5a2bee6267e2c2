"""mosi: the published files, and errors for damaged ones."""

import re
import shutil

import pytest
import torch

from equipoise.data import load_dataset
from equipoise.data.sets.mosi import FEATURES, ROWS, VAL_VIDEOS
from equipoise.errors import DataError
from helpers.published_data import DATA, requires_data


@pytest.fixture(scope="module")
def published_data():
    return load_dataset("mosi", root=DATA)


@pytest.fixture(scope="module")
def synthetic_folder(tmp_path_factory):
    """A folder with files of the published sizes, constant but for text feature 1, the video."""
    folder = tmp_path_factory.mktemp("data") / "mosi"
    folder.mkdir()
    for split, rows in ROWS.items():
        videos = [row % 62 if split == "train" else 62 + row % 31 for row in range(rows)]
        for name, features in FEATURES.items():
            constant = "0.5," * (features - 1)
            lines = [f"{video if name == 'text' else 0.5},{constant}{row % 2}\n" for row, video in enumerate(videos)]
            (folder / f"{name}_{split}.csv").write_text("".join(lines))
        (folder / f"video_of_{split}.csv").write_text("video\n" + "".join(f"{video}\n" for video in videos))
    return folder


@requires_data("mosi")
def test_published_splits(published_data):
    assert published_data.shapes == {"text": (100,), "audio": (73,), "video": (100,)}
    assert [len(split) for split in (published_data.train, published_data.val, published_data.test)] == [1211, 236, 752]
    assert published_data.train.target.bincount().tolist() == [618, 593]
    assert published_data.test.target.bincount().tolist() == [285, 467]
    for values in published_data.train.inputs.values():
        varies = values.std(dim=0, correction=0) > 0
        torch.testing.assert_close(values.mean(dim=0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values[:, varies].std(dim=0, correction=0), torch.ones(int(varies.sum())))


def test_video_is_in_one_split(synthetic_folder, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    data = load_dataset("mosi", root=synthetic_folder.parent)
    # Text feature 1 is the number of the video.
    videos = {name: set(data.split(name).inputs["text"][:, 0].tolist()) for name in ("train", "val", "test")}
    assert [len(group) for group in videos.values()] == [62 - VAL_VIDEOS, VAL_VIDEOS, 31]
    assert len(set.union(*videos.values())) == 93
    assert len(data.train) + len(data.val) == 1447
    # A constant feature is centered, not divided by 0.
    assert (data.test.inputs["audio"] == 0).all()


def damage(folder, kind):
    if kind == "missing":
        (folder / "audio_train.csv").unlink()
    elif kind == "truncated":
        path = folder / "audio_train.csv"
        path.write_bytes(path.read_bytes()[:100_001])
    elif kind == "rows":
        path = folder / "text_test.csv"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:700]))
    elif kind == "labels":
        path = folder / "video_train.csv"
        path.write_text(path.read_text().replace(",0\n", ",1\n", 1))
    elif kind == "number":
        path = folder / "text_train.csv"
        path.write_text(path.read_text().replace("0.5", "n/a", 1))
    elif kind == "binary":
        (folder / "video_of_test.csv").write_bytes(bytes(range(256)))
    elif kind == "videos":
        path = folder / "video_of_test.csv"
        path.write_text(path.read_text().replace("62", "7", 1))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"audio_train.csv': expected a CSV file, got no such file"),
        ("truncated", r"audio_train.csv' line \d+: expected 74 fields, got \d+"),
        ("rows", r"text_test.csv': expected the 752 rows of the published file, got 700"),
        ("labels", r"video_train.csv' line 1: expected the label of text_train.csv, 0, got 1"),
        ("number", r"text_train.csv' line 1, column 'feature 2': expected a finite number, got 'n/a'"),
        ("binary", r"video_of_test.csv': expected a CSV file in UTF-8"),
        ("videos", r"expected videos that occur in one split only, got video 7 in both"),
    ],
)
def test_damaged_files(synthetic_folder, tmp_path, monkeypatch, kind, message):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    shutil.copytree(synthetic_folder, tmp_path / "mosi")
    damage(tmp_path / "mosi", kind)
    with pytest.raises(DataError, match=message):
        load_dataset("mosi", root=tmp_path)


def test_missing_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    with pytest.raises(DataError, match=rf"mosi: expected a folder .*{re.escape(str(tmp_path))}.*CMU-MOSI"):
        load_dataset("mosi", root=tmp_path)
