"""Damaged, missing and hostile raw files: what ends the preparation, and what only drops a sample, with its reason."""

import os
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.data.layouts import verify
from equipoise.errors import ConfigError, DataError
from helpers.raw_layouts import LAYOUTS, make_mosei, make_raw, prepare_raw


def edit(path, old, new, **options):
    path.write_text(path.read_text(**options).replace(old, new, 1), **options)


def first(folder, pattern):
    return sorted(folder.glob(pattern))[0]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save(path, change):
    values = np.load(path)
    np.save(path, change(values), allow_pickle=True)


def mosei_change(change):
    def apply(raw):
        path = raw / "mosei_senti_data.pkl"
        content = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(change(content) or content, protocol=4))

    return apply


def drop_key(content):
    del content["valid"]


def other_key(content):
    del content["train"]["vision"]


def objects(content):
    content["train"]["text"] = np.array(content["train"]["text"].tolist(), dtype=object)


def fewer(content):
    content["test"]["audio"] = content["test"]["audio"][:-1]


def runs(content):
    content["train"]["text"] = Evil()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


# name -> (layout, what happens to the raw copy, the message)
ENDS = {
    "missing csv": (
        "cremad",
        lambda raw: (raw / "train.csv").unlink(),
        r"expected train\.csv or .*, got "
        r"none.*--split disjoint",
    ),
    "empty csv": (
        "cremad",
        lambda raw: (raw / "test.csv").write_text(""),
        "one line for each sample, got an empty file",
    ),
    "binary csv": ("cremad", lambda raw: (raw / "test.csv").write_bytes(b"\xff\xfe\x00x,1"), "a text in UTF-8"),
    "short line": (
        "cremad",
        lambda raw: (raw / "test.csv").write_text("1001_DFA_NEU_XX\n"),
        "2 columns.*got 1 in line 1",
    ),
    "duplicate id": (
        "cremad",
        lambda raw: shutil.copy(raw / "train.csv", raw / "test.csv"),
        r"every sample once, in one split, got '\w+' twice: line 1 of train.csv and line 1 of test.csv",
    ),
    "no sounds": (
        "cremad",
        lambda raw: shutil.rmtree(raw / "AudioWAV"),
        r"expected AudioWAV or audio: .*--path "
        r"audio=PATH",
    ),
    "no frames": ("cremad", lambda raw: shutil.rmtree(raw / "Image-01-FPS"), "Image-01-FPS or"),
    "linked csv": (
        "cremad",
        lambda raw: (shutil.move(raw / "train.csv", raw.parent), (raw / "train.csv").symlink_to("../train.csv")),
        "a file in the folder of the data set, got a link that leads out of it",
    ),
    "linked folder": (
        "cremad",
        lambda raw: (shutil.move(raw / "AudioWAV", raw.parent), (raw / "AudioWAV").symlink_to("../AudioWAV")),
        "a link that leads out of it",
    ),
    "wrong label": (
        "kinetics_sounds",
        lambda raw: edit(raw / "my_train.txt", ",10,0", ",10,31"),
        r"my_train.txt', line 1: expected a class from 0 to 30, got '31'",
    ),
    "label that is no number": (
        "kinetics_sounds",
        lambda raw: edit(raw / "my_train.txt", ",10,0", ",10,bowling"),
        "got 'bowling'",
    ),
    "duplicate clip": (
        "kinetics_sounds",
        lambda raw: edit(raw / "my_test.txt", "test0000001", "test0000000"),
        "'test0000000' twice",
    ),
    "truncated pickle": ("mosei", lambda raw: truncate(raw / "mosei_senti_data.pkl"), "got a truncated file"),
    "pickle with a global": ("mosei", mosei_change(runs), r"got one that refers to '(posix|nt)\.mkdir'"),
    "empty pickle": ("mosei", lambda raw: (raw / "mosei_senti_data.pkl").write_bytes(b""), "got an empty file"),
    "no pickle": ("mosei", lambda raw: (raw / "mosei_senti_data.pkl").rename(raw / "x.pkl"), "--path pickle=PATH"),
    "pickle of a list": ("mosei", mosei_change(lambda content: [1]), "the keys train, valid and test, got list"),
    "pickle without valid": (
        "mosei",
        mosei_change(drop_key),
        r"train, valid and test, got the keys \['test', "
        r"'train'\]",
    ),
    "split that is no dict": ("mosei", mosei_change(lambda c: {**c, "test": 3}), "test: expected a dict, got int"),
    "no vision": ("mosei", mosei_change(other_key), "text, audio, vision, id and labels, got none for vision"),
    "wrong dtype": (
        "mosei",
        mosei_change(objects),
        r"train, text: expected numbers \(sample, time, feature\), got "
        r"object",
    ),
    "fewer rows": ("mosei", mosei_change(fewer), "test, audio: expected as many samples as labels = 6, got 5"),
    "array of objects": (
        "av_mnist",
        lambda raw: save(raw / "image" / "train_data.npy", lambda v: v.astype(object)),
        "got Python objects",
    ),
    "truncated array": ("av_mnist", lambda raw: truncate(raw / "audio" / "train_data.npy"), "got a damaged file"),
    "other shape": (
        "av_mnist",
        lambda raw: save(raw / "image" / "test_data.npy", lambda v: v[:, :700]),
        "images of 28 x 28",
    ),
    "audio without time": (
        "av_mnist",
        lambda raw: save(raw / "audio" / "test_data.npy", lambda v: v[0]),
        "numbers in 3 dimensions",
    ),
    "fewer labels": (
        "av_mnist",
        lambda raw: save(raw / "test_labels.npy", lambda v: v[1:]),
        "as many samples as labels = 7",
    ),
    "no array": ("av_mnist", lambda raw: (raw / "train_labels.npy").unlink(), "expected train_labels.npy or"),
    "clip of another name": (
        "ucf101",
        lambda raw: edit(raw / "ucfTrainTestlist" / "testlist01.txt", "v_Archery_g01_c01", "archery1"),
        "line 1: expected a clip as v_Class_g01_c01.avi, got 'Archery/archery1.avi'",
    ),
    "one direction of the flow": ("ucf101", lambda raw: shutil.rmtree(raw / "flow_v"), "flow_v or"),
    "no flow": (
        "ucf101",
        lambda raw: [shutil.rmtree(raw / f"flow_{axis}") for axis in "uv"],
        "expected flow_u or flow_x",
    ),
    "no list": ("ucf101", lambda raw: shutil.rmtree(raw / "ucfTrainTestlist"), "expected trainlist01.txt or"),
    "unknown mark": (
        "hmdb51",
        lambda raw: edit(first(raw, "test*/chew*"), "goo_0.avi 1", "goo_0.avi 7"),
        "line 1: expected 0, 1 or 2, got '7'",
    ),
    "no lists of this fold": (
        "hmdb51",
        lambda raw: [path.rename(path.with_suffix(".old")) for path in raw.glob("test*/*")],
        r"expected lists \{class\}_test_split1.txt, got none",
    ),
}


@pytest.mark.parametrize("fault", ENDS)
def test_fatal_faults_raise(tmp_path, monkeypatch, fault):
    layout, harm, message = ENDS[fault]
    raw = make_raw(layout, tmp_path / "raw")
    harm(raw)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare_raw(layout, raw, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out" / "manifest.csv").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_invalid_roots_raise(tmp_path, layout):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected the published files, got an empty folder. Expected in it: "):
        prepare_raw(layout, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="the folder of the published files, got no folder but a file"):
        prepare_raw(layout, tmp_path / "file", tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="got none"):
        prepare_raw(layout, tmp_path / "other", tmp_path / "out")


def test_missing_root_raises(tmp_path):
    from equipoise.data.layouts import find_layout, prepare

    with pytest.raises(DataError, match="the folder of the published files, got no such folder"):
        prepare(find_layout("mosi"), tmp_path / "none", tmp_path / "out")


def link(path):
    outside = next(parent for parent in path.parents if parent.name == "raw").parent
    shutil.move(path, outside)
    path.symlink_to(outside / path.name)


# name -> (layout, file or folder pattern, what happens to the first one, the reason)
DROPS = {
    "missing wav": ("cremad", "AudioWAV/*.wav", lambda p: p.unlink(), "expected a sound, got no such file"),
    "empty wav": ("cremad", "AudioWAV/*.wav", lambda p: p.write_bytes(b""), "got an empty file"),
    "truncated wav": ("cremad", "AudioWAV/*.wav", truncate, "expected .*, got"),
    "text as wav": ("cremad", "AudioWAV/*.wav", lambda p: p.write_text("no sound"), "expected a sound"),
    "linked wav": ("cremad", "AudioWAV/*.wav", link, "a link that leads out of it"),
    "missing frames": ("cremad", "Image-01-FPS/*", shutil.rmtree, "a folder of images, got no such folder"),
    "folder without frames": (
        "cremad",
        "Image-01-FPS/*",
        lambda p: [file.unlink() for file in p.iterdir()],
        "images, got a folder without any",
    ),
    "truncated frame": ("cremad", "Image-01-FPS/*/00001.jpg", truncate, "expected a complete image"),
    "text as frame": ("cremad", "Image-01-FPS/*/00001.jpg", lambda p: p.write_text("x"), "a file of another kind"),
    "linked frame": ("cremad", "Image-01-FPS/*/00001.jpg", link, "a link that leads out of it"),
    "three frames": (
        "kinetics_sounds",
        "visual/*",
        lambda p: [(p / f"frame_{i:05d}.jpg").unlink() for i in range(4, 10)],
        "4 images or more, got 3",
    ),
    "NaN in a spectrogram": (
        "kinetics_sounds",
        "audio/*.npy",
        lambda p: save(p, lambda v: np.where(v == v[3, 3], np.nan, v)),
        "expected finite values, got NaN",
    ),
    "objects in a spectrogram": (
        "kinetics_sounds",
        "audio/*.npy",
        lambda p: save(p, lambda v: v.astype(object)),
        "got Python objects",
    ),
    "empty spectrogram": ("kinetics_sounds", "audio/*.npy", lambda p: save(p, lambda v: v[:0]), "got an empty array"),
    "short wav": (
        "kinetics_sounds",
        "audio/*.wav",
        lambda p: shutil.copy(p.parent / "s.wave", p),
        "400 samples at 16 kHz or more",
    ),
    "one image of the flow": ("ucf101", "flow_u/*", shutil.rmtree, "a folder of images, got no such folder"),
    "NaN in pixels": (
        "av_mnist",
        "image/train_data.npy",
        lambda p: save(p, lambda v: np.where(v == v[0, 0], np.nan, v)),
        "got NaN",
    ),
    "label that is no digit": (
        "av_mnist",
        "train_labels.npy",
        lambda p: save(p, lambda v: np.where(np.arange(len(v)) == 3, 11, v)),
        "expected a digit, got 11",
    ),
}


@pytest.mark.parametrize("fault", DROPS)
def test_damaged_samples_are_dropped(tmp_path, fault):
    layout, pattern, harm, message = DROPS[fault]
    raw = make_raw(layout, tmp_path / "raw")
    if fault == "short wav":
        import soundfile

        soundfile.write(raw / "audio" / "s.wave", np.ones(10), 16_000, format="WAV")
    harm(first(raw, pattern))
    result = prepare_raw(layout, raw, tmp_path / "out")
    assert result.report["dropped"] == 1
    (reason,) = result.report["dropped_samples"].values()
    assert re.search(message, reason), reason
    assert verify(tmp_path / "out").complete


def test_dropping_every_sample_raises(tmp_path):
    raw = make_raw("cremad", tmp_path / "raw")
    for path in (raw / "AudioWAV").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"at least one usable sample, got none of 20 \(20 x audio .*an empty file"):
        prepare_raw("cremad", raw, tmp_path / "out")


def test_non_finite_mosei_values(tmp_path):
    def broken(values):
        values = values.copy()
        values[0, 2, 1] = -np.inf
        values[1, 2, 1] = np.nan
        values[2] = 0
        return values

    make_mosei(tmp_path / "raw", audio=broken)
    result = prepare_raw("mosei", tmp_path / "raw", tmp_path / "out")
    # Minus infinity becomes 0, NaN drops the sample, and zeros everywhere are a missing modality.
    assert result.report["missing"] == {"audio": 1}
    assert list(result.report["dropped_reasons"].items()) == [("audio of ...: expected finite values, got NaN", 1)]
    values = np.load(tmp_path / "out" / next((tmp_path / "out" / "audio").glob("*/video0_0.0_0.npy")))
    assert values[1, 1] == 0


def test_texts_without_words_are_dropped(tmp_path):
    make_mosei(tmp_path / "raw", text=lambda values: np.where(np.arange(len(values))[:, None, None] < 2, 0, values))
    result = prepare_raw("mosei", tmp_path / "raw", tmp_path / "out")
    assert result.report["dropped_reasons"] == {"text of ...: expected words, got zeros everywhere": 2}


def test_repeated_ids_of_mosei(tmp_path):
    make_mosei(tmp_path / "raw", id=lambda ids: np.concatenate([ids[:1], ids[:-1]]))
    result = prepare_raw("mosei", tmp_path / "raw", tmp_path / "out")
    assert result.report["notes"] == ["1 rows repeat an id and were left out."]
    assert result.report["samples"]["train"] == 11


def test_conflicting_emotion_labels(tmp_path):
    raw = make_raw("cremad", tmp_path / "raw")
    edit(raw / "train.csv", "NEU_XX,NEU", "NEU_XX,SAD", encoding="utf-8-sig")
    edit(raw / "train.csv", "1002_DFA_HAP_XX,HAP", "1002-DFA,HAP", encoding="utf-8-sig")
    result = prepare_raw("cremad", raw, tmp_path / "out")
    assert result.report["dropped"] == 2
    assert any("the emotion in the name" in reason for reason in result.report["dropped_reasons"])
    assert any("actor_sentence_EMOTION_level" in reason for reason in result.report["dropped_reasons"])


def test_tensor_files_cannot_execute_code(tmp_path):
    raw = make_raw("cremad", tmp_path / "raw")
    shutil.move(raw / "AudioWAV", raw / "audio")
    paths = sorted((raw / "audio").glob("*.wav"))
    for path in paths:
        path.unlink()
        torch.save(torch.ones(5, 3), path.with_suffix(".pt"))
    torch.save({"a": Evil()}, paths[0].with_suffix(".pt"))
    torch.save(torch.ones(5, 3, dtype=torch.long), paths[1].with_suffix(".pt"))
    truncate(paths[2].with_suffix(".pt"))
    result = prepare_raw("cremad", raw, tmp_path / "out")
    assert result.report["dropped"] == 3
    assert sorted(result.report["dropped_reasons"].values()) == [1, 2]
    assert not os.path.exists("ran")


@pytest.mark.parametrize(("layout", "folder", "video"), [
    ("cremad", "Image-01-FPS", "VideoFlash/1001_DFA_NEU_XX.flv"),
    ("ucf101", "rgb", "UCF-101/Archery/v_Archery_g01_c01.avi"),
    ("hmdb51", "rgb", "video/chew/Film0_chew_u_nm_np1_ba_goo_0.avi"),
])  # fmt: skip
def test_missing_torchcodec_is_reported(tmp_path, monkeypatch, layout, folder, video):
    raw = make_raw(layout, tmp_path / "raw")
    shutil.rmtree(raw / folder)
    (raw / video).parent.mkdir(parents=True)
    (raw / video).write_bytes(b"RIFF")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(
        ConfigError, match=r"torchcodec and FFmpeg, which decode videos, got none installed. Install .* extract"
    ):
        prepare_raw(layout, raw, tmp_path / "out")


def test_symlinks_in_the_output_folder_raise(tmp_path):
    raw = make_raw("mosi", tmp_path / "raw")
    prepare_raw("mosi", raw, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "text")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "text").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no links to the outside in"):
        prepare_raw("mosi", raw, tmp_path / "out")
    assert os.listdir(tmp_path / "elsewhere") == []


def test_ids_with_separators_cannot_leave_the_folder(tmp_path):
    ids = lambda values: np.array([[f"../../v{i}", "0", "1"] for i in range(len(values))])  # noqa: E731
    make_mosei(tmp_path / "raw", id=ids)
    prepare_raw("mosei", tmp_path / "raw", tmp_path / "deep" / "out")
    assert sorted(os.listdir(tmp_path)) == ["deep", "raw"]
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert verify(tmp_path / "deep" / "out").complete


@pytest.mark.parametrize("harm", [
    lambda out: (out / "prepare.json").unlink(), lambda out: (out / "prepare.json").write_text("{"),
    lambda out: (out / "checksums.txt").unlink(), lambda out: (out / "prepare.json").write_text("[]"),
])  # fmt: skip
def test_verify_of_damaged_folders(tmp_path, harm):
    prepare_raw("mosi", tmp_path / "raw", tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(DataError, match=r"expected (a folder of data prepare|JSON|the checksums|the report)"):
        verify(tmp_path / "out")


def test_verify_of_other_folders(tmp_path):
    with pytest.raises(DataError, match=r"a folder of data prepare, with prepare.json, got no such folder"):
        verify(tmp_path / "none")
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a folder of data prepare, with prepare.json, got none"):
        verify(tmp_path)
