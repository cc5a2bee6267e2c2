"""The data set of two rates: times, masks, balance of the label, what one stream shows, errors."""

import pytest
import torch

from equipoise.data import load_dataset
from equipoise.data.sets.two_rates import END, FRAMES, RATES, START, WIDTH
from equipoise.errors import ConfigError
from equipoise.training import method_factory, recipes


def peaks(split, name):
    """Time of the loudest frame of each sample, without noise of any weight."""
    loud = split.inputs[name].square().sum(dim=2).masked_fill(~split.mask[name], -1).argmax(dim=1)
    return split.times[name].gather(1, loud[:, None])[:, 0]


def test_label_is_the_time_between_events():
    split = load_dataset("two_rates", samples=400, strength=1000.0).train
    distance = (peaks(split, "audio") - peaks(split, "sensor")).abs()
    # Half a frame of both streams, and the jitter, between the peaks of events at the same time.
    limit = 0.5 / RATES["audio"][0] + 0.5 / RATES["sensor"][0] + 0.1
    assert (distance[split.target == 1] < limit).all()
    assert (distance[split.target == 0] > 0.4 - limit).all()
    assert distance[split.target == 1].mean() < 0.12
    assert distance[split.target == 0].mean() > 0.6
    assert 0.4 < split.target.float().mean() < 0.6


@pytest.mark.parametrize("name", FRAMES)
def test_single_stream_is_uninformative(name):
    split = load_dataset("two_rates", samples=4000, strength=1000.0).train
    when, together = peaks(split, name), split.target == 1
    for level in (0.1, 0.5, 0.9):
        assert (when[together].quantile(level) - when[~together].quantile(level)).abs() < 0.1


@pytest.mark.parametrize("name", FRAMES)
def test_times_rates_and_masks(name):
    split = load_dataset("two_rates", samples=200).train
    times, mask = split.times[name], split.mask[name]
    count = mask.sum(dim=1)
    assert torch.equal(mask, torch.arange(FRAMES[name]) < count[:, None])
    assert not times[~mask].any()
    assert not split.inputs[name][~mask].any()
    assert (times[:, 0] >= 0).all()
    assert (times[:, 0] <= START).all()
    rates = 1 / (times[:, 1] - times[:, 0])
    assert RATES[name][0] - 0.01 < rates.min() < RATES[name][0] + 0.5
    assert RATES[name][1] - 0.5 < rates.max() < RATES[name][1] + 0.01
    last = times.gather(1, count[:, None] - 1)[:, 0]
    assert (last < END).all()
    assert (last > END - START - 1 / RATES[name][0] - WIDTH).all()


def test_data_depend_on_seed_only():
    one, same, other = (load_dataset("two_rates", samples=20, seed=seed).train for seed in (3, 3, 4))
    for part in ("inputs", "times"):
        for name in FRAMES:
            assert torch.equal(getattr(one, part)[name], getattr(same, part)[name])
            assert not torch.equal(getattr(one, part)[name], getattr(other, part)[name])


@pytest.mark.parametrize("method", ["joint", "joint_time", "timed"])
def test_recipe_models(method):
    recipe, data = recipes.load_recipe("two_rates"), load_dataset("two_rates", samples=20)
    torch.manual_seed(0)
    model, _ = method_factory.build_model(method_factory.parse_method(method, recipe), recipe, data)
    assert model.encoders["audio"].uses_times == (method == "joint_time")
    batch = data.batch("train", torch.arange(4), seed=0, epoch=0, train=True)
    late = {**batch, "times": {**batch["times"], "sensor": batch["times"]["sensor"] + 0.5}}
    model.eval()
    assert torch.equal(model(batch).logits, model(late).logits) == (method == "joint")


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        ({"audoi": {}}, r"fusion 'x': expected a known encoder, got 'audoi'\. Did you mean 'audio'"),
        ({"audio": 3}, r"fusion 'x': expected a mapping of modalities to options under encoders, got \{'audio': 3\}"),
        ([1], r"fusion 'x': expected a mapping of modalities to options under encoders, got \[1\]"),
    ],
)
def test_errors_of_encoders_of_a_fusion(encoders, message):
    recipe = recipes.load_recipe("two_rates")
    recipe.fusions["x"] = {"fusion": "joint", "encoders": encoders}
    with pytest.raises(ConfigError, match=message):
        method_factory.method_recipe(method_factory.parse_method("x", recipe), recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 9}, "TwoRates: expected samples >= 10, got samples = 9"),
        ({"strength": -1.0}, r"TwoRates: expected a finite strength >= 0, got strength = -1\.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset("two_rates", **options)
