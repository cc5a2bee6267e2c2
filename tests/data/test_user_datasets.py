"""Data sets made in Python: tensors, map-style data sets, functions of the user's file."""

import pytest
import torch

from equipoise.data import MapDataset, TensorDataset
from equipoise.data.user_code import allow_code, dataset_from_code
from equipoise.errors import ConfigError, DataError, ShapeError


def random_split(size=9, features=4):
    generator = torch.Generator().manual_seed(size)
    return {
        "audio": torch.randn(size, 5, 3, generator=generator),
        "sensor": torch.randn(size, features, generator=generator),
        "target": torch.arange(size) % 3,
        "mask": {"sensor": torch.arange(size) % 4 > 0},
    }


def test_tensor_dataset():
    data = TensorDataset(random_split(), random_split(6), random_split(7))
    assert (data.names, data.task, data.num_outputs) == (("audio", "sensor"), "classification", 3)
    assert data.shapes == {"audio": (5, 3), "sensor": (4,)}
    batch = data.batch("val", torch.tensor([0, 1]), seed=0, epoch=0, train=False)
    assert batch["mask"]["sensor"].tolist() == [False, True]
    assert torch.equal(batch["audio"], random_split(6)["audio"][:2])
    valid = random_split()["sensor"][random_split()["mask"]["sensor"]]
    assert data.noise["sensor"] == pytest.approx((valid.mean().item(), valid.std(correction=0).item()))


def test_tensor_dataset_with_groups():
    data = TensorDataset(random_split(), random_split(6), {**random_split(4), "groups": torch.tensor([3, 3, 1, 1])})
    assert (data.names, data.train.groups, data.test.groups) == (("audio", "sensor"), None, ["3", "3", "1", "1"])


def test_invalid_tensors():
    with pytest.raises(ShapeError, match="TensorDataset: expected inputs as in train"):
        TensorDataset(random_split(), random_split(6, features=5), random_split(7))
    with pytest.raises(ShapeError, match="expected a Split, or a dict with a tensor 'target'"):
        TensorDataset({"audio": torch.zeros(3, 2)}, random_split(), random_split())
    with pytest.raises(ConfigError, match="whole-number classes from 0 to num_outputs - 1 = 1, got 0 to 2"):
        TensorDataset(random_split(), random_split(), random_split(), num_outputs=2)
    with pytest.raises(ConfigError, match="task classification, multilabel or regression, got 'ranking'"):
        TensorDataset(random_split(), random_split(), random_split(), task="ranking")


class Items(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        words = torch.tensor([index + 1] * (1 + index % 3))
        return {
            "audio": torch.full((2 + index, 3), float(index)), "image": None if index == 1 else torch.ones(1, 4, 4),
            "text": words, "target": torch.tensor([index / 2.0]), "times": {"audio": torch.arange(2 + index) / 10},
        }  # fmt: skip


def test_map_style_data_sets_are_padded_and_masked():
    data = MapDataset(Items(6), Items(3), Items(4), vocabulary={"text": 10})
    assert (data.task, data.num_outputs) == ("regression", 1)
    assert data.shapes == {"audio": (7, 3), "image": (1, 4, 4), "text": (3,)}
    batch = data.batch("train", torch.tensor([0, 1, 3]), seed=0, epoch=0, train=True)
    assert batch["audio"].shape == (3, 5, 3)
    assert batch["mask"]["audio"].sum(dim=1).tolist() == [2, 3, 5]
    assert batch["mask"]["image"].tolist() == [True, False, True]
    assert batch["text"].dtype == torch.long
    assert batch["times"]["audio"][2].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert batch["target"].tolist() == [[0.0], [0.5], [1.5]]


def test_invalid_items():
    with pytest.raises(DataError, match="MapDataset val: expected at least one item, got none"):
        MapDataset(Items(3), Items(0), Items(3))
    with pytest.raises(DataError, match="MapDataset train, item 0: expected a dict with a target, got keys audio"):
        MapDataset([{"audio": torch.zeros(2)}], Items(3), Items(3))
    odd = [{"audio": torch.zeros(2), "target": 0}, {"audio": torch.zeros(3), "target": 1}]
    data = MapDataset(odd, odd, odd)
    with pytest.raises(ShapeError, match=r"MapDataset train, item 1, 'audio': expected shape \(2,\) as in training"):
        data.batch("train", torch.tensor([0, 1]), seed=0, epoch=0, train=True)


CODE = """
import torch

def make(fold="0"):
    items = [{"a": torch.full((3,), float(i)), "b": torch.ones(4), "target": i % 2} for i in range(8 + int(fold))]
    return items, items[:4], items[4:]

def broken():
    raise RuntimeError("no disk")

def nothing():
    return 3
"""


def test_code_runs_only_if_named_on_the_command_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    source = f"{file}:make"
    with pytest.raises(ConfigError, match="expected the Python file of the data set on the command line"):
        dataset_from_code(source)
    allow_code([source, f"{file}:broken", f"{file}:nothing", f"{file}:none", f"{tmp_path}/gone.py:make"])
    assert len(dataset_from_code(source).train) == 8
    assert len(dataset_from_code(source, "2").train) == 10
    with pytest.raises(DataError, match="expected a function that returns a data set, got RuntimeError: no disk"):
        dataset_from_code(f"{file}:broken")
    with pytest.raises(DataError, match="expected a Dataset, or three map-style data sets: train, val, test, got int"):
        dataset_from_code(f"{file}:nothing")
    with pytest.raises(DataError, match="expected a function 'none' in the file, got functions make, broken, nothing"):
        dataset_from_code(f"{file}:none")
    with pytest.raises(DataError, match=r"expected a Python file '.*gone.py', got none"):
        dataset_from_code(f"{tmp_path}/gone.py:make")
    with pytest.raises(ConfigError, match="expected no fold, since the function has no parameter fold"):
        dataset_from_code(f"{file}:nothing", "1")


ADDITIVE = torch.zeros(9).masked_fill(torch.arange(9) % 4 == 0, -torch.inf)


@pytest.mark.parametrize(("mask", "error", "message"), [
    ({"sensor": ADDITIVE}, ShapeError, "Split 'sensor' mask: .*got numbers from -inf to 0.*additive mask"),
    ({"sensor": torch.full((9,), torch.nan)}, ShapeError, "Split 'sensor' mask"),
    ({"sensor": torch.zeros(9)}, ShapeError, "floating zeros alone"),
    ({"sensor": [True] * 9}, ShapeError, "Split 'sensor' mask: .*got list"),
    ({"sensor": torch.ones(9, 4, 1).bool()}, ShapeError, r"got shape \(9, 4, 1\)"),
    ({"sound": torch.ones(9).bool()}, ConfigError, "Split mask: expected a known modality, got 'sound'"),
    ({"sensor": torch.zeros(9).bool()}, DataError, "training samples with this modality, got none besides masked ones"),
])  # fmt: skip
def test_invalid_masks(mask, error, message):
    with pytest.raises(error, match=message):
        TensorDataset({**random_split(), "mask": mask}, random_split(), random_split())


@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.float32])
def test_numeric_masks_equal_boolean_masks(dtype):
    valid = torch.arange(9) % 4 > 0
    numbers = TensorDataset({**random_split(), "mask": {"sensor": valid.to(dtype)}}, random_split(), random_split())
    assert numbers.noise == TensorDataset(random_split(), random_split(), random_split()).noise
    assert torch.equal(numbers.train.mask["sensor"], valid)


def test_nan_is_allowed_in_masked_inputs_only():
    content = random_split()
    spoiled = {**content, "sensor": content["sensor"].masked_fill(~content["mask"]["sensor"][:, None], torch.nan)}
    expected = TensorDataset(content, random_split(), random_split()).noise
    assert TensorDataset(spoiled, random_split(), random_split()).noise == expected
    with pytest.raises(DataError, match="TensorDataset 'sensor': expected finite training inputs, got NaN or infinity"):
        TensorDataset({**spoiled, "mask": {}}, random_split(), random_split())
    # The tokens of an encoder are not those of its input.
    encoder_tokens = {**content, "mask": {**content["mask"], "audio": torch.ones(9, 12).bool()}}
    assert (
        TensorDataset(encoder_tokens, random_split(), random_split()).noise
        == TensorDataset(content, random_split(), random_split()).noise
    )


def masked_items(mask):
    def values(i, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(i))

    return [
        {"audio": values(i, 3 + i % 3, 2), "image": values(i + 9, 5), "target": i % 2, "mask": mask(i)}
        for i in range(6)
    ]


def test_masks_of_items():
    items = masked_items(lambda i: {"audio": torch.arange(3 + i % 3) != 1, "image": i > 1})
    batch = MapDataset(items, items, items).batch("train", torch.arange(4), seed=0, epoch=0, train=True)
    assert batch["mask"]["audio"].int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1], [1, 0, 1, 0, 0]]
    assert batch["mask"]["image"].tolist() == [False, False, True, True]
    valid = torch.cat([item["image"] for item in items[2:]]).double()
    assert MapDataset(items, items, items).noise["image"] == pytest.approx(
        (valid.mean().item(), valid.std(correction=0).item())
    )


@pytest.mark.parametrize(("mask", "error", "message"), [
    ({"sound": True}, ConfigError, "item 0, mask: expected a known modality, got 'sound'"),
    ({"audio": torch.ones(9).bool()}, ShapeError, r"item 0, mask of 'audio': .*got shape \(9,\)"),
    ({"audio": torch.tensor([0.0, 0.0, -torch.inf])}, ShapeError, "got numbers from -inf to 0"),
    ({"image": torch.ones(5).bool()}, ShapeError, r"item 0, mask of 'image': .*got shape \(5,\)"),
])  # fmt: skip
def test_invalid_masks_of_items(mask, error, message):
    items = masked_items(lambda i: mask)
    with pytest.raises(error, match=message):
        MapDataset(items, items, items)
