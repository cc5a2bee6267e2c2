"""The bundled digits: splits, voices and statistics match the data card."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.data.sets.digits import STEP, VOICES, VOICES_SHA256, Digits
from equipoise.errors import ConfigError
from helpers.tolerance import TOL


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def voices():
    with np.load(VOICES) as stored:
        return dict(stored)


def test_checksum_of_voices():
    assert hashlib.sha256(VOICES.read_bytes()).hexdigest() == VOICES_SHA256
    assert VOICES.stat().st_size < 4e6


def test_every_voice_has_four_recordings_of_each_digit(voices):
    message = set(zip(*(voices[part].tolist() for part in ("digit", "voice", "rendering")), strict=True))
    assert message == {(d, v, r) for d in range(10) for v in range(24) for r in range(4)}


def test_test_voices_are_not_duplicates(voices):
    levels, voice = voices["levels"].astype(float), voices["voice"]
    distance = np.array(
        [[np.abs(levels[voice == a] - levels[voice == b]).mean() for a in range(24)] for b in range(24)]
    )
    assert distance[~np.eye(24, dtype=bool)].min() * STEP > 0.9


def test_sizes_and_shapes(digits):
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1000, 300, 497)
    assert digits.shapes == {"audio": (64, 40), "image": (1, 8, 8)}
    assert digits.names == ("audio", "image")
    for split in (digits.train, digits.val, digits.test):
        assert split.target.dtype == torch.long
        assert torch.bincount(split.target, minlength=digits.num_outputs).min() >= 0.07 * len(split)


def test_training_inputs_are_standardized(digits):
    for name, values in digits.train.inputs.items():
        torch.testing.assert_close(values.mean(), torch.tensor(0.0), **TOL[torch.float32])
        torch.testing.assert_close(values.std(correction=0), torch.tensor(1.0), **TOL[torch.float32])
        assert digits.noise[name] == pytest.approx((0.0, 1.0), abs=TOL[torch.float32]["rtol"])


def recordings(split, voices, digits):
    """For every sample the position of its recording, found by comparing spectrograms."""
    train = torch.from_numpy(voices["levels"])
    flat = train.flatten(1).float()
    scaled = split.inputs["audio"].flatten(1)
    keys = torch.cat([flat, scaled])
    keys = (keys - keys.mean(dim=1, keepdim=True)) / keys.std(dim=1, keepdim=True)
    similarity = keys[len(flat) :] @ keys[: len(flat)].T / keys.shape[1]
    best = similarity.max(dim=1)
    assert best.values.min() > 0.99
    return best.indices.numpy()


def test_voices_of_splits(digits, voices):
    parts = {name: recordings(digits.split(name), voices, digits) for name in ("train", "val", "test")}
    assert not voices["held_out"][parts["train"]].any()
    assert not voices["held_out"][parts["val"]].any()
    assert voices["held_out"][parts["test"]].all()
    assert set(voices["rendering"][parts["train"]]) == {0, 1, 2}
    assert set(voices["rendering"][parts["val"]]) == {3}
    for name, rows in parts.items():
        assert (voices["digit"][rows] == digits.split(name).target.numpy()).all()
        uses = np.bincount(rows)[np.unique(rows)]
        assert uses.max() <= uses.min() + 1 + len(rows) // 100


def test_splits_share_no_images():
    raw = Digits(energy=1.0)
    rows = torch.cat([split.inputs["image"].flatten(1) for split in (raw.train, raw.val, raw.test)])
    assert len(rows.unique(dim=0)) == 1797


def test_loading_is_deterministic(digits):
    again = Digits()
    for name in ("train", "val", "test"):
        assert torch.equal(again.split(name).target, digits.split(name).target)
        for modality in digits.names:
            assert torch.equal(again.split(name).inputs[modality], digits.split(name).inputs[modality])


def test_options_reach_the_batches():
    index = torch.arange(7)
    clean = Digits(audio_noise=0.0, image_noise=0.0)
    batch = clean.batch("test", index, seed=0, epoch=0, train=False)
    assert torch.equal(batch["audio"], clean.test.inputs["audio"][index])
    assert torch.equal(batch["image"], clean.test.inputs["image"][index])
    rank = torch.linalg.matrix_rank(Digits(energy=0.25).train.inputs["image"].flatten(1)[:100].double(), rtol=1e-3)
    assert rank < torch.linalg.matrix_rank(clean.train.inputs["image"].flatten(1)[:100].double(), rtol=1e-3)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("audio_noise", -1.0, "Digits: expected a finite audio_noise >= 0, got audio_noise = -1.0"),
        ("image_noise", float("inf"), "Digits: expected a finite image_noise >= 0, got image_noise = inf"),
        ("energy", 0.0, r"expected an energy in \(0, 1\], got 0.0"),
    ],
)
def test_limits(option, value, message):
    with pytest.raises(ConfigError, match=message):
        Digits(**{option: value})


def test_data_card_class_balance(digits):
    card = (Path(__file__).parents[2] / "docs/data/digits.md").read_text()
    for name in ("train", "val", "test"):
        counts = torch.bincount(digits.split(name).target).tolist()
        assert f"| {name} | {' | '.join(map(str, counts))} |" in card
