"""Streams: sources, statistics against those of the whole table, splits, batches, check, and what is refused."""

import gc
import warnings

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image

import equipoise as eq
from equipoise.data import load_dataset, loader
from equipoise.data.sets.manifest import ManifestDataset
from equipoise.data.sets.stream import StreamDataset
from equipoise.data.streams.stream_splits import StreamSplits
from equipoise.errors import ConfigError, DataError
from helpers.bad_tables import BAD, STREAMED

# The csv reader of ``datasets`` leaves it to the garbage collector to close a file that is not read to its end.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
ROWS = 300


def frame(rows=ROWS, seed=0):
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, rows)
    number = random.normal(size=(rows, 2)) * 3 + 5
    number[::7, 0] = np.nan
    return pd.DataFrame(
        {
            "imu_0": number[:, 0],
            "imu_1": number[:, 1],
            "color": np.array(["red", "green", "blue"])[label],
            "note": [f"this is sentence {i % 11} of a text" for i in range(rows)],
            "who": [f"p{i % 23}" for i in range(rows)],
            "label": [f"c{one}" for one in label],
            "split": (["train"] * 3 + ["val", "test"]) * (rows // 5),
        }
    )


def shards(folder, table, kind, parts=4):
    """Writes a table as several files."""
    folder.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(len(table)), parts)):
        part, path = table.iloc[rows], folder / f"part{number}.{kind}"
        if kind == "csv":
            part.to_csv(path, index=False)
        elif kind == "jsonl":
            part.to_json(path, orient="records", lines=True)
        else:
            part.to_parquet(path, index=False)
    return folder


def saved(folder, table, **options):
    datasets.Dataset.from_pandas(table, preserve_index=False).save_to_disk(str(folder), **options)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "table.csv"
    frame().to_csv(path, index=False)
    return ManifestDataset(str(path), target="label")


def rows_of(data, split, *, train=False):
    index = torch.arange(len(data.split(split)))
    return data.batch(split, index, seed=0, epoch=0, train=train)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder", "file", "object"])
def test_all_sources_equal_the_table(tmp_path, reference, kind):
    table = frame()
    if kind == "folder":
        source = str(saved(tmp_path / "saved", table, num_shards=3))
    elif kind == "file":
        source = str(tmp_path / "table.csv")
        table.to_csv(source, index=False)
    elif kind == "object":
        source = datasets.Dataset.from_pandas(table).to_iterable_dataset(num_shards=4)
    else:
        source = str(shards(tmp_path / "files", table, kind))
    data = StreamDataset(source, target="label")
    assert (data.names, data.classes, data.shapes) == (reference.names, reference.manifest.classes, reference.shapes)
    assert data.vocabulary == reference.vocabulary
    for split in ("train", "val", "test"):
        assert len(data.split(split)) == len(reference.split(split))
        result, expected = rows_of(data, split), rows_of(reference, split)
        assert torch.equal(result["target"], expected["target"])
        assert torch.equal(result["index"], expected["index"])
        for name in data.names:
            torch.testing.assert_close(result[name], expected[name])
        assert result["mask"].keys() == expected["mask"].keys()


def test_an_epoch_has_every_sample_once_whatever_the_workers(tmp_path):
    data = StreamDataset(str(shards(tmp_path / "files", frame(), "parquet")), target="label", buffer_size=64)
    result = {}
    for workers in (0, 2):
        batches = loader(data, "train", 16, seed=3, train=True, workers=workers)
        for epoch in (0, 1):
            batches.sampler.set_epoch(epoch)
            result[workers, epoch] = list(batches)
    for epoch in (0, 1):
        index = torch.cat([batch["index"] for batch in result[0, epoch]])
        assert sorted(index.tolist()) == list(range(len(data.train)))
        for one, other in zip(result[0, epoch], result[2, epoch], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in (*data.names, "target", "index"))
    assert [b["index"].tolist() for b in result[0, 0]] != [b["index"].tolist() for b in result[0, 1]]
    # The samples are those of the stored order.
    stored = rows_of(data, "train")
    batch = result[0, 0][0]
    assert torch.equal(batch["target"], stored["target"][batch["index"]])
    torch.testing.assert_close(batch["imu"], stored["imu"][batch["index"]])


def test_repeated_and_resumed_batches(tmp_path):
    data = StreamDataset(str(shards(tmp_path / "files", frame(), "parquet")), target="label", buffer_size=8)
    options = {"seed": 0, "train": True, "steps_per_batch": 2, "group": 3, "drop_last": True}
    batches = [b["index"].tolist() for b in loader(data, "train", 16, **options)]
    assert batches[:3] == batches[3:6] != batches[6:9]
    later = loader(data, "train", 16, **options)
    later.sampler.resume_at(0, 7)
    assert [b["index"].tolist() for b in later] == batches[7:]


@pytest.mark.parametrize("blank", [None, " "])
def test_rows_without_a_group_are_groups_of_their_own(blank):
    block = pa.table({"who": pa.array([blank] * 60 + ["ann"] * 20, pa.string())})
    splits = StreamSplits([""], column=None, group="who", folds=5, fold=0, seed=0)
    assigned = splits.assign("", block, np.arange(80))
    assert set(assigned[:60].tolist()) == {0, 1, 2}
    assert len(set(assigned[60:].tolist())) == 1
    alone = StreamSplits([""], column=None, group=None, folds=5, fold=0, seed=0).assign("", block, np.arange(80))
    assert (assigned[:60] == alone[:60]).all()


def test_splits_by_hash_and_group(tmp_path):
    folder = str(shards(tmp_path / "files", frame(2000).drop(columns="split"), "parquet"))
    tests = []
    for fold in range(5):
        data = StreamDataset(folder, target="label", fold=fold)
        sizes = [len(data.split(name)) for name in ("train", "val", "test")]
        assert sum(sizes) == 2000
        assert all(300 < size < 500 for size in sizes[1:])
        tests.append(sizes[2])
    # Each row is in the test split of one fold.
    assert sum(tests) == 2000
    data = StreamDataset(folder, target="label", group="who", seed=1)
    people = {}
    for block, _, split in data.rows.scan():
        for person, part in zip(block.column("who").to_pylist(), split.tolist(), strict=True):
            assert people.setdefault(person, part) == part
    assert set(people.values()) == {0, 1, 2}


def test_named_splits(tmp_path):
    table = datasets.Dataset.from_pandas(frame(120).drop(columns="split"))
    parts = {
        "train": table.select(range(80)),
        "validation": table.select(range(80, 100)),
        "test": table.select(range(100, 120)),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    data = StreamDataset(str(tmp_path / "saved"), target="label")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [80, 20, 20]
    streamed = StreamDataset(
        datasets.IterableDatasetDict({n: p.to_iterable_dataset() for n, p in parts.items()}), target="label"
    )
    assert torch.equal(rows_of(streamed, "test")["imu"], rows_of(data, "test")["imu"])
    del parts["validation"]
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "without"))
    data = StreamDataset(str(tmp_path / "without"), target="label")
    assert len(data.train) + len(data.val) == 80
    assert len(data.test) == 20


@pytest.fixture
def images(tmp_path):
    """A saved data set with images in the table; row 5 is damaged."""
    random = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:90])
    content = [
        None if i == 7 else {"path": f"{i}.png", "bytes": (tmp_path / f"{i}.png").read_bytes()} for i in range(60)
    ]
    features = datasets.Features(photo=datasets.Image(), label=datasets.ClassLabel(names=["no", "yes"]))
    table = datasets.Dataset.from_dict({"photo": content, "label": [i % 2 for i in range(60)]}, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def test_images_are_checked_and_skipped(images):
    data = StreamDataset(images, target="label")
    bad = data.check()
    assert list(bad) == [5]
    assert "photo, row 5" in bad[5][0]
    fewer = StreamDataset(images, target="label", skip=[5])
    assert sum(len(fewer.split(name)) for name in ("train", "val", "test")) == 59
    assert fewer.check() == {}
    masks = [
        b["mask"]["photo"]
        for name in ("train", "val", "test")
        for b in fewer.batches(name, 8, seed=0, epoch=0, train=False)
        if "mask" in b
    ]
    assert sum(int((~mask).sum()) for mask in masks) == 1


def test_statistics_cover_all_training_rows(tmp_path):
    table = pd.DataFrame(
        {"x": np.arange(5000.0), "t": [f"word{i % 400} again" for i in range(5000)], "label": ["a", "b"] * 2500}
    )
    data = StreamDataset(str(shards(tmp_path / "files", table, "parquet")), target="label", kinds={"t": "text"})
    values = torch.cat([b["x"] for b in data.batches("train", 256, seed=0, epoch=0, train=False)])
    assert values.mean().abs() < 1e-4
    assert abs(values.std(correction=0) - 1) < 1e-4
    assert data.vocabulary["t"] > 400


def test_sorted_rows_are_reported(tmp_path):
    table = frame(300).sort_values("label")
    with pytest.warns(UserWarning, match="sorted by 'label' in one shard, and only 16 rows are shuffled"):
        StreamDataset(str(shards(tmp_path / "files", table, "parquet", parts=1)), target="label", buffer_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StreamDataset(str(shards(tmp_path / "more", frame(300), "parquet", parts=1)), target="label", buffer_size=16)


def test_streaming_option(tmp_path):
    path = tmp_path / "table.csv"
    frame().to_csv(path, index=False)
    data = load_dataset("manifest", path=str(path), target="label", streaming=True)
    assert isinstance(data, StreamDataset)
    assert eq.data.StreamDataset is StreamDataset
    with pytest.raises(ConfigError, match="streaming only for a table"):
        load_dataset("digits", streaming=True)


def bad(folder, kind, change, **options):
    """Returns a call that opens four changed shards."""
    table = frame()
    path = shards(folder / "files", table, kind)
    change(path)
    return lambda: StreamDataset(str(path), **{"target": "label", **options})


def later(change):
    """Changes the last shard."""

    def apply(folder):
        path = folder / "part3.csv"
        table = pd.read_csv(path)
        change(table).to_csv(path, index=False)

    return apply


def truncated(folder):
    path = sorted(folder.iterdir())[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = {
    "truncated parquet": ("parquet", truncated, {}, "shard 3: expected readable rows|that datasets can stream"),
    "column missing in a later shard": (
        "csv",
        later(lambda t: t.drop(columns="imu_0")),
        {},
        "expected a column 'imu_0', as in the first shard",
    ),
    "text among numbers in a later shard": (
        "csv",
        later(lambda t: t.assign(imu_0="many")),
        {},
        "columns of the same types in all shards|as in the first rows",
    ),
    "empty target in a later shard": (
        "csv",
        later(lambda t: t.assign(label=None)),
        {},
        "target 'label': expected a value in every",
    ),
    "unknown split": (
        "csv",
        later(lambda t: t.assign(split="holdout")),
        {},
        "stream split: expected train, val or test",
    ),
    "infinity in a later shard": (
        "csv",
        later(lambda t: t.assign(imu_1=np.inf)),
        {},
        "finite numbers, got infinity in row 225",
    ),
    "no rows in val": (
        "csv",
        lambda f: [p.write_text(p.read_text().replace(",val", ",test")) for p in f.iterdir()],
        {},
        "expected rows in train, val and test, got none in val of 300 rows",
    ),
    "unknown column": ("csv", lambda f: None, {"target": "labels"}, "expected a known column, got 'labels'"),
    "weights": ("csv", lambda f: None, {"weight": "imu_0"}, "expected no weight, which needs all rows at once"),
    "pairs": ("csv", lambda f: None, {"pair": ["note", "color"]}, "expected no pair, which needs all rows at once"),
    "fold": (
        "csv",
        lambda f: None,
        {"fold": "7"},
        "expected folds >= 3 and 0 <= fold < folds, got folds = 5, fold = 7",
    ),
    "buffer": ("csv", lambda f: None, {"buffer_size": 0}, "expected buffer_size from 1 to 10,000,000, got 0"),
    "changed data": (
        "csv",
        lambda f: None,
        {"checksum": "0" * 16},
        "expected the data that the model was trained with",
    ),
    "no files": ("csv", lambda f: [p.unlink() for p in f.iterdir()], {}, "that datasets can stream"),
    "header only": (
        "csv",
        lambda f: [p.write_text(p.read_text().splitlines()[0] + "\n") for p in f.iterdir()],
        {},
        "expected at least one row, got none|that datasets can stream",
    ),
    "not UTF-8": (
        "csv",
        lambda f: [p.write_bytes(p.read_bytes().replace(b"red", b"r\xe9d")) for p in f.iterdir()],
        {},
        "utf-8|UTF-8",
    ),
    "a longer row": (
        "csv",
        lambda f: (f / "part3.csv").open("a").write("1,2,red,x,p,c0,train,9,9,9\n"),
        {},
        "readable rows",
    ),
    "broken jsonl": ("jsonl", lambda f: (f / "part3.jsonl").open("a").write('{"imu_0": 1, '), {}, "readable rows"),
}


@pytest.fixture(autouse=True)
def close_files():
    """The csv reader of datasets leaves a file open when it cannot parse it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_have_a_message(tmp_path, fault):
    kind, change, options, message = FAULTS[fault]
    call = bad(tmp_path, kind, change, **options)
    with pytest.raises((DataError, ConfigError), match=message):
        call()


@pytest.mark.parametrize("case", BAD)
def test_the_faults_of_tables(tmp_path, case):
    make, options, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises((DataError, ConfigError), match=STREAMED.get(case, message)):
        StreamDataset(str(path), **{"target": "label", **options})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.csv", "expected an existing file or folder, got none"),
        ("table.xlsx", "expected a file that ends with"),
        ("empty.csv", "expected a table with a header, got an empty file"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, message):
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        StreamDataset(str(tmp_path / name), target="label")


def test_data_that_shrink_while_they_are_read(tmp_path):
    folder = shards(tmp_path / "files", frame(), "csv")
    data = StreamDataset(str(folder), target="label")
    path = folder / "part3.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:5]) + "\n")
    with pytest.raises(DataError, match="as many rows as when it was first read"):
        rows_of(data, "train")
