"""load_dataset, splits, batches and the loader, on the bundled data set."""

import pickle

import numpy as np
import pytest
import torch

from equipoise.data import Split, available_datasets, load_dataset, loader
from equipoise.data.dataset import split_statistics, standardize
from equipoise.errors import ConfigError, ShapeError


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def batches_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_load_dataset_rejects_other_names():
    assert {"digits", "av_digits"} <= set(available_datasets())
    assert not {"base", "loader", "order", "augment"} & set(available_datasets())
    with pytest.raises(ConfigError, match=r"load: expected a known data set, got 'digit'\. Did you mean .*'digits'"):
        load_dataset("digit")
    with pytest.raises(ConfigError, match="got 'loader'"):
        load_dataset("loader")


def test_split_of_unequal_lengths():
    with pytest.raises(ShapeError, match=r"Split 'audio': expected as many samples as targets = 3, got 2"):
        Split({"audio": torch.zeros(2, 5)}, torch.zeros(3))
    with pytest.raises(ShapeError, match="Split groups: expected one for each target = 3, got 2"):
        Split({}, torch.zeros(3), groups=["a", "b"])


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_groups_of_equal_numbers_are_one_group(kind):
    assert Split({}, torch.zeros(3), groups=kind([7, 5, 7])).groups == ["7", "5", "7"]


def test_unknown_split(digits):
    with pytest.raises(ConfigError, match=r"Digits: expected a known split, got 'tset'\. Did you mean 'test'"):
        digits.split("tset")


def test_statistics_of_the_reference_split():
    reference = torch.tensor([[0.0, 4.0], [4.0, 8.0]])
    got = standardize(reference + 1, reference)
    mean, deviation = split_statistics({"audio": got})["audio"]
    assert (mean, deviation) == pytest.approx((8**-0.5, 1.0))


def test_batches_are_samples_of_the_split(digits):
    for batch in digits.batches("test", 101, seed=0, epoch=0, train=False):
        assert torch.equal(batch["target"], digits.test.target[batch["index"]])
        assert batch["audio"].shape == (len(batch["index"]), *digits.shapes["audio"])
        assert batch["image"].shape == (len(batch["index"]), *digits.shapes["image"])
        for name in digits.names:
            clean = digits.test.inputs[name][batch["index"]]
            together = torch.corrcoef(torch.stack([clean.flatten(), batch[name].flatten()]))[0, 1]
            others = torch.corrcoef(torch.stack([clean.roll(1, 0).flatten(), batch[name].flatten()]))[0, 1]
            assert together > others + 0.05


def test_evaluation_batches_do_not_depend_on_epoch_seed_or_batch_size(digits):
    first = next(digits.batches("val", 300, seed=0, epoch=0, train=False))
    again = next(digits.batches("val", 300, seed=5, epoch=7, train=False))
    assert batches_equal(first, again)
    second = list(digits.batches("val", 97, seed=0, epoch=0, train=False))[1]
    assert batches_equal({name: values[97:194] for name, values in first.items()}, second)


def test_splits_have_different_noise(digits):
    val, test = (digits.batch(s, torch.arange(5), seed=0, epoch=0, train=False) for s in ("val", "test"))
    left = val["audio"] * 5**0.5 - digits.val.inputs["audio"][:5]
    right = test["audio"] * 5**0.5 - digits.test.inputs["audio"][:5]
    assert abs(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]) < 5 / left.numel() ** 0.5


def test_training_batches_depend_on_seed_and_epoch(digits):
    def epoch(number, seed=0):
        batches = loader(digits, "train", 64, seed=seed, train=True)
        batches.sampler.set_epoch(number)
        return list(batches)

    torch.manual_seed(0)
    first = epoch(3)
    torch.manual_seed(1)
    assert all(batches_equal(a, b) for a, b in zip(first, epoch(3), strict=True))
    assert not batches_equal(first[0], epoch(4)[0])
    assert not batches_equal(first[0], epoch(3, seed=1)[0])
    assert sorted(torch.cat([batch["index"] for batch in first]).tolist()) == list(range(1000))


def test_augmentation_differs_between_epochs(digits):
    index = torch.arange(7)
    first, second = (digits.batch("train", index, seed=0, epoch=e, train=True) for e in (0, 1))
    assert not torch.isclose(first["audio"], second["audio"]).any(dim=2).all()


def test_loader_matches_batches(digits):
    served = loader(digits, "train", 97, seed=2, train=True)
    served.sampler.set_epoch(5)
    direct = list(digits.batches("train", 97, seed=2, epoch=5, train=True))
    assert len(served) == len(direct) == 11
    assert all(batches_equal(a, b) for a, b in zip(served, direct, strict=True))
    assert len(loader(digits, "train", 97, seed=2, train=True, drop_last=True)) == 10


def test_two_processes_share_the_batches(digits):
    def epoch(**place):
        return list(loader(digits, "train", 64, seed=0, train=True, **place))

    for full, *halves in zip(epoch(), epoch(rank=0, world=2), epoch(rank=1, world=2), strict=True):
        joined = {name: torch.cat([half[name] for half in halves]) for name in full}
        assert batches_equal(
            {name: values[full["index"].argsort()] for name, values in full.items()},
            {name: values[joined["index"].argsort()] for name, values in joined.items()},
        )


def test_loading_does_not_use_the_global_rng(digits):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(loader(digits, "train", 64, seed=0, train=True)))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_can_be_pickled(digits):
    served = pickle.loads(pickle.dumps(loader(digits, "val", 64, seed=0, train=False)))
    assert batches_equal(next(iter(served)), next(digits.batches("val", 64, seed=0, epoch=0, train=False)))


def test_batches_contain_the_masks_and_times_of_a_split():
    source = load_dataset("generated")
    size = len(source.train)
    mask, times = torch.arange(size) % 2 == 0, torch.arange(float(size))[:, None].expand(-1, 3)
    source.train = Split(source.train.inputs, source.train.target, mask={"audio": mask}, times={"audio": times})
    batch = source.batch("train", torch.tensor([1, 4]), seed=0, epoch=0, train=True)
    assert batch["mask"]["audio"].tolist() == [False, True]
    assert batch["times"]["audio"][:, 0].tolist() == [1.0, 4.0]
    with pytest.raises(ShapeError, match="Split 'audio' mask: expected as many samples as targets"):
        Split(source.train.inputs, source.train.target, mask={"audio": mask[:-1]})


def test_batches_do_not_depend_on_the_number_of_workers():
    source = load_dataset("generated")
    expected = list(loader(source, "train", 64, seed=1, train=True))
    actual = list(loader(source, "train", 64, seed=1, train=True, workers=2))
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
