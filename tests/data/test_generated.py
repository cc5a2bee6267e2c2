"""The generated data set: tasks, dependence of modalities on causes, and noise per sample."""

import re
from pathlib import Path

import pytest
import torch

from equipoise.data import load_dataset
from equipoise.data.sets.generated import CAUSE_WEIGHTS, SHAPES
from equipoise.errors import ConfigError
from helpers.tasks import TASKS


def full_batch(data, split, **options):
    index = torch.arange(len(data.split(split)))
    return data.batch(split, index, **{"seed": 0, "epoch": 0, "train": False, **options})


@pytest.mark.parametrize("task", TASKS)
def test_targets_of_all_tasks_use_the_same_causes(task):
    causes = load_dataset("generated", task="regression", samples=100).train.target
    target = load_dataset("generated", task=task, samples=100).train.target
    expected = {"classification": causes.argmax(dim=1), "multilabel": (causes > 0).float(), "regression": causes}[task]
    assert torch.equal(target, expected)


def test_data_depend_on_seed_only():
    state = torch.get_rng_state()
    one, same, other = (load_dataset("generated", samples=20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    for name in SHAPES:
        assert torch.equal(full_batch(one, "test")[name], full_batch(same, "test")[name])
        assert not torch.equal(full_batch(one, "test")[name], full_batch(other, "test")[name])


def test_training_noise_varies_by_epoch_and_evaluation_noise_is_fixed():
    data = load_dataset("generated", samples=30)
    for name in SHAPES:
        first, again = (full_batch(data, "train", train=True, epoch=epoch)[name] for epoch in (0, 1))
        assert not torch.equal(first, again)
        first, again = (full_batch(data, "val", epoch=epoch, seed=epoch)[name] for epoch in (0, 1))
        assert torch.equal(first, again)


def test_noise_level_is_a_property_of_the_sample():
    """The part of a sample that is noise is as large as its deviation says."""
    data = load_dataset("generated", samples=400, noise=3.0)
    index = torch.arange(400)
    deviations = data.deviations("train", index)
    assert deviations.shape == (400, 3)
    assert 0 <= float(deviations.min()) < 0.1
    assert 2.9 < float(deviations.max()) <= 3
    for position, (name, seen) in enumerate(list(full_batch(data, "train", train=True).items())[:3]):
        d = deviations[:, position]
        rest = seen.flatten(1) * (1 + d.square()).sqrt()[:, None] - data.train.inputs[name].flatten(1)
        # The spread of 64 or more numbers, sample by sample.
        noisy = d > 0.1
        assert float((rest.std(dim=1)[noisy] / d[noisy] - 1).abs().max()) < 0.4
        assert float(torch.corrcoef(torch.stack([rest.std(dim=1), d]))[0, 1]) > 0.9


def test_modality_depends_on_its_causes_only():
    """Least squares from the clean input finds every cause that is shown, and none that is not."""
    data = load_dataset("generated", task="regression", samples=300, noise=0.0)
    for name, shows in CAUSE_WEIGHTS.items():
        inputs, causes = data.train.inputs[name].flatten(1).double(), data.train.target.double()
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        # Of rank 6 at most: the causes shown, and the mean.
        left = causes - inputs @ torch.linalg.lstsq(inputs, causes, rcond=1e-4, driver="gelsd").solution
        result = left.square().mean(dim=0) / causes.square().mean(dim=0)
        for part, shown in zip(result.tolist(), shows, strict=True):
            assert (part < 1e-3) if shown else (part > 0.9)


def test_inputs_without_noise_are_unchanged():
    data = load_dataset("generated", samples=10, noise=0.0)
    for name in SHAPES:
        torch.testing.assert_close(full_batch(data, "train", train=True)[name], data.train.inputs[name], rtol=0, atol=0)
        assert data.noise[name] == pytest.approx((0.0, 1.0), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regresion"}, r"Generated: expected a known task, got 'regresion'\. Did you mean 'regression'"),
        ({"samples": 9}, r"Generated: expected samples >= 10, got samples = 9"),
        ({"failures": 1.5}, r"Generated: expected failures between 0 and 1, got failures = 1\.5"),
        ({"noise": -1.0}, r"Generated: expected a finite noise >= 0, got noise = -1\.0"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset("generated", **options)


def test_data_card_matches_the_data():
    card = (Path(__file__).parents[2] / "docs/data/generated.md").read_text()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), {})
    data = load_dataset("generated")
    for split in ("train", "val", "test"):
        counts = data.split(split).target.bincount().tolist()
        assert f"| {split} | {' | '.join(map(str, counts))} |" in card
    assert f"right for {100 * data.test.target.bincount().max() / len(data.test):.1f} %" in card
    causes = load_dataset("generated", task="regression").test.target
    assert f"mean absolute error of {causes.abs().mean():.3f} on" in card
    for name, shows in CAUSE_WEIGHTS.items():
        cells = " |".join(f" {weight:g}" if weight else "" for weight in shows)
        assert f"| **{name}** {SHAPES[name]} |{cells} |".replace("| |", "| |") in card


def test_failed_inputs_are_noise_alone_and_all_others_are_unchanged():
    plain, failing = (load_dataset("generated", noise=1.0, failures=rate) for rate in (0.0, 0.3))
    index = torch.arange(500)
    failed = failing.deviations("test", index) > 1
    assert failed.float().mean().item() == pytest.approx(0.3, abs=0.04)
    before, after = (data.batch("test", index, seed=0, epoch=0, train=False) for data in (plain, failing))
    clean = failing.test.inputs
    for column, name in enumerate(failing.names):
        same = (before[name] == after[name]).flatten(1).all(dim=1)
        assert torch.equal(same, ~failed[:, column])
        rows = failed[:, column]
        r = torch.corrcoef(torch.stack([after[name][rows].flatten(), clean[name][rows].flatten()]))[0, 1]
        assert abs(r) < 0.02
