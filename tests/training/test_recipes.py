"""Recipes: loading packaged ones, dump and load round trip, errors (see also test_bad_input)."""

import math
import warnings

import pytest

from equipoise.errors import ConfigError
from equipoise.training import method_factory, recipes
from equipoise.training.comparison import plan_runs
from equipoise.training.recipes import PRECISIONS, TrainOptions
from helpers.runs import recipe


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_packaged_recipes_load_and_have_descriptions(name):
    config = recipes.load_recipe(name)
    assert recipes.load_recipe(f"{name}.yaml") == config
    assert recipes.recipe_header(recipes.find_recipe(name)).startswith(f"{name}: ")
    assert [method_factory.parse_method(method, config).name for method in config.methods] == config.methods
    # This parses both sides of its references, too.
    assert len(plan_runs(config, config.methods, 1, [])) == len(config.methods)
    if "ensemble" in config.fusions:
        assert config.references["ensemble+corruption"] == "concat_aux+corruption"


def test_recipe_round_trip(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(recipes.dump_recipe(recipe(warmup=0.2, clip=1.5)))
    assert recipes.load_recipe(path) == recipe(warmup=0.2, clip=1.5)


def test_train_is_a_mapping():
    with pytest.raises(ConfigError, match="recipe: expected a mapping under train, got 3"):
        recipes.recipe_from_dict({"data": {"name": "digits"}, "encoders": {}, "train": 3})


def test_file_overrides_packaged_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.load_recipe("digits.yaml").train.epochs != 3
    (tmp_path / "digits.yaml").write_text(recipes.dump_recipe(recipe()))
    assert recipes.load_recipe("digits.yaml").train.epochs == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("epochs", True), ("batch_size", 0), ("learning_rate", 0.0),
        ("learning_rate", math.inf), ("learning_rate", math.nan), ("weight_decay", -0.1), ("weight_decay", math.inf),
        ("warmup", 1.0), ("momentum", 1.0), ("momentum", -0.1), ("clip", 0.0), ("clip", -1.0), ("accumulate", 0),
    ],
)  # fmt: skip
def test_limits(option, value):
    with pytest.raises(ConfigError, match=rf"train: expected .*{option}.*, got {option} = {value}"):
        TrainOptions(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("clip", None), ("clip", math.inf), ("momentum", 0), ("weight_decay", 0), ("precision", "bf16-mixed")],
)
def test_values_at_the_limits(option, value):
    assert getattr(TrainOptions(**{option: value}), option) == value


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("optimizer", "adam", "Did you mean 'adamw'"),
        ("unimodal", "probes", "Did you mean 'probe'"),
        ("precision", "bf16-mix", "Did you mean 'bf16-mixed'"),
    ],
)
def test_choices(option, value, message):
    with pytest.raises(ConfigError, match=rf"train: expected a known {option}, got '{value}'\. {message}"):
        TrainOptions(**{option: value})


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if "transformer" not in name])
def test_precisions_match_lightning(precision):
    from lightning.pytorch import Trainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that only older versions recommended
        Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)


def test_number_parsed_as_string_by_yaml():
    with pytest.raises(ConfigError, match=r"got learning_rate = '1e-3'\. YAML parses 1e-3 as a string; write 1\.0e-3"):
        recipe().with_train(learning_rate="1e-3")
