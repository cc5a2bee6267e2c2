"""utd_mhad: the published recordings, and errors for damaged ones."""

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from equipoise.data import load_dataset
from equipoise.data.sets.utd_mhad import ACTIONS, SUBJECTS, TRIALS, UNPUBLISHED, list_recordings, read_recording
from equipoise.errors import ConfigError, DataError
from helpers.published_data import DATA, requires_data

NAMES = [
    f"a{a}_s{s}_t{t}" for a in ACTIONS for s in SUBJECTS for t in TRIALS if (a, s, t) not in UNPUBLISHED
]  # fmt: skip


@pytest.fixture(scope="module")
def published_data():
    return load_dataset("utd_mhad", root=DATA)


def write_recording(folder, name="inertial", length=7, **changes):
    shape = (length, 6) if name == "inertial" else (20, 3, length)
    values = np.random.default_rng(0).standard_normal(shape)
    path = folder / f"a1_s1_t1_{name}.mat"
    savemat(path, changes or {"d_iner" if name == "inertial" else "d_skel": values})
    return path, values


@requires_data("utd_mhad/Inertial", "utd_mhad/Skeleton")
def test_published_splits(published_data):
    assert published_data.shapes == {"inertial": (326, 6), "skeleton": (125, 60)}
    assert [len(split) for split in (published_data.train, published_data.val, published_data.test)] == [323, 108, 430]
    assert published_data.train.target.bincount().tolist() == [11 if action == 8 else 12 for action in ACTIONS]
    for split in (published_data.train, published_data.val, published_data.test):
        for name, rate in (("inertial", 50), ("skeleton", 30)):
            mask, times = split.mask[name], split.times[name]
            length = mask.sum(dim=1)
            assert torch.equal(mask, torch.arange(mask.shape[1]) < length[:, None])
            last = times.gather(1, length[:, None] - 1)[:, 0]
            torch.testing.assert_close(last, (length - 1) / rate)
            assert (split.inputs[name][~mask] == 0).all()
    valid = published_data.train.inputs["inertial"][published_data.train.mask["inertial"]]
    torch.testing.assert_close(valid.std(dim=0, correction=0), torch.ones(6), atol=1e-4, rtol=0)


@requires_data("utd_mhad/Inertial", "utd_mhad/Skeleton")
def test_splits_by_subject(published_data):
    def length(action, subject, trial):
        path = f"{DATA}/utd_mhad/Inertial/a{action}_s{subject}_t{trial}_inertial.mat"
        return len(loadmat(path)["d_iner"])

    for split, subjects in (("train", (1, 3, 5)), ("val", (7,)), ("test", (2, 4, 6, 8))):
        samples = published_data.split(split)
        result = samples.mask["inertial"][samples.target == 4].sum(dim=1).tolist()
        assert sorted(result) == sorted(length(5, s, t) for s in subjects for t in TRIALS)
    trials = load_dataset("utd_mhad", root=DATA, validation="trial")
    result = trials.val.mask["inertial"][trials.val.target == 4].sum(dim=1).tolist()
    assert sorted(result) == sorted(length(5, s, 4) for s in (1, 3, 5, 7))
    assert len(trials.train) == 324


def test_read_recording(tmp_path):
    path, values = write_recording(tmp_path)
    torch.testing.assert_close(read_recording(path, "inertial"), torch.tensor(values).float())
    path, values = write_recording(tmp_path, "skeleton")
    expected = [[values[j, c, t] - values[3, c, 0] for j in range(20) for c in range(3)] for t in range(7)]
    torch.testing.assert_close(read_recording(path, "skeleton"), torch.tensor(expected).float())


@pytest.mark.parametrize("cut", [0, 50, 200, -100])
def test_truncated_recordings(tmp_path, cut):
    path, _ = write_recording(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a1_s1_t1_inertial.mat': expected (a whole MATLAB file|an array 'd_iner')"):
        read_recording(path, "inertial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_skel": np.zeros((7, 6))}, r"expected an array 'd_iner' of shape \(time, 6\), got none of numbers"),
        ({"d_iner": "text"}, r"expected an array 'd_iner' of shape \(time, 6\), got none of numbers"),
        ({"d_iner": np.zeros((7, 5))}, r"expected 'd_iner' of shape \(time, 6\), time from 1 to 1000, got \(7, 5\)"),
        ({"d_iner": np.zeros((0, 6))}, r"expected 'd_iner' of shape \(time, 6\).*got \(0, 6\)"),
        ({"d_iner": np.full((7, 6), np.nan)}, r"expected finite values, got 42 that are not"),
    ],
)
def test_recordings_with_invalid_content_raise(tmp_path, changes, message):
    path, _ = write_recording(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        read_recording(path, "inertial")


def test_text_file_instead_of_recording_raises(tmp_path):
    path = tmp_path / "a1_s1_t1_skeleton.mat"
    path.write_text("<html>404</html>" * 40)
    with pytest.raises(DataError, match=r"skeleton.mat': expected (a whole MATLAB file|an array)"):
        read_recording(path, "skeleton")


def test_list_recordings(tmp_path):
    for name in NAMES:
        (tmp_path / f"{name}_inertial.mat").touch()
    assert len(list_recordings(tmp_path, "inertial")) == 861
    (tmp_path / "a7_s2_t3_inertial.mat").rename(tmp_path / "a8_s1_t4_inertial.mat")
    message = r"expected the 861 published recordings, got 1 missing, such as a7_s2_t3_inertial.mat"
    with pytest.raises(DataError, match=message):
        list_recordings(tmp_path, "inertial")
    (tmp_path / "a7_s2_t3_inertial.mat").touch()
    with pytest.raises(DataError, match=r"got a8_s1_t4_inertial.mat, which is not one of them"):
        list_recordings(tmp_path, "inertial")
    (tmp_path / "copy.mat").touch()
    with pytest.raises(DataError, match=r"copy.mat': expected a name a.action._s.subject._t.trial._inertial.mat"):
        list_recordings(tmp_path, "inertial")


def test_missing_folder_and_unknown_validation(tmp_path, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    (tmp_path / "utd_mhad/Inertial").mkdir(parents=True)
    with pytest.raises(DataError, match=r"expected the 861 published recordings, got 861 missing"):
        load_dataset("utd_mhad", root=tmp_path)
    with pytest.raises(ConfigError, match=r"UTDMHAD: expected a known validation, got 'subjects'"):
        load_dataset("utd_mhad", validation="subjects")
