"""train, compare, diagnose and load on a table, and on data sets of a Python file."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
from PIL import Image

import equipoise as eq
from equipoise.cli.entry_point import run
from equipoise.data import user_code
from equipoise.errors import ConfigError, DataError
from equipoise.results.significance import unpack_outcomes
from equipoise.training import recipes
from equipoise.training.run import _load_dataset_cached

FAST = ["--train.epochs", "2", "--train.batch_size", "8"]


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    rows = []
    for i in range(40):
        soundfile.write(folder / f"{i}.wav", 0.1 * random.standard_normal(1_600), 8_000)
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(
            {
                "sound": f"{i}.wav" if i % 7 else "",
                "photo": f"{i}.png",
                "age": i % 13,
                "note": f"a note about {i % 5} things",
                "person": f"p{i % 8}",
                "label": ["no", "yes"][i % 2],
            }
        )
    pd.DataFrame(rows).to_csv(folder / "people.csv", index=False)
    return folder / "people.csv"


def test_train_with_table_and_target_only(table_path, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    words = ["train", "--data", str(table_path), "--target", "label", "--group", "person", "--out", str(out), *FAST]
    assert run(words) == 0
    text = capfd.readouterr().out
    assert "sound: audio (sound)" in text
    assert "photo: ConvEncoder for samples of shape (3, 16, 16)" in text
    assert (out / "report.html").is_file()
    assert (out / "diagnosis" / "report.html").is_file()
    content = json.loads((out / "results.json").read_text())
    assert content["summary"]
    recipe = recipes.load_recipe(out / "recipe.yaml")
    people = eq.data.load_dataset(**recipe.data).test.groups
    numbers = unpack_outcomes(content["runs"][0]["groups"]).astype(int).tolist()
    assert len(set(zip(people, numbers, strict=True))) == len(set(people)) > 1
    assert recipe.data["modalities"]["sound"]["rate"] == 8_000
    assert recipe.methods[-1] == "ensemble+corruption"
    model = eq.load(out)
    assert model.names == ("sound", "photo", "age", "note")
    # The recipe is the user's own: another run can start from it.
    assert (
        run(["train", "--config", str(out / "recipe.yaml"), "--method", "photo", "--out", str(tmp_path / "two"), *FAST])
        == 0
    )


def test_moved_data_are_reported_and_relocated(table_path, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    shutil.copytree(table_path.parent, folder)
    out = tmp_path / "run"
    words = [
        "train",
        "--data",
        "data/people.csv",
        "--target",
        "label",
        "--method",
        "photo",
        "--out",
        str(out),
        "--no-diagnose",
    ]
    assert run([*words, *FAST]) == 0
    folder.rename(tmp_path / "moved")
    _load_dataset_cached.cache_clear()
    with pytest.raises(DataError, match=r"table '.*people.csv': expected an existing file or folder, got none"):
        eq.load(out)
    assert eq.load(out, data=tmp_path / "moved" / "people.csv").names == ("photo",)
    capfd.readouterr()
    assert run(["diagnose", str(out), "--tests", "score"]) == 1
    assert "give its new location with --data" in capfd.readouterr().err.replace("\n", " ")
    assert run(["diagnose", str(out), "--tests", "score", "--data", "moved/people.csv"]) == 0


def test_compare_on_a_table(table_path, tmp_path):
    out = tmp_path / "runs"
    words = [
        "compare",
        "--data",
        str(table_path),
        "--target",
        "label",
        "--kind",
        "note=ignore",
        "--kind",
        "sound=ignore",
        "--methods",
        "photo,concat",
        "--seeds",
        "1",
        "--workers",
        "0",
        "--out",
        str(out),
        *FAST,
    ]
    assert run(words) == 0
    content = json.loads((out / "results.json").read_text())
    assert content["complete"]
    assert {row["method"] for row in content["runs"]} == {"photo", "concat"}
    # Finished runs are found again: the recipe is derived in the same way.
    assert run(words) == 0


def test_damaged_files_raise_or_are_excluded(table_path, tmp_path, capfd):
    folder = tmp_path / "data"
    shutil.copytree(table_path.parent, folder)
    (folder / "3.png").write_bytes(b"damaged")
    words = ["train", "--data", str(folder / "people.csv"), "--target", "label", "--method", "photo", "--no-diagnose",
             "--out", str(tmp_path / "run"), *FAST]  # fmt: skip
    assert run(words) == 1
    message = " ".join(capfd.readouterr().err.split())
    assert "expected readable files in all 40 rows, got 1 rows that cannot be read: [3] photo, row 3" in message
    assert not (tmp_path / "run").exists()
    assert run([*words, "--skip-bad"]) == 0
    assert recipes.load_recipe(tmp_path / "run" / "recipe.yaml").data["skip"] == [3]


MINE = """
import torch

def make():
    generator = torch.Generator().manual_seed(0)
    def part(n):
        return [{"a": torch.randn(5, generator=generator), "b": torch.randn(3, 2, generator=generator), "target": i % 2}
                for i in range(n)]
    return part(32), part(8), part(8)
"""


def test_python_data_require_the_command_line_option(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    out = tmp_path / "run"
    assert (
        run(["train", "--data", "mine.py:make", "--method", "concat", "--out", str(out), "--no-diagnose", *FAST]) == 0
    )
    source = f"{tmp_path / 'mine.py'}:make"
    monkeypatch.setattr(user_code, "_allowed", set())
    _load_dataset_cached.cache_clear()
    with pytest.raises(ConfigError, match="expected the Python file of the data set on the command line"):
        eq.load(out)
    capfd.readouterr()
    assert run(["diagnose", str(out), "--tests", "score"]) == 1
    assert source in capfd.readouterr().err.replace("\n", "")
    assert run(["diagnose", str(out), "--tests", "score", "--data", "mine.py:make"]) == 0
    assert run(["compare", "--data", "mine.py:make", "--methods", "a,concat", "--seeds", "1", "--workers", "1",
                "--out", str(tmp_path / "runs"), *FAST]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--data", "TABLE"],
            "--data: expected the column of the target, or a pair of columns, got none. Add --target COLUMN, or --pair",
        ),
        (["train", "--target", "label"], "expected --data without --config for options of a table, got --target"),
        (
            ["train", "--data", "TABLE", "--target", "lable"],
            "expected a known column, got 'lable'. Did you mean 'label'",
        ),
        (
            ["train", "--data", "TABLE", "--target", "label", "--kind", "photo"],
            "--kind: expected COLUMN=KIND, got 'photo'",
        ),
        (
            ["train", "--data", "TABLE", "--target", "label", "--kind", "photo=movie"],
            "expected a known kind, got 'movie'",
        ),
        (["train", "--data", "mine.py:make"], "expected a Python file"),
        (["train", "--data", "mine.py:make", "--target", "x"], "options of a table only with a table"),
        (["compare", "--data", "gone.csv", "--target", "x"], "expected an existing file or folder, got none"),
    ],
)
def test_invalid_options_raise_one_error(table_path, tmp_path, capfd, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert run([str(table_path) if word == "TABLE" else word for word in words]) == 1
    error = capfd.readouterr().err
    assert message in " ".join(error.split())
    assert len(list(tmp_path.iterdir())) == 0
