"""Out-of-distribution splits: held-out classes (near), photographs and synthetic sounds (far)."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise import data
from equipoise.data.class_split import sample_kept_classes, split_by_class
from equipoise.data.ood_splits import FAR_SAMPLES
from equipoise.data.sets.far_ood import photo_patches, synthetic_sounds
from equipoise.errors import ConfigError
from equipoise.training import recipes
from equipoise.training.run import load_run_dataset
from helpers.runs import RandomData, recipe
from helpers.tolerance import TOL
from oracles import data as oracles_data

HELD = [2, 7, 9]
SCALE = {"Digits": 5**0.5, "AVDigits": 2**0.5}
"""sqrt(1 + d^2), by which the sum of audio and noise of deviation d is divided."""
KEPT = [0, 1, 3, 4, 5, 6, 8]
DATA = os.environ.get("EQUIPOISE_DATA", "")
published = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "fsdd/recordings").is_dir() or not (Path(DATA) / "mnist").is_dir(),
    reason="EQUIPOISE_DATA does not name a folder with fsdd/recordings and mnist",
)
NAMES = ["digits", pytest.param("av_digits", marks=published)]


@pytest.fixture(scope="module", params=["digits", pytest.param("av_digits", marks=[published, pytest.mark.slow])])
def full_and_held_out(request):
    """The whole data set, and the one without some classes."""
    return data.load_dataset(request.param), data.load_dataset(request.param, held_out=HELD)


def standardize(values):
    """Every sample with mean 0 and deviation 1, so that other statistics of the training split make no difference."""
    flat = values.flatten(1).double()
    return (flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True)


def test_splits_contain_retained_classes_only(full_and_held_out):
    complete, part = full_and_held_out
    assert part.num_outputs == len(KEPT)
    for name in ("train", "val", "test"):
        full, left = complete.split(name), part.split(name)
        rows = [row for row, label in enumerate(full.target.tolist()) if label in KEPT]
        assert left.target.tolist() == [KEPT.index(int(full.target[row])) for row in rows]
        torch.testing.assert_close(
            standardize(left.inputs["audio"]), standardize(full.inputs["audio"][rows]), **TOL[torch.float32]
        )


def test_ood_split_contains_held_out_test_samples(full_and_held_out):
    full, part = full_and_held_out
    rows = [row for row, label in enumerate(full.test.target.tolist()) if label in HELD]
    assert part.near_ood.target.tolist() == full.test.target[rows].tolist()
    torch.testing.assert_close(
        standardize(part.near_ood.inputs["audio"]), standardize(full.test.inputs["audio"][rows]), **TOL[torch.float32]
    )
    assert full.near_ood is None


def test_statistics_exclude_held_out_samples(full_and_held_out):
    _, part = full_and_held_out
    train = part.train.inputs["image"].flatten(1).double()
    rank = int(torch.linalg.matrix_rank(train, rtol=1e-3))
    for split in (part.test, part.near_ood):
        values = split.inputs["image"].flatten(1).double()
        assert int(torch.linalg.matrix_rank(torch.cat([train, values]), rtol=1e-3)) == rank
    for name, (mean, deviation) in part.noise.items():
        assert mean == pytest.approx(part.train.inputs[name].double().mean().item(), abs=TOL[torch.float32]["rtol"])
        assert deviation == pytest.approx(1.0, abs=TOL[torch.bfloat16]["atol"])


def test_no_held_out_classes_has_no_effect():
    plain, empty = data.load_dataset("digits"), data.load_dataset("digits", held_out=[])
    for name in ("train", "val", "test"):
        for modality in plain.names:
            assert torch.equal(plain.split(name).inputs[modality], empty.split(name).inputs[modality])
        assert torch.equal(plain.split(name).target, empty.split(name).target)
    assert (plain.num_outputs, empty.near_ood) == (10, None)


def test_near_and_far_ood_are_processed_as_the_test_split(full_and_held_out):
    _, part = full_and_held_out
    for kind, size, labels in (("near", len(part.near_ood), HELD), ("far", FAR_SAMPLES, [-1])):
        view = data.ood_split(part, kind)
        served = list(data.loader(view, "test", 101, seed=3, train=False))
        target = torch.cat([batch["target"] for batch in served])
        assert len(target) == size == len(view.test)
        assert target.unique().tolist() == labels
        for batch in served:
            assert set(batch) == {*part.names, "target", "index"}
            assert all(batch[name].shape[1:] == part.shapes[name] for name in part.names)
            assert all(batch[name].isfinite().all() for name in part.names)
        known = next(iter(data.loader(part, "test", 101, seed=0, train=False)))
        noise, expected = (
            SCALE[type(part).__name__] * batch["audio"] - split.inputs["audio"][:101]
            for batch, split in ((served[0], view.test), (known, part.test))
        )
        torch.testing.assert_close(noise, expected, **TOL[torch.float16])
        assert view.train is part.train
        assert part.test is not view.test


def test_far_ood_inputs_use_the_data_preprocessing(full_and_held_out):
    _, part = full_and_held_out
    side = part.shapes["image"][-1]
    pictures, heard = photo_patches(5, side), synthetic_sounds(5)
    got = part.far_ood_inputs(pictures, heard)
    far = data.ood_split(part, "far").test.inputs
    for name in part.names:
        torch.testing.assert_close(got[name], far[name][:5], **TOL[torch.float32])
    train = part.train.inputs["image"].flatten(1).double()
    basis = torch.linalg.svd(train, full_matrices=False)
    rank = int((basis.S / basis.S[0] > 1e-3).sum())
    kept = basis.Vh[:rank]
    # Reconstructions stay in the span, and there they differ from one another as the pictures do, to one scale.
    flat = got["image"].flatten(1).double()
    torch.testing.assert_close(flat @ kept.T @ kept, flat, **TOL[torch.float16])
    seen = (flat - flat[0])[1:] @ kept.T
    raw = (pictures.flatten(1).double() - pictures.flatten(1).double()[0])[1:] @ kept.T
    scale = float((seen * raw).sum() / raw.square().sum())
    torch.testing.assert_close(seen, scale * raw, rtol=TOL[torch.float16]["rtol"], atol=TOL[torch.bfloat16]["atol"])
    logarithms = torch.from_numpy(np.stack([oracles_data.log_mel(sound.numpy(), 1e-6) for sound in heard[:1]]))
    together = torch.corrcoef(torch.stack([logarithms.flatten(), got["audio"][:1].double().flatten()]))[0, 1]
    assert float(together) > 1 - TOL[torch.float16]["rtol"]


@pytest.mark.parametrize("side", [7, 11])
def test_patches_are_crops_of_the_photographs(side):
    from sklearn.datasets import load_sample_images

    result = photo_patches(13, side)
    assert result.shape == (13, side, side)
    gray = [image.astype(np.float64).mean(axis=2) / 255 for image in load_sample_images().images]
    for patch in result[:5].double().numpy():
        assert any(contains_patch(patch, image) for image in gray)
    assert torch.equal(photo_patches(3, side), result[:3])
    assert 0 <= result.min() < result.max() <= 1


def contains_patch(patch, image):
    """Whether the patch is somewhere in the image."""
    near = TOL[torch.float32]["rtol"]
    height, width = patch.shape
    corners = np.argwhere(np.abs(image[: 1 - height, : 1 - width] - patch[0, 0]) < near)
    return any(np.abs(image[y : y + height, x : x + width] - patch).max() < near for y, x in corners)


def test_far_ood_audio_signals():
    result = synthetic_sounds(30)
    assert result.shape == (30, 5120)
    peaks = result.abs().amax(dim=1)
    assert ((peaks >= 0.1 - TOL[torch.float32]["rtol"]) & (peaks <= 0.5 + TOL[torch.float32]["rtol"])).all()
    assert (result[:, :159].abs().amax(dim=1) < TOL[torch.float64]["atol"]).all()
    assert (result[:, -159:].abs().amax(dim=1) < TOL[torch.float64]["atol"]).all()
    power = torch.fft.rfft(result.double()).abs().square()
    part = power / power.sum(dim=1, keepdim=True)
    # How many bins the power is spread over: fewest for a tone, most for noise.
    spread = torch.exp(-(part * part.clamp(min=1e-300).log()).sum(dim=1)).reshape(10, 3)
    assert (spread[:, 1] < spread[:, 2] / 5).all()
    assert (spread[:, 0] < spread[:, 2] / 2).all()
    assert spread[:, 0].median() > 3 * spread[:, 1].median()
    assert torch.equal(synthetic_sounds(5), result[:5])


def test_generation_does_not_use_the_global_rng():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data.ood_split(data.load_dataset("digits"), "far")
    assert torch.equal(torch.get_rng_state(), before)


def test_retained_classes():
    assert sample_kept_classes((), 5, "X").tolist() == [0, 1, 2, 3, 4]
    assert sample_kept_classes([3, 0, 3], 5, "X").tolist() == [1, 2, 4]


def test_hand_computed_split_by_class():
    split = data.Split({"audio": torch.arange(5.0)[:, None]}, torch.tensor([4, 2, 0, 2, 3]))
    inside, outside = split_by_class(split, torch.tensor([2, 4]))
    assert inside.target.tolist() == [1, 0, 0]
    assert inside.inputs["audio"].flatten().tolist() == [0, 1, 3]
    assert outside.target.tolist() == [0, 3]
    assert outside.inputs["audio"].flatten().tolist() == [2, 4]


@pytest.mark.parametrize("name", ["digits", "av_digits"])
@pytest.mark.parametrize("wrong", [[10], [-1, 3], ["7"], [7.0], [True], 7, "789", None])
def test_invalid_held_out_classes_raise(name, wrong):
    who = {"digits": "Digits", "av_digits": "AVDigits"}[name]
    expected = rf"{who}: expected held_out, a list of classes among 0 to 9, got held_out = .*Write it as held_out: \["
    with pytest.raises(ConfigError, match=expected):
        data.load_dataset(name, held_out=wrong)


@pytest.mark.parametrize("name", ["digits", "av_digits"])
def test_fewer_than_two_retained_classes_raise(name):
    with pytest.raises(ConfigError, match=r"expected two or more classes that are not held out, got 1 of 10\. Hold"):
        data.load_dataset(name, held_out=list(range(1, 10)))
    assert data.load_dataset("digits", held_out=list(range(2, 10))).num_outputs == 2


def test_data_without_ood_split_raises():
    full = data.load_dataset("digits")
    with pytest.raises(ConfigError, match=r"ood_split: expected a known kind, got 'nera'\. Did you mean 'near'"):
        data.ood_split(full, "nera")
    with pytest.raises(ConfigError, match=r"expected a data set with held-out classes, got Digits with none\."):
        data.ood_split(full, "near")
    assert len(data.ood_split(full, "far").test) == FAR_SAMPLES
    for other in (data.load_dataset("generated", samples=20), RandomData(("text",))):
        with pytest.raises(
            ConfigError, match=rf"ood_split: expected a data set of images and sounds, got {type(other).__name__}"
        ):
            data.ood_split(other, "far")


def test_recipe_with_held_out_classes():
    config = recipe()
    config.data["held_out"] = HELD
    assert load_run_dataset(config, None).num_outputs == 7
    config.data["held_out"] = [3, 12]
    with pytest.raises(ConfigError, match=r"data set 'digits', Digits: expected held_out, .* got held_out = \[3, 12\]"):
        load_run_dataset(config, None)
    assert recipes.load_recipe("av_digits_ood").data["held_out"] == [7, 8, 9]


@pytest.mark.parametrize("name", NAMES)
def test_data_card_code_runs(name):
    card = (Path(__file__).parents[2] / f"docs/data/{name}.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        result = {}
        exec(block, result)
    part = result["data"]
    if name == "av_digits":
        assert "# 2,791 / 698 / 3,500 pairs" in card
        assert [len(part.split(split)) for split in ("train", "val", "test")] == [2791, 698, 3500]
        assert [len(result[kind].dataset) for kind in ("near", "far")] == [1500, 1000]
