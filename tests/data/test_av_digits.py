"""The av_digits data set: file formats, invalid files, and the splits of the published data."""

import gzip
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from equipoise.data import load_dataset
from equipoise.data.sets.av_digits import FLOOR, FOLDS, SPEAKERS, AVDigits
from equipoise.data.sets.idx_files import read_idx
from equipoise.data.sets.spoken_digits_files import read_recordings, read_wav
from equipoise.errors import ConfigError, DataError
from helpers.tolerance import TOL

DATA = os.environ.get("EQUIPOISE_DATA", "")
published = pytest.mark.skipif(
    not (Path(DATA) / "fsdd/recordings").is_dir() or not (Path(DATA) / "mnist").is_dir() or not DATA,
    reason="EQUIPOISE_DATA does not name a folder with fsdd/recordings and mnist",
)


def write_wav(path, samples=800, rate=8000, channels=1):
    values = 0.1 * np.random.default_rng(0).standard_normal((samples, channels))
    soundfile.write(path, values, rate, subtype="PCM_16")
    return path


def write_idx(path, shape, magic=b"\0\0\x08", cut=0):
    content = magic + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    content += bytes(i % 251 for i in range(int(np.prod(shape))))
    path.write_bytes(gzip.compress(content[: len(content) - cut]))
    return path


def test_read_wav_returns_the_samples(tmp_path):
    expected = np.array([0, 16384, -32768, 1], dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", expected, 8000, subtype="PCM_16")
    assert torch.equal(read_wav(tmp_path / "a.wav") * 2**15, torch.tensor([0.0, 16384.0, -32768.0, 1.0]))


def damaged_files(folder):
    """name -> (bytes of a wav file, what the message must say)."""
    full = write_wav(folder / "whole.wav").read_bytes()
    return {
        "truncated": (full[:-301], r"expected 1600 bytes in the chunk 'data', as its header says, got 1299.*fetch it"),
        "header only": (full[:30], r"expected 16 bytes in the chunk 'fmt ', as its header says, got 10"),
        "no data": (full[:36], "expected a chunk 'data', got none"),
        "text": (b"this is no recording", "expected a sound, as WAV or FLAC, got"),
        "nothing": (b"", "expected a sound, got an empty file"),
        "bad codec": (full[:20] + b"\xee\xee" + full[22:], "expected a sound, as WAV or FLAC, got"),
        "rate": (write_wav(folder / "rate.wav", rate=16000).read_bytes(), "a rate of 8000 Hz, got 16000 Hz. Resample"),
        "stereo": (write_wav(folder / "stereo.wav", channels=2).read_bytes(), "expected one channel, got 2. Mix"),
        "empty": (
            write_wav(folder / "empty.wav", samples=0).read_bytes(),
            "at least one sample, got an empty recording",
        ),
    }


@pytest.mark.parametrize(
    "kind", ["truncated", "header only", "no data", "text", "nothing", "bad codec", "rate", "stereo", "empty"]
)
def test_damaged_wav_raises(tmp_path, kind):
    content, message = damaged_files(tmp_path)[kind]
    path = tmp_path / "3_theo_7.wav"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"recording '{re.escape(str(path))}': .*{message}"):
        read_wav(path)


@pytest.mark.parametrize("name", ["three_theo_7.wav", "3_theo.wav", "3_nobody_7.wav", "13_theo_7.wav"])
def test_invalid_file_name_raises(tmp_path, name):
    write_wav(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: expected a name .*digit.*_.*speaker.*george.*got '{name}'"):
        read_recordings(tmp_path, SPEAKERS, 1.0)


def test_missing_digit_of_a_speaker_raises(tmp_path):
    for digit in range(9):
        write_wav(tmp_path / f"{digit}_theo_0.wav")
    with pytest.raises(DataError, match=r"recordings of all digits by theo, got 9 recordings, none of them 9_theo_\*"):
        read_recordings(tmp_path, ("theo",), 1.0)
    write_wav(tmp_path / "9_theo_12.wav")
    result = read_recordings(tmp_path, ("theo",), 1.0)
    assert result.digit.tolist() == list(range(10))
    assert result.take.tolist() == [0] * 9 + [12]
    assert result.spectrograms.shape == (10, 64, 40)


def test_read_idx_returns_the_array(tmp_path):
    got = read_idx(write_idx(tmp_path / "a.gz", (2, 3, 5)), 3)
    assert torch.equal(got, torch.arange(30, dtype=torch.uint8).reshape(2, 3, 5))


def test_damaged_idx_raises(tmp_path):
    path = tmp_path / "a.gz"
    with pytest.raises(DataError, match=r"a\.gz: expected a gzipped IDX file, got no such file"):
        read_idx(path, 1)
    with pytest.raises(DataError, match=r"a\.gz: expected 15 values for the shape \(3, 5\), got 11.*truncated"):
        read_idx(write_idx(path, (3, 5), cut=4), 2)
    with pytest.raises(
        DataError, match=r"a\.gz: expected the IDX magic number 00000803: .* 3 dimensions, got 00000802"
    ):
        read_idx(write_idx(path, (3, 5)), 3)
    with pytest.raises(DataError, match="got 00000d02"):
        read_idx(write_idx(path, (3, 5), magic=b"\0\0\x0d"), 2)
    with pytest.raises(DataError, match="expected a header of 12 bytes, got 7 bytes"):
        read_idx(write_idx(path, (3, 5), cut=20), 2)
    path.write_bytes(write_idx(path, (3, 5)).read_bytes()[:-12])
    with pytest.raises(DataError, match=r"a\.gz: expected a complete gzip file, got .*Fetch the file again"):
        read_idx(path, 2)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"a\.gz: expected a complete gzip file, got Not a gzipped file"):
        read_idx(path, 2)


def test_negative_noise_raises_before_files_are_read(tmp_path):
    with pytest.raises(ConfigError, match=r"AVDigits: expected a finite audio_noise >= 0, got audio_noise = -0\.5"):
        AVDigits(tmp_path, audio_noise=-0.5)


def test_missing_folder_error_gives_the_source(monkeypatch, tmp_path):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    with pytest.raises(DataError, match=r"fsdd/recordings: .*got no EQUIPOISE_DATA and no root\. Set EQUIPOISE_DATA"):
        AVDigits()
    monkeypatch.setenv("EQUIPOISE_DATA", str(tmp_path / "first"))
    places = f"got none in '{tmp_path / 'first'}', '{tmp_path / 'second'}'"
    with pytest.raises(DataError, match=f"{re.escape(places)}.*Free Spoken Digit Dataset, doi 10.5281/zenodo.1342401"):
        AVDigits(tmp_path / "second")
    (tmp_path / "second/fsdd/recordings").mkdir(parents=True)
    for speaker in SPEAKERS:
        for digit in range(10):
            write_wav(tmp_path / f"second/fsdd/recordings/{digit}_{speaker}_0.wav")
    with pytest.raises(DataError, match=r"^mnist: expected a folder 'mnist'.*t10k-images-idx3-ubyte\.gz"):
        AVDigits(tmp_path / "second")


def test_mismatched_labels_raise(monkeypatch, tmp_path):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    for folder in ("fsdd/recordings", "mnist"):
        (tmp_path / folder).mkdir(parents=True)
    for speaker in SPEAKERS:
        for digit in range(10):
            write_wav(tmp_path / f"fsdd/recordings/{digit}_{speaker}_0.wav")
    write_idx(tmp_path / "mnist/t10k-images-idx3-ubyte.gz", (7, 28, 28))
    write_idx(tmp_path / "mnist/t10k-labels-idx1-ubyte.gz", (5,))
    with pytest.raises(DataError, match=r"t10k-labels.*: expected as many labels as images = 7, got 5"):
        AVDigits(tmp_path)
    write_idx(tmp_path / "mnist/t10k-labels-idx1-ubyte.gz", (7,))
    with pytest.raises(DataError, match=r"t10k-labels.*: expected more than 5000 samples, got 7"):
        AVDigits(tmp_path)


def test_unknown_fold():
    with pytest.raises(ConfigError, match=r"AVDigits: expected a known fold, got 'D'\. Choose one of: A, B, C"):
        load_dataset("av_digits", fold="D")


@pytest.fixture(scope="module")
def fold_a():
    return load_dataset("av_digits", fold="A")


@published
def test_sizes_shapes_and_statistics(fold_a):
    assert (len(fold_a.train), len(fold_a.val), len(fold_a.test)) == (4000, 1000, 5000)
    assert fold_a.shapes == {"audio": (64, 40), "image": (1, 28, 28)}
    assert torch.linalg.matrix_rank(fold_a.test.inputs["image"].flatten(1)[:200].double(), rtol=1e-3) == 4
    for name, values in fold_a.train.inputs.items():
        assert fold_a.noise[name] == pytest.approx((values.mean().item(), values.std(correction=0).item()))
        # Recordings occur two or three times among the pairs, so the pairs' statistics are close to theirs, not equal.
        assert fold_a.noise[name] == pytest.approx((0.0, 1.0), abs=TOL[torch.bfloat16]["atol"])


@pytest.fixture(scope="module")
def recordings():
    return read_recordings(Path(DATA) / "fsdd/recordings", SPEAKERS, FLOOR)


@published
@pytest.mark.parametrize(
    "fold",
    ["A", pytest.param("B", marks=pytest.mark.slow), pytest.param("C", marks=pytest.mark.slow), "george-theo"],
)
def test_speakers_of_splits_match_the_data_card(fold, recordings):
    data = load_dataset("av_digits", fold=fold)
    tests = torch.tensor([SPEAKERS[s] in FOLDS[fold] for s in recordings.speaker.tolist()])
    member = {"train": ~tests & (recordings.take >= 5), "val": ~tests & (recordings.take < 5), "test": tests}
    assert {name: int(rows.sum()) for name, rows in member.items()} == {"train": 1800, "val": 200, "test": 1000}
    deviation, mean = torch.std_mean(recordings.spectrograms[member["train"]].double(), correction=0)
    for name, rows in member.items():
        split = data.split(name)
        assert set(split.groups) == {SPEAKERS[number] for number in recordings.speaker[rows].tolist()}
        for index in range(0, len(split), 397):
            speaker = SPEAKERS.index(split.groups[index])
            own = rows & (recordings.digit == split.target[index]) & (recordings.speaker == speaker)
            candidates = (recordings.spectrograms[own].double() - mean) / deviation
            distance = (candidates - split.inputs["audio"][index]).abs().amax(dim=(1, 2))
            assert distance.min() < TOL[torch.float16]["atol"]


def test_folds_are_the_pairs_of_speakers():
    assert len({frozenset(pair) for pair in FOLDS.values()}) == 15 == len(FOLDS) - 3


@published
def test_data_card_class_balance(fold_a):
    card = (Path(__file__).parents[2] / "docs/data/av_digits.md").read_text()
    for name in ("train", "val", "test"):
        counts = torch.bincount(fold_a.split(name).target).tolist()
        assert f"| {name} | {' | '.join(map(str, counts))} |" in card
