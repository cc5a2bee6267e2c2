"""Every published layout: a miniature raw copy is prepared, verified, resumed, and split by group."""

import csv
import json
import os
import shutil

import numpy as np
import pytest

from equipoise.data.layouts import available_layouts, find_layout, prepare, verify
from equipoise.errors import ConfigError, DataError
from helpers.raw_layouts import LAYOUTS, make_raw, prepare_raw

SAMPLES = {
    "cremad": {"train": 10, "val": 6, "test": 4}, "kinetics_sounds": {"train": 8, "val": 4, "test": 4},
    "mosei": {"train": 12, "val": 4, "test": 6}, "mosi": {"train": 12, "val": 4, "test": 6},
    "av_mnist": {"train": 22, "val": 2, "test": 8}, "ucf101": {"train": 18, "val": 6, "test": 6},
    "hmdb51": {"train": 9, "val": 3, "test": 3},
}  # fmt: skip
SHAPES = {
    "cremad": {"audio": (188, 257), "image": (8, 8, 3)},
    "kinetics_sounds": {"audio": (1024, 128), "image": (3, 8, 8, 3)},
    "mosei": {"text": (4, 6), "audio": (4, 4), "vision": (4, 3)},
    "mosi": {"text": (4, 6), "audio": (5, 4), "vision": (5, 3)},
    "av_mnist": {"image": (28, 28), "audio": (112, 112)},
    "ucf101": {"rgb": (3, 8, 8, 3), "flow": (3, 8, 8, 2)},
    "hmdb51": {"rgb": (3, 8, 8, 3), "flow": (3, 8, 8, 2)},
}


def rows(folder, name="manifest.csv"):
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """name -> (raw folder, prepared folder, result), made once."""
    result = {}

    def get(name):
        if name not in result:
            index = tmp_path_factory.mktemp(name)
            result[name] = (index / "raw", index / "out", prepare_raw(name, index / "raw", index / "out"))
        return result[name]

    return get


def test_all_layouts_have_a_raw_copy():
    assert sorted(LAYOUTS) == sorted(available_layouts())


@pytest.mark.parametrize("name", LAYOUTS)
def test_manifest_and_arrays(prepared, name):
    _, out, result = prepared(name)
    actual = rows(out)
    assert result.report["samples"] == SAMPLES[name]
    assert {split: sum(row["split"] == split for row in actual) for split in SAMPLES[name]} == SAMPLES[name]
    assert len({row["id"] for row in actual}) == len(actual)
    assert result.report["dropped"] == 0
    for column, shape in SHAPES[name].items():
        values = np.load(out / actual[0][column])
        assert values.shape == shape
        assert np.isfinite(values).all()
    assert all((out / row[column]).is_file() for row in actual for column in SHAPES[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_verify_passes_and_raw_files_are_unchanged(prepared, name):
    raw, out, _ = prepared(name)
    checked = verify(out)
    assert checked.complete
    assert (checked.missing, checked.changed, checked.unlisted) == ([], [], [])
    assert checked.files > len(rows(out))
    assert not (out / ".scratch").exists()
    assert sorted(os.listdir(out.parent)) == ["out", raw.name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_second_prepare_is_a_no_op(prepared, name):
    raw, out, _ = prepared(name)
    before = snapshot(out)
    again = prepare_raw(name, raw, out)
    assert again.reused == sum(SAMPLES[name].values())
    assert snapshot(out) == before


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "av_mnist"])
def test_disjoint_groups(prepared, name, tmp_path):
    raw, _, _ = prepared(name)
    result = prepare_raw(name, raw, tmp_path / "disjoint", split="disjoint")
    groups = {}
    for row in rows(tmp_path / "disjoint"):
        groups.setdefault(row["split"], set()).add(row["group"])
    assert set(groups) == {"train", "val", "test"}
    assert not groups["train"] & groups["val"]
    assert not groups["train"] & groups["test"]
    assert not groups["val"] & groups["test"]
    assert result.report["groups"]["shared_by_train_and_test"] == 0


def test_published_cremad_split_shares_actors(tmp_path):
    make_raw("cremad", tmp_path / "raw")
    train, test = tmp_path / "raw" / "train.csv", tmp_path / "raw" / "test.csv"
    lines = (train.read_text("utf-8-sig") + test.read_text("utf-8-sig")).splitlines()
    # One clip of each of four actors is for the test.
    test.write_text("\n".join(lines[0:8:2]))
    train.write_text("\n".join(lines[1:8:2] + lines[8:]))
    result = prepare_raw("cremad", tmp_path / "raw", tmp_path / "out")
    actors = {
        split: {row["group"] for row in rows(tmp_path / "out") if row["split"] == split} for split in ("train", "test")
    }
    assert 1 <= len(actors["train"] & actors["test"]) <= 4
    assert result.report["groups"]["shared_by_train_and_test"] == len(actors["train"] & actors["test"])


def test_interrupted_and_resumed_equals_uninterrupted(prepared, tmp_path):
    raw, out, _ = prepared("kinetics_sounds")

    def stop(done, total):
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_raw("kinetics_sounds", raw, tmp_path / "out", progress=stop)
    with pytest.raises(DataError, match="expected a finished preparation, got an interrupted one"):
        verify(tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    # The last line is cut off, as a killed process leaves it.
    journal.write_text("\n".join(lines[:9]) + "\n" + lines[9][:40])
    again = prepare_raw("kinetics_sounds", raw, tmp_path / "out")
    assert again.reused == 8
    assert snapshot(tmp_path / "out") == snapshot(out)
    assert verify(tmp_path / "out").complete


def test_workers_write_identical_files(prepared, tmp_path):
    raw, out, _ = prepared("av_mnist")
    prepare_raw("av_mnist", raw, tmp_path / "out", workers=2)
    assert snapshot(tmp_path / "out") == snapshot(out)


def test_changed_raw_files_are_converted_again(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    prepare_raw("cremad", raw, out)
    path = sorted((raw / "AudioWAV").glob("*.wav"))[0]
    before = snapshot(out)
    shutil.copy(sorted((raw / "AudioWAV").glob("*.wav"))[1], path)
    os.utime(path, ns=(1, 1))
    again = prepare_raw("cremad", raw, out)
    assert again.reused == 19
    changed = [name for name, content in snapshot(out).items() if before[name] != content]
    assert [name for name in changed if name.endswith(".npy")] == [
        row["audio"] for row in rows(out) if row["id"] == path.stem
    ]


def test_arrays_of_removed_samples_are_deleted(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    prepare_raw("cremad", raw, out)
    path = sorted((raw / "AudioWAV").glob("*.wav"))[0]
    path.unlink()
    again = prepare_raw("cremad", raw, out)
    assert again.report["dropped"] == 1
    assert list(again.report["dropped_samples"]) == [path.stem]
    checked = verify(out)
    assert checked.complete
    assert checked.unlisted == []


def test_referenced_files_are_verified_or_copied(tmp_path):
    raw = make_raw("cremad", tmp_path / "raw")
    prepare_raw("cremad", raw, tmp_path / "refers", audio="wav")
    prepare_raw("cremad", raw, tmp_path / "copies", audio="wav", copy=True)
    first = rows(tmp_path / "refers")[0]
    assert (tmp_path / "refers" / first["audio"]).samefile(raw / "AudioWAV" / f"{first['id']}.wav")
    shutil.rmtree(raw / "AudioWAV")
    assert len(verify(tmp_path / "refers").missing) == 20
    assert verify(tmp_path / "copies").complete


def test_verify_names_missing_changed_and_unlisted_files(prepared, tmp_path):
    _, out, _ = prepared("av_mnist")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    first, second = rows(copy)[:2]
    (copy / first["image"]).unlink()
    with open(copy / second["audio"], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    (copy / "audio" / "more.npy").write_bytes(b"")
    checked = verify(copy, workers=2)
    assert (checked.missing, checked.changed, checked.unlisted) == (
        [first["image"]], [second["audio"]], ["audio/more.npy"]
    )  # fmt: skip
    assert not checked.complete


@pytest.mark.parametrize("name", ["manifest.csv", "checksums.txt", "prepare.json"])
def test_verify_detects_changes_of_its_own_files(prepared, tmp_path, name):
    _, out, _ = prepared("mosei")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    text = (copy / name).read_text()
    (copy / name).write_text(text.replace("video1", "video9") if name != "prepare.json" else text.replace("12", "13"))
    if name == "manifest.csv":
        assert verify(copy).changed == ["manifest.csv"]
    else:
        with pytest.raises(
            DataError, match=f"{name}'.* got (a file|one|content) that (was changed since|does not match its checksum)"
        ):
            verify(copy)


def test_checksums_match_sha256sum(prepared):
    _, out, _ = prepared("hmdb51")
    import hashlib

    for line in (out / "checksums.txt").read_text().splitlines():
        value, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == value


def test_report_is_complete(prepared):
    _, out, _ = prepared("mosi")
    report = json.loads((out / "prepare.json").read_text())
    assert report["complete"] is True
    assert report["choice"]["options"] == {"task": "regression", "split": "published"}
    assert report["columns"] == {"text": "sequence", "audio": "sequence", "vision": "sequence"}
    assert report["published"] == {"train": 1284, "val": 229, "test": 686}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {"audio": "array", "image": "image"}),
        ({"frames": 2}, {"audio": "array", "image": "frames"}),
        ({"audio": "wav"}, {"audio": "audio", "image": "image"}),
    ],
)
def test_kinds_of_columns_follow_the_options(prepared, tmp_path, options, kinds):
    raw, _, _ = prepared("cremad")
    result = prepare_raw("cremad", raw, tmp_path / "out", **options)
    assert result.report["columns"] == kinds
    shape = np.load(tmp_path / "out" / rows(tmp_path / "out")[0]["image"]).shape
    assert shape == ((2, 8, 8, 3) if "frames" in options else (8, 8, 3))


def test_changed_options_require_another_folder(prepared):
    raw, out, _ = prepared("mosei")
    with pytest.raises(ConfigError, match=r"the layout and options that .* was begun with, got other settings: mosei"):
        prepare_raw("mosei", raw, out, task="acc7")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"frame": 3}}, "a known option, got '--frame'. Did you mean '--frames'"),
        ({"options": {"audio": "mfcc"}}, "a known value of --audio, got 'mfcc'"),
        ({"options": {"frames": 0}}, "--frames from 1 to 4096, got 0"),
        ({"split": "random"}, "--split published or disjoint, got random"),
        ({"paths": {"sound": "x"}}, "a known place, got 'sound'"),
        ({"paths": {"audio": "none"}}, "a path that exists, got 'none'"),
        ({"workers": 0}, "--workers from 1 to 256, got 0"),
    ],
)
def test_invalid_options_raise(prepared, tmp_path, options, message):
    raw, _, _ = prepared("cremad")
    with pytest.raises(ConfigError, match=message):
        prepare(find_layout("cremad"), raw, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folder_with_unrelated_files_raises(prepared, tmp_path):
    raw, _, _ = prepared("cremad")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="a folder that is new, empty, or written by equipoise"):
        prepare_raw("cremad", raw, tmp_path)
    with pytest.raises(ConfigError, match="another folder than ROOT"):
        prepare_raw("cremad", raw, raw)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_disjoint_split_without_groups_raises(prepared, tmp_path):
    raw, _, _ = prepared("av_mnist")
    with pytest.raises(ConfigError, match="a data set with actors, speakers or source videos, got 'av_mnist'"):
        prepare_raw("av_mnist", raw, tmp_path / "out", split="disjoint")


def test_paths_outside_the_folder_raise(prepared, tmp_path):
    raw, _, _ = prepared("cremad")
    moved = tmp_path / "raw"
    shutil.copytree(raw, moved)
    (moved / "AudioWAV").rename(tmp_path / "sounds")
    result = prepare_raw("cremad", moved, tmp_path / "out", paths={"audio": str(tmp_path / "sounds")})
    assert result.report["samples"] == SAMPLES["cremad"]


def test_ood_classes_have_a_separate_manifest(prepared, tmp_path):
    raw, _, _ = prepared("hmdb51")
    result = prepare_raw("hmdb51", raw, tmp_path / "out", ood="far")
    # MultiOOD does not count chew among the classes that UCF-101 lacks.
    assert result.report["classes"] == ["brush_hair", "wave"]
    assert {row["label"] for row in rows(tmp_path / "out", "ood.csv")} == {"chew"}
    assert {row["target"] for row in rows(tmp_path / "out")} == {"0", "1"}
    assert verify(tmp_path / "out").complete
