"""Training and diagnosis on the published data sets: sequences with masks, windows with masked readings, and
vectors.
"""

import json
import math

import pytest
import torch

from equipoise import balance
from equipoise.balance import Balancer, BalancerList
from equipoise.cli import run
from equipoise.io.class_registry import available_classes
from equipoise.training import method_factory, recipes
from equipoise.training.run import load_run_dataset
from helpers.published_data import DATA, requires_data

SETS = [
    pytest.param("utd_mhad", marks=requires_data("utd_mhad/Inertial", "utd_mhad/Skeleton")),
    pytest.param("mosi", marks=requires_data("mosi")),
    pytest.param("occupancy_detection", marks=requires_data("occupancy")),
    pytest.param("occupancy_estimation", marks=[requires_data("occupancy"), pytest.mark.slow]),
]
BALANCERS = sorted(set(available_classes(balance, Balancer)) - {"progressive_rollingq"})


# Sequences with masks are also those of mosi.
RUNS = [pytest.param(*SETS[0].values, marks=[*SETS[0].marks, pytest.mark.slow]), *SETS[1:]]


@pytest.mark.parametrize("name", RUNS)
def test_one_epoch_and_diagnosis(name, tmp_path, capfd):
    folder = tmp_path / "run"
    command = ["train", "--config", name, "--method", "ensemble+corruption", "--train.epochs", "1", "--data.root", DATA]
    assert run([*command, "--out", str(folder)]) == 0
    metrics = json.loads((folder / "results.json").read_text())["runs"][0]["metrics"]
    names = load_run_dataset(recipes.load_recipe(name), None).names
    assert {f"accuracy_noise/{modality}" for modality in names} <= set(metrics)
    assert all(math.isfinite(metrics[f"share/{modality}"]) for modality in names)
    assert math.isfinite(metrics["noise_attention_r_own"])
    assert run(["diagnose", str(folder), "--tests", "noise,response,masking,corruption"]) == 0
    diagnosis = json.loads((folder / "diagnosis/diagnosis.json").read_text())
    assert diagnosis["skipped"] == {}
    assert diagnosis["metrics"]["accuracy"] == pytest.approx(metrics["accuracy"])
    for kind in ("accuracy_noise", "accuracy_mask", "area"):
        assert all(math.isfinite(diagnosis["metrics"][f"{kind}/{modality}"]) for modality in names)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("balancer", BALANCERS)
def test_steps_of_every_balancer(name, balancer):
    recipe = recipes.load_recipe(name)
    recipe.data["root"] = DATA
    data = load_run_dataset(recipe, None)
    torch.manual_seed(0)
    teachers = {
        modality: method_factory.build_encoder(modality, recipe.encoders[modality], data) for modality in data.names
    }
    base = "joint" if balancer == "rollingq" else "concat"
    method = method_factory.parse_method(f"{base}+{balancer}", recipe)
    model, balancers = method_factory.build_model(method, recipe, data, teachers=teachers)
    balancing = BalancerList(model, balancers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [parameter.clone() for parameter in model.parameters()]
    for epoch in range(2):
        batch = data.batch("train", torch.arange(16), seed=0, epoch=epoch, train=True)
        optimizer.zero_grad()
        loss = balancing.loss(model.train()(batch), batch["target"])
        loss.backward()
        balancing.before_step()
        optimizer.step()
        assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
