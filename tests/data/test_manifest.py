"""Tables: recognized columns, targets, splits, readers, missing cells, damaged input."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from PIL import Image

from equipoise.data import Manifest
from equipoise.data.sets.manifest import ManifestDataset, unreadable
from equipoise.data.tables.row_splits import split_rows
from equipoise.errors import ConfigError, DataError
from helpers.bad_tables import BAD, write_table


@pytest.fixture
def media_table(tmp_path: Path) -> Path:
    """A table with audio of several rates and channels, images of several sizes, sequences, texts and categories."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(30):
        rate = (8_000, 16_000, 22_050)[i % 3]
        shape = (rate // 4 + 100 * i, 2) if i % 2 else (rate // 4 + 100 * i,)
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * random.standard_normal(shape), rate)
        Image.fromarray(random.integers(0, 255, (20 + i, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        np.save(tmp_path / f"{i}.npy", random.standard_normal((5 + i, 3)) * 4 + 2)
        rows.append({
            "sound": "" if i == 4 else f"{i}.wav", "photo": "" if i == 5 else f"{i}.png", "imu": f"{i}.npy",
            "note": f"this is the sentence number {i} of a text", "color": ["red", "green", None][i % 3],
            "age": i if i != 6 else None, "who": f"p{i % 6}", "label": "yes" if i % 2 else "no",
        })  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "people.csv", index=False)
    return tmp_path / "people.csv"


def test_kinds_of_columns_are_recognized(media_table):
    manifest = Manifest(media_table, target="label", group="who")
    kinds = {name: one.kind for name, one in manifest.modalities.items()}
    assert kinds == {"sound": "audio", "photo": "image", "imu": "sequence", "note": "text", "table": "table"}
    assert manifest.modalities["table"].columns == ("color", "age")
    assert (manifest.task, manifest.classes, manifest.num_outputs) == ("classification", ("no", "yes"), 2)
    assert any("photo: image" in line for line in manifest.describe())


def test_kinds_can_be_overridden(media_table):
    kinds = {"note": "category", "imu": {"kind": "sequence", "rate": 50.0, "length": 8}, "age": "ignore"}
    manifest = Manifest(media_table, target="label", kinds=kinds)
    assert manifest.modalities["imu"].options == {"rate": 50.0, "length": 8}
    assert "note" in manifest.modalities["table"].columns
    assert "age" in manifest.unused
    with pytest.raises(ConfigError, match="column 'note': expected a known kind, got 'sound'"):
        Manifest(media_table, target="label", kinds={"note": "sound"})
    with pytest.raises(ConfigError, match="Manifest kinds: expected a known column, got 'nose'"):
        Manifest(media_table, target="label", kinds={"nose": "text"})


def test_number_columns_with_a_common_prefix_are_one_vector(tmp_path):
    manifest = Manifest(write_table(tmp_path, y2=range(30)), target="label")
    assert manifest.modalities["x"].columns == ("x_0", "x_1")
    assert manifest.modalities["y2"].kind == "number"


def test_batches_are_standardized_padded_and_masked(media_table):
    data = ManifestDataset(str(media_table), target="label", group="who")
    batch = data.batch("train", torch.arange(len(data.train)), seed=0, epoch=0, train=True)
    rows = data.rows["train"].tolist()
    for name, fixed in (("photo", True), ("sound", False), ("imu", False)):
        missing = [index for index, row in enumerate(rows) if row == {"sound": 4, "photo": 5}.get(name)]
        if name not in batch["mask"]:
            assert not missing
            continue
        mask = batch["mask"][name]
        assert [index for index, has in enumerate(mask.reshape(len(rows), -1).any(dim=1)) if not has] == missing
        valid = batch[name].movedim(1, -1)[mask].reshape(-1, 3) if fixed else batch[name][mask]
        assert valid.mean(dim=0).abs().max() < 1e-4
        assert (valid.std(dim=0, correction=0) - 1).abs().max() < 1e-3
        assert batch[name][~mask].abs().sum() == 0
    lengths = batch["mask"]["imu"].sum(dim=1)
    assert lengths.tolist() == [5 + row for row in rows]
    rate, bands = data.options["sound"]["rate"], data.options["sound"]["bands"]
    assert (rate, bands) in ((8_000, 40), (16_000, 64))
    assert batch["sound"].shape[2] == bands
    # Times of audio frames are the middles of their 10 ms.
    assert torch.allclose(batch["times"]["sound"][0, :2], torch.tensor([0.005, 0.015]))


def test_groups_of_a_table_are_those_of_its_rows(media_table):
    data = ManifestDataset(str(media_table), target="label", group="who")
    for name, rows in data.rows.items():
        assert data.split(name).groups == [str(data.manifest.table["who"][row]) for row in rows.tolist()]
    assert ManifestDataset(str(media_table), target="label").train.groups is None


def test_number_and_category_cells(media_table):
    data = ManifestDataset(str(media_table), target="label", group="who")
    values = data.batch("train", torch.arange(len(data.train)), seed=0, epoch=0, train=False)["table"]
    rows = data.rows["train"]
    age = np.where(rows == 6, np.nan, rows.astype(float))
    expected = np.nan_to_num((age - np.nanmean(age)) / np.nanstd(age))
    assert np.allclose(values[:, 0], expected, atol=1e-5)
    colors = [["red", "green", None][row % 3] for row in rows]
    assert values[:, 1:].tolist() == [[float(c == "green"), float(c == "red")] for c in colors]


def test_rows_without_values_are_missing(tmp_path):
    path = write_table(tmp_path, x_0=[None] * 3 + [1.0] * 27, x_1=[None] * 2 + [2.0] * 28)
    data = ManifestDataset(str(path), target="label", split=None)
    reader = data.readers["x"]
    mask = reader.read(np.arange(5)).mask
    assert mask is not None
    assert mask.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_all_formats_give_the_same_batches(tmp_path, suffix):
    frame = pd.DataFrame({"a_0": np.arange(12) / 3, "a_1": np.arange(12) * 2.0, "y": list("abab") * 3})
    path = tmp_path / f"t.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")))
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    data = ManifestDataset(str(path), target="y")
    full = {name: data.readers["a"].read(np.arange(12)).values for name in ("once", "again")}
    expected = ManifestDataset(_csv(tmp_path, frame), target="y").readers["a"].read(np.arange(12)).values
    assert torch.allclose(full["once"], expected)


def _csv(folder: Path, frame: pd.DataFrame) -> str:
    frame.to_csv(folder / "expected.csv", index=False)
    return str(folder / "expected.csv")


def test_datasets_folder_with_images_and_split_column(tmp_path):
    import datasets

    pixels = [Image.fromarray(np.full((9, 9, 3), 20 * i, dtype=np.uint8)) for i in range(8)]
    parts = {
        name: datasets.Dataset.from_dict(
            {"photo": pixels, "vector": [[float(i), 1.0] for i in range(8)], "label": [i % 2 for i in range(8)]},
            features=datasets.Features(
                photo=datasets.Image(), vector=datasets.List(datasets.Value("float32")),
                label=datasets.ClassLabel(names=["cat", "dog"]),
            ),
        )
        for name in ("train", "validation", "test")
    }  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    data = ManifestDataset(str(tmp_path / "saved"), target="label")
    assert {name: one.kind for name, one in data.manifest.modalities.items()} == {"photo": "image", "vector": "vector"}
    assert data.manifest.classes == ("cat", "dog")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [8, 8, 8]
    assert data.check() == {}


def test_targets():
    frame = pd.DataFrame(
        {
            "x_0": [0.1] * 8,
            "x_1": [0.2] * 8,
            "score": np.arange(8) + 0.5,
            "tags": ["a;b", "b", "c", "a", "a", "b;c", "c", "a"],
            "l1": [0, 1] * 4,
            "l2": [1, 1, 0, 0] * 2,
            "count": [0, 1, 2, 3] * 2,
        }
    )
    score = Manifest(frame, target="score", kinds={"tags": "ignore"})
    assert (score.task, score.target.shape) == ("regression", (8, 1))
    tags = Manifest(frame, target="tags")
    assert (tags.task, tags.classes, tags.target[0].tolist()) == ("multilabel", ("a", "b", "c"), [1.0, 1.0, 0.0])
    labels = Manifest(frame, target=["l1", "l2"])
    assert (labels.task, labels.target[1].tolist()) == ("multilabel", [1.0, 1.0])
    assert Manifest(frame, target=["l1", "score"]).task == "regression"
    assert Manifest(frame, target="count").task == "classification"
    assert Manifest(frame, target="count", task="regression").task == "regression"


@pytest.mark.parametrize("blank", [None, " "])
def test_rows_without_a_group_are_groups_of_their_own(blank):
    speakers = ["ann", "bob", "cy", "dee"] * 5 + [blank] * 20
    columns = {"x": list(np.arange(40.0)), "label": ["yes", "no"] * 20, "speaker": speakers}
    manifest = Manifest(pd.DataFrame(columns), target="label", group="speaker")
    assert len(set(manifest.groups_of(np.arange(40)))) == 24
    parts = manifest.split_rows()
    assert all(len(set(rows) & set(range(20, 40))) for rows in parts.values())
    assert "group: 20 of 40 rows have no speaker; each is a group of its own" in manifest.describe()


def test_groups_are_in_one_split_only():
    random = np.random.default_rng(1)
    group = random.integers(0, 17, 200).tolist()
    classes = random.integers(0, 3, 200)
    seen = []
    for fold in range(5):
        rows = split_rows(200, split=None, group=group, classes=classes, folds=5, fold=fold, seed=0)
        held = {name: {group[row] for row in part} for name, part in rows.items()}
        assert not held["train"] & held["val"]
        assert not held["train"] & held["test"]
        assert not held["val"] & held["test"]
        assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(200))
        seen += rows["test"].tolist()
    assert sorted(seen) == list(range(200))


def test_splits_are_stratified_and_depend_on_seed_only():
    classes = np.array([0] * 80 + [1] * 20)
    options = {"split": None, "group": None, "classes": classes, "folds": 5, "fold": 0}
    rows = split_rows(100, **options, seed=0)
    assert len(rows["test"]) == 20
    assert all(abs(classes[part].mean() - 0.2) < 0.02 for part in rows.values())
    again, other = split_rows(100, **options, seed=0), split_rows(100, **options, seed=1)
    assert all(np.array_equal(rows[name], again[name]) for name in rows)
    assert not np.array_equal(rows["test"], other["test"])


def test_split_column_and_missing_splits(tmp_path):
    names = ["train"] * 20 + ["test"] * 10
    rows = split_rows(30, split=names, group=None, classes=None, folds=5, fold=0, seed=0)
    assert rows["test"].tolist() == list(range(20, 30))
    assert len(rows["val"]) == 4
    assert len(rows["train"]) == 16
    with pytest.raises(
        DataError, match="expected train, val or test in every row of the split column, got 'trian' in row 1"
    ):
        split_rows(2, split=["train", "trian"], group=None, classes=None, folds=5, fold=0, seed=0)
    with warnings.catch_warnings(record=True) as result:
        warnings.simplefilter("always")
        split_rows(
            30,
            split=["train"] * 10 + ["val"] * 10 + ["test"] * 10,
            group=["a", "b"] * 15,
            classes=None,
            folds=5,
            fold=0,
            seed=0,
        )
    assert "2 groups have rows in train and in val, such as 'a'" in str(result[0].message)


def test_sampling_weights(tmp_path):
    path = write_table(tmp_path, w=[0.0] * 15 + [1.0] * 15)
    data = ManifestDataset(str(path), target="label", weight="w")
    from equipoise.data import loader

    drawn = torch.cat([batch["index"] for batch in loader(data, "train", 8, seed=0, train=True)])
    assert len(drawn) == len(data.train)
    assert (data.rows["train"][drawn.numpy()] >= 15).all()
    full = torch.cat([batch["index"] for batch in loader(data, "test", 8, seed=0, train=False)])
    assert full.tolist() == list(range(len(data.test)))


def test_unreadable_files_are_reported_before_training(media_table):
    (media_table.parent / "3.png").write_bytes(b"no image")
    (media_table.parent / "7.wav").write_bytes((media_table.parent / "7.wav").read_bytes()[:500])
    np.save(media_table.parent / "8.npy", np.full((4, 3), np.nan))
    (media_table.parent / "9.wav").unlink()
    np.save(media_table.parent / "11.npy", np.zeros((4, 2)))
    np.save(media_table.parent / "12.npy", np.array([{"a": 1}]), allow_pickle=True)
    data = ManifestDataset(str(media_table), target="label")
    bad = data.check()
    assert sorted(bad) == [3, 7, 8, 9, 11, 12]
    message = str(unreadable(bad, 30))
    assert "6 rows that cannot be read: [3] photo, row 3" in message
    assert "--skip-bad" in message
    left = ManifestDataset(str(media_table), target="label", skip=sorted(bad))
    assert sum(len(left.split(name)) for name in ("train", "val", "test")) == 24
    assert left.check() == {}


def test_changed_table_raises(tmp_path):
    path = write_table(tmp_path)
    digest = Manifest(path, target="label").checksum()
    ManifestDataset(str(path), target="label", checksum=digest)
    path.write_text(path.read_text().replace("a\n", "b\n", 1))
    with pytest.raises(DataError, match="expected the table that the model was trained with, got another content"):
        ManifestDataset(str(path), target="label", checksum=digest)


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_raises_one_error(tmp_path, case):
    make, options, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises((DataError, ConfigError), match=message):
        ManifestDataset(str(path), **{"target": "label", **options})


def test_arrays_of_one_shape_are_neither_cropped_nor_resized(tmp_path):
    random = np.random.default_rng(0)
    shapes = {"spectrum": (7, 11), "flow": (5, 6, 2), "clip": (3, 4, 6, 2)}
    expected = {"spectrum": (1, 7, 11), "flow": (2, 5, 6), "clip": (3, 2, 4, 6)}
    values = {name: random.normal(4, 3, (30, *shape)) for name, shape in shapes.items()}
    for name, arrays in values.items():
        for i, array in enumerate(arrays):
            np.save(tmp_path / f"{name}{i}.npy", array)
    columns = {name: [f"{name}{i}.npy" for i in range(30)] for name in shapes}
    path = write_table(tmp_path, **columns, x_0=[None] * 30, x_1=[None] * 30)
    data = ManifestDataset(str(path), target="label", kinds=dict.fromkeys(shapes, "array"))
    batch = data.batch("train", torch.arange(len(data.train)), seed=0, epoch=0, train=False)
    for name, shape in expected.items():
        assert data.shapes[name] == shape
        channels = torch.from_numpy(values[name][data.rows["train"]].reshape(len(data.train), *shapes[name])).float()
        channels = channels[..., None] if name == "spectrum" else channels
        dims = tuple(range(channels.ndim - 1))
        standard = (channels - channels.mean(dim=dims)) / channels.std(dim=dims, correction=0)
        assert torch.allclose(batch[name], standard.movedim(-1, -3), atol=1e-4)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"numbers of shape \(height, width\).*got float64 of shape \(3,\)"),
        (np.array([["a"]]), "got <U1 of shape"),
        (np.full((2, 2), np.nan), "finite numbers, got NaN or infinity in 4"),
        (np.zeros((0, 3)), r"got float64 of shape \(0, 3, 1\)"),
    ],
)
def test_unreadable_arrays_raise(tmp_path, array, message):
    for i in range(30):
        np.save(tmp_path / f"{i}.npy", array)
    path = write_table(tmp_path, a=[f"{i}.npy" for i in range(30)])
    with pytest.raises(DataError, match=message):
        ManifestDataset(str(path), target="label", kinds={"a": "array"})


IMAGE, SEQUENCE = {"kind": "image", "column": "photo"}, {"kind": "sequence", "column": "steps"}
AUDIO, TEXT = {"kind": "audio", "column": "sound"}, {"kind": "text", "column": "note"}


@pytest.mark.parametrize(("modality", "message"), [
    ({**IMAGE, "size": -3}, "modality 'a', size: expected 1 to 4,096, got -3"),
    ({**IMAGE, "size": 10**7}, "size: expected 1 to 4,096"),
    ({**IMAGE, "size": "x"}, "size: expected a whole number, got x"),
    ({**IMAGE, "size": True}, "size: expected a whole number"),
    ({**IMAGE, "size": None}, "size: expected a whole number"),
    ({**IMAGE, "kind": "frames", "frames": 0}, "frames: expected 1 to 1,024, got 0"),
    ({**IMAGE, "class_path": "os.system"}, "expected a known option of image, got 'class_path'"),
    ({**AUDIO, "rate": 0}, "rate: expected 100 to 768,000, got 0"),
    ({**AUDIO, "seconds": float("nan")}, "seconds: expected a number, got nan"),
    ({**AUDIO, "seconds": float("inf")}, "seconds: expected 0.01 to 3,600, got inf"),
    ({**AUDIO, "bands": 10**6}, "bands: expected 1 to 512"),
    ({**SEQUENCE, "length": 0}, "length: expected 1 to 1,000,000, got 0"),
    ({**SEQUENCE, "rate": 0}, "rate: expected 1e-06 to 1,000,000,000.0, got 0"),
    ({**SEQUENCE, "times": "gone"}, "expected a known column, got 'gone'"),
    ({**SEQUENCE, "times": 3}, "times: expected a text, got 3"),
    ({**TEXT, "length": 2.5}, "length: expected a whole number, got 2.5"),
    ({**TEXT, "tokenizer": "../../gone"}, "expected a folder with a tokenizer"),
    ({**IMAGE, "kind": ["image"]}, "expected a known kind, got .*image"),
    ({"kind": "vector", "columns": []}, r"expected a list of different columns, got \[\]"),
    ({"kind": "vector", "columns": "age"}, "expected a list of different columns, got age"),
    ({"kind": "number", "columns": ["age", "age"]}, "expected a list of different columns"),
    ({"kind": "image", "columns": ["photo", "sound"]}, "expected one column of image, got 2"),
    ({"kind": "category", "column": "label"}, "expected a known column, got 'label'"),
    ({"kind": "number", "column": "note"}, "expected numbers, since its kind is number, got string"),
    ({"kind": "ignore", "column": "note"}, "expected at least one that is not ignored, got none"),
])  # fmt: skip
def test_options_of_modalities(tmp_path, modality, message):
    if "tokenizer" in modality:
        pytest.importorskip("transformers")
    columns = {"photo": "0.png", "sound": "0.wav", "steps": "0.npy", "note": "some words of a note", "age": 3}
    path = write_table(tmp_path, **{name: [cell] * 30 for name, cell in columns.items()})
    with pytest.raises(ConfigError, match=message):
        ManifestDataset(str(path), target="label", modalities={"a": modality})


@pytest.mark.parametrize(("options", "message"), [
    ({"modalities": ["a"]}, r"Manifest modalities: expected a kind, or a mapping with a kind, for each name, got "
                            r"\['a'\]"),
    ({"kinds": "photo"}, "Manifest kinds: expected a kind, or a mapping"),
    ({"kinds": {"x": "audio"}}, "modality 'x': expected one column of audio, got 2"),
    ({"fold": "9" * 5_000}, "expected a fold from 0 to folds - 1, got fold = '999"),
    ({"fold": "\u0663"}, "expected a fold from 0 to folds - 1"),
    ({"seed": -1}, r"expected a seed from 0 to 2\*\*32 - 1, got -1"),
    ({"skip": [30]}, "data, skip: expected rows from 0 to 29, got row 30"),
])  # fmt: skip
def test_options_of_tables(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        ManifestDataset(str(write_table(tmp_path)), target="label", **options)


def test_two_processes_share_batches_of_a_table(media_table):
    from equipoise.data import loader

    data = ManifestDataset(str(media_table), target="label")
    parts = [list(loader(data, "train", 6, seed=0, train=True, rank=rank, world=2)) for rank in (0, 1)]
    full = list(loader(data, "train", 6, seed=0, train=True, rank=0, world=1))
    # A last batch with fewer samples than processes is not used in training.
    for one, other, batch in zip(*parts, full[: len(parts[0])], strict=True):
        both = torch.cat([one["index"], other["index"]])
        assert set(both.tolist()) <= set(batch["index"].tolist())
        assert len(both) == len(batch["index"]) // 2 * 2
    seen = torch.cat([batch["index"] for part in parts for batch in part]).tolist()
    assert len(seen) == len(set(seen))
