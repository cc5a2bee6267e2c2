"""compare with three modalities, on every task: from the recipe to the page."""

import math
from dataclasses import replace

import pytest

from equipoise import recipes
from equipoise.train.compare import compare
from small_tasks import TASKS

METHODS = ("sensor", "concat", "concat_sgd+ogm", "joint", "joint+rollingq")


def tiny(task):
    made = recipes.read("generated").with_train(epochs=2, batch_size=20)
    small = {"dim": 8, "depth": 1, "heads": 1}
    encoders = {name: {**options, **small} for name, options in made.encoders.items()}
    rolling = {"rollingq": {"beta": 0.0, "warmup_epochs": 0}}
    return replace(made, data={**made.data, "task": task, "samples": 40}, encoders=encoders, balancers=rolling)


@pytest.fixture(scope="module", params=TASKS)
def compared(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return request.param, compare(tiny(request.param), METHODS, seeds=1, out=out, workers=0)


def test_every_method_trains(compared):
    task, content = compared
    assert content["failures"] == []
    assert [run["method"] for run in content["runs"]] == list(METHODS)
    for run in content["runs"]:
        assert all(math.isfinite(entry["loss"]) for entry in run["history"])
