"""What samples are converted to: spectrograms, frames, sentiment classes and splits, against slow or other
computations.
"""

import numpy as np
import pytest
import torch

from equipoise.data.layouts import fixed_spectrograms as spectra
from equipoise.data.layouts.frame_arrays import middle_frames, read_frames
from equipoise.data.layouts.kinetics_sounds import _positions
from equipoise.data.layouts.published_layout import RawSample
from equipoise.data.layouts.sentiment_features import TASKS, group_of
from equipoise.data.layouts.split_assignment import hold_out_validation, split_by_group
from equipoise.errors import ConfigError
from helpers.raw_layouts import write_images


def noise(length, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)


def test_stft_matches_torch():
    sound = noise(66_150)
    result = torch.stft(
        torch.from_numpy(sound).double(), 512, 353, window=torch.hann_window(512).double(), center=True,
        pad_mode="constant", return_complex=True,
    ).abs()  # fmt: skip
    np.testing.assert_allclose(spectra.stft_188(sound), (result + 1e-7).log().T.numpy(), rtol=1e-4, atol=1e-4)


def test_short_sounds_are_repeated():
    sound = noise(30_000)
    np.testing.assert_array_equal(spectra.stft_188(sound), spectra.stft_188(np.tile(sound, 3)[:66_150]))


def test_spectrogram_sizes_match_the_papers():
    assert spectra.spectrogram_299(noise(48_000)).shape == (299, 257)
    assert spectra.spectrogram_1004(noise(160_000)).shape == (1004, 257)
    assert spectra.fbank_1024(noise(160_000)).shape == (1024, 128)


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_filter_banks_match_kaldi():
    transformers = pytest.importorskip("transformers")
    extractor = transformers.ASTFeatureExtractor(do_normalize=False, max_length=98, num_mel_bins=128)
    sound = noise(16_000)
    expected = extractor(sound, sampling_rate=16_000, return_tensors="np")["input_values"][0]
    result = spectra.kaldi_fbank(sound)
    assert result.shape == expected.shape == (98, 128)
    # Some of the narrowest bands contain no frequency of the transform; both floor them.
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)


def test_frames_are_taken_from_segment_centers():
    for available in range(1, 40):
        for reference in range(1, 5):
            segment = available // reference
            expected = [min(max(i * segment + max(segment // 2, 1), 1), available) - 1 for i in range(reference)]
            assert middle_frames(available, reference) == expected


def test_frames_of_kinetics_sounds():
    assert _positions(6, 3) == [0, 0, 0]
    assert _positions(9, 3) == [0, 3, 6]
    assert max(_positions(30, 3)) == 8


def test_frames_keep_color_and_order(tmp_path):
    write_images(tmp_path, 2)
    paths = sorted(tmp_path.iterdir())
    both = read_frames(paths, 6)
    assert both.shape == (2, 6, 6, 3)
    assert both.dtype == np.uint8
    np.testing.assert_array_equal(read_frames(paths[1:], 6)[0], both[1])
    assert read_frames(paths, 6, gray=True).shape == (2, 6, 6, 1)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("acc3", [0, 0, 2, 2, 2, 2, 2, 1, 1]),
        ("acc2_has0", [0, 0, 0, 0, 1, 1, 1, 1, 1]),
        ("acc2_non0", [0, 0, 0, 0, None, 1, 1, 1, 1]),
        ("acc7", [0, 1, 2, 2, 3, 4, 4, 4, 6]),
        ("acc7_round", [0, 1, 3, 3, 3, 3, 3, 4, 6]),
    ],
)
def test_classes_of_sentiment(task, expected):
    scores = (-3.0, -1.6, -0.5, -0.1, 0.0, 0.1, 0.5, 0.9, 2.6)
    names, of_score = TASKS[task]
    result = [of_score(score) for score in scores]
    assert result == expected
    assert len(names) > max(value for value in result if value is not None)


def test_halves_are_rounded_to_even():
    _, of_score = TASKS["acc7_round"]
    assert [of_score(score) - 3 for score in (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)] == [-2, -2, 0, 0, 2, 2]


def test_groups_of_ids():
    assert group_of("a$_$1") == group_of("a[3]") == group_of("a_1.5_2.5") == group_of("a")


def samples(classes=3, groups=7, each=5):
    return [
        RawSample(f"{c}-{g}-{i}", "train", c, f"g{g}")
        for c in range(classes) for g in range(groups) for i in range(each)
    ]  # fmt: skip


def test_validation_is_stratified_and_does_not_depend_on_the_order():
    result = hold_out_validation(samples())
    chosen = {sample.id for sample in result if sample.split == "val"}
    assert [sum(name.startswith(f"{c}-") for name in chosen) for c in range(3)] == [4, 4, 4]
    again = hold_out_validation(samples()[::-1])
    assert {sample.id for sample in again if sample.split == "val"} == chosen


def test_validation_by_group_is_disjoint():
    result = hold_out_validation(samples(), by_group=True)
    groups = {split: {sample.group for sample in result if sample.split == split} for split in ("train", "val")}
    assert groups["val"]
    assert not groups["train"] & groups["val"]


def test_test_split_is_unchanged():
    result = hold_out_validation([RawSample(str(i), "test", 0, "g") for i in range(9)])
    assert {sample.split for sample in result} == {"test"}


@pytest.mark.parametrize("groups", [3, 4, 10, 91])
def test_disjoint_groups_fill_all_splits(groups):
    result = split_by_group(samples(groups=groups), "data")
    actual = {split: {sample.group for sample in result if sample.split == split} for split in ("train", "val", "test")}
    assert all(actual.values())
    assert sum(map(len, actual.values())) == groups
    if groups > 9:
        part = len([sample for sample in result if sample.split == "test"]) / len(result)
        assert part == pytest.approx(0.2, abs=0.06)


def test_two_groups_raise():
    with pytest.raises(ConfigError, match="three groups or more, and one for each sample, got 2"):
        split_by_group(samples(groups=2), "data")
    with pytest.raises(ConfigError, match="got 3 and samples without one"):
        split_by_group([*samples(groups=3), RawSample("x", "", 0)], "data")
