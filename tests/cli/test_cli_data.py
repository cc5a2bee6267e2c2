"""`equipoise data`: lists, prepares and verifies, with errors in one sentence."""

import pytest

from equipoise.cli import run
from equipoise.data.layouts import available_layouts
from helpers.raw_layouts import make_raw


@pytest.fixture
def raw_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_raw("mosei", tmp_path / "raw")


def test_all_data_sets_are_listed(capsys):
    assert run(["data", "ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in available_layouts())


@pytest.mark.parametrize("name", available_layouts())
def test_expected_files_and_options_of_data_sets(name, capsys):
    assert run(["data", "ls", name]) == 0
    message = capsys.readouterr().out
    layout = available_layouts()[name]
    assert layout.license in message
    assert all(f"  {index}: " in message for index in layout.places)
    assert all(f"  --{option} " in message for option in layout.options)


def test_verify_prepared_and_damaged_data(raw_folder, capsys):
    assert run(["data", "prepare", "mosei", str(raw_folder), "--task", "acc7", "--workers", "1"]) == 0
    message = capsys.readouterr().out
    assert "train: 12 samples" in message
    assert "published: 16,326 / 1,871 / 4,659 (train / val / test); here 12 / 4 / 6" in message
    assert "manifest: prepared/mosei/manifest.csv" in message
    assert run(["data", "prepare", "mosei", "raw", "--task", "acc7"]) == 0
    assert "22 samples were already converted" in capsys.readouterr().out
    assert run(["data", "verify", "prepared/mosei"]) == 0
    assert "67 of 67 files as written; 22 samples in the manifest" in capsys.readouterr().out
    removed = next((raw_folder.parent / "prepared" / "mosei" / "text").glob("*/*.npy"))
    removed.unlink()
    assert run(["data", "verify", "prepared/mosei", "--workers", "1"]) == 1
    captured = capsys.readouterr()
    assert f"missing: text/{removed.parent.name}/{removed.name}" in captured.out
    assert "'prepared/mosei' is damaged: 1 files are missing, 0 have changed." in captured.err
    assert run(["data", "prepare", "mosei", "raw", "--task", "acc7", "--workers", "1"]) == 0
    assert run(["data", "verify", "prepared/mosei"]) == 0


def test_dropped_samples_are_printed(raw_folder, capsys):
    make_raw("cremad", raw_folder.parent / "cremad")
    next((raw_folder.parent / "cremad" / "AudioWAV").iterdir()).write_bytes(b"")
    assert run(["data", "prepare", "cremad", "cremad", "--size", "8", "--workers", "1", "--split", "disjoint"]) == 0
    message = capsys.readouterr().out
    assert "dropped: 1 samples; each with its reason in prepared/cremad/prepare.json" in message
    assert "  1 x audio ...: expected a sound, got an empty file" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "expected the name of a data set and the folder of its files, got neither"),
        (["prepare", "mosei"], "got only 'mosei'"),
        (["prepare", "mosie", "raw"], "expected a known data set, got 'mosie'. Did you mean 'mosi' or 'mosei'"),
        (["prepare", "mosei", "raw", "--frames", "3"], "expected a known option, got '--frames'"),
        (["prepare", "mosei", "raw", "--task", "acc5"], "expected a known value of --task, got 'acc5'"),
        (["prepare", "mosei", "raw", "--path", "pickle"], "--path: expected PLACE=PATH, got 'pickle'"),
        (["prepare", "mosei", "nowhere"], "expected the folder of the published files, got no such folder"),
        (["prepare", "mosei", "raw", "--out", "raw"], "expected another folder than ROOT"),
        (["ls", "mosie"], "Did you mean 'mosi' or 'mosei'"),
        (["ls", "mosei", "--workers", "2"], "data ls: expected no options of data prepare, got --workers"),
        (["verify"], "expected the folder that data prepare wrote, got none"),
        (["verify", "raw"], "expected a folder of data prepare, with prepare.json, got none"),
        (["verify", "raw", "--out", "x"], "expected no options of data prepare, got --out"),
        (["verify", "raw", "more"], "expected no options of data prepare, got a third argument"),
    ],
)
def test_errors_are_a_single_line(raw_folder, capsys, arguments, message):
    assert run(["data", *arguments]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
