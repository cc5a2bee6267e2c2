"""Weighted sums of several losses."""

import math

import pytest
import torch

from equipoise.alignment.losses.loss_weighting import FixedWeights, UncertaintyWeights, uncertainty_weighted
from equipoise.errors import ConfigError

LOSSES = {"audio": torch.tensor(3.0), "image": torch.tensor(0.5), "text": torch.tensor(2.0)}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fixed(count):
    losses = dict(list(LOSSES.items())[:count])
    leaf = losses["audio"] = losses["audio"].clone().requires_grad_()
    result = FixedWeights({"audio": 0.25})(losses)
    expected = 0.25 * 3 + sum(float(loss) for name, loss in losses.items() if name != "audio")
    assert float(result.total.detach()) == pytest.approx(expected)
    result.total.backward()
    assert float(leaf.grad) == 0.25
    assert {name: float(loss) for name, loss in result.terms.items()} == {n: float(LOSSES[n]) for n in losses}
    assert not any(part.requires_grad for part in (*result.terms.values(), *result.weights.values()))
    assert float(result.weights["audio"]) == 0.25


def test_uncertainty():
    logs = {"audio": torch.tensor(0.3), "image": torch.tensor(-1.2), "text": torch.tensor(0.0)}
    expected = sum(math.exp(-float(logs[name])) * float(LOSSES[name]) + float(logs[name]) for name in LOSSES)
    assert float(uncertainty_weighted(LOSSES, logs)) == pytest.approx(expected)
    layer = UncertaintyWeights(LOSSES)
    assert float(layer(LOSSES).total.detach()) == pytest.approx(5.5)
    layer.load_state_dict({f"log_variances.{name}": value for name, value in logs.items()})
    assert float(layer(LOSSES).total.detach()) == pytest.approx(expected)
    assert float(layer({"audio": LOSSES["audio"]}).total.detach()) == pytest.approx(math.exp(-0.3) * 3 + 0.3)
    assert {n: float(w) for n, w in layer(LOSSES).weights.items()} == pytest.approx(
        {n: math.exp(-float(logs[n])) for n in logs}
    )


def test_learned_weights_become_the_inverse_losses():
    layer = UncertaintyWeights(LOSSES)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        layer(LOSSES).total.backward()
        optimizer.step()
    weights = layer(LOSSES).weights
    assert {n: float(w) for n, w in weights.items()} == pytest.approx(
        {n: 1 / float(x) for n, x in LOSSES.items()}, rel=0.01
    )


def test_missing_loss_updates_no_weight():
    layer = UncertaintyWeights(LOSSES)
    layer({"audio": LOSSES["audio"]}).total.backward()
    assert layer.log_variances["image"].grad is None


def test_nan_is_propagated():
    broken = {**LOSSES, "image": torch.tensor(math.nan)}
    assert FixedWeights({})(broken).total.isnan()
    assert UncertaintyWeights(broken)(broken).total.isnan()


def test_errors():
    with pytest.raises(ConfigError, match=r"FixedWeights 'audio': expected a weight >= 0, got -1.0"):
        FixedWeights({"audio": -1.0})
    with pytest.raises(ConfigError, match="FixedWeights 'audio': expected a weight >= 0, got nan"):
        FixedWeights({"audio": math.nan})
    with pytest.raises(ConfigError, match=r"FixedWeights: expected a known loss, got 'audi'. Did you mean 'audio'"):
        FixedWeights({"audi": 1.0})(LOSSES)
    with pytest.raises(ConfigError, match="FixedWeights: expected at least one loss, got none"):
        FixedWeights({})({})
    with pytest.raises(ConfigError, match="UncertaintyWeights: expected at least one loss, got none"):
        UncertaintyWeights([])
    with pytest.raises(ConfigError, match="UncertaintyWeights: expected a known loss, got 'depth'"):
        UncertaintyWeights(["audio"])({"depth": LOSSES["audio"]})
