"""Packaged recipes of self-contained models train."""

from dataclasses import replace

import pytest

from equipoise.training import RunSpec, execute_run
from equipoise.training.recipes import load_recipe, recipe_names

SMALL = {"scenes": {"samples": 128}}
RECIPES = [name for name in recipe_names() if load_recipe(name).model and load_recipe(name).data["name"] != "manifest"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name, tmp_path):
    recipe = load_recipe(name).with_train(epochs=1, batch_size=8)
    recipe = replace(recipe, data={**recipe.data, **SMALL.get(recipe.data["name"], {})})
    job = RunSpec(recipe, recipe.methods[0], seed=0, fold=next(iter(recipe.folds), None))
    options = {"limit_train_batches": 2, "limit_val_batches": 1}
    assert execute_run(job, tmp_path, trainer_options=options, evaluate=False) is None
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
