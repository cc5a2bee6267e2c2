"""Recipes of self-contained models: building, training, resuming, comparing and loading."""

from dataclasses import replace

import pytest
import torch

import equipoise as eq
from equipoise.cli import run
from equipoise.errors import ConfigError, NonFiniteError
from equipoise.report import page
from equipoise.training import compare, method_factory, recipes
from equipoise.training.loop import TrainingLoop
from equipoise.training.loss_module import SelfContainedTraining
from equipoise.training.run import execute_run, load_run_dataset
from equipoise.training.run_spec import RunSpec
from helpers.runs import assert_same_weights, reproducible_metrics, run_interrupted, weights, write_recipe


def recipe(**train):
    """A shared space of three modalities, tiny."""
    config = recipes.Recipe(
        data={"name": "generated", "samples": 60},
        encoders={
            "audio": {"name": "SequenceEncoder", "dim": 8, "depth": 1, "heads": 2, "stride": 8},
            "image": {"name": "PatchEncoder", "dim": 12, "depth": 1, "heads": 2, "patch": 4},
            "sensor": {"name": "SequenceEncoder", "dim": 8, "depth": 1, "heads": 2, "stride": 8},
        },
        model={"name": "dual_encoder", "dim": 5, "dropout": 0.2},
        variants={"softmax": {}, "sigmoid": {"loss": "siglip", "train": {"epochs": 2}}},
        methods=["softmax", "sigmoid"],
        seeds=1,
    )
    return config.with_train(**{"epochs": 3, "batch_size": 20, **train})


def test_resume_matches_uninterrupted_run(tmp_path):
    job = RunSpec(recipe(), "softmax", 0)
    straight = execute_run(job, tmp_path / "straight")
    resumed = run_interrupted(job, tmp_path / "resumed", 1, 3)
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert reproducible_metrics(resumed) == reproducible_metrics(straight)
    assert [entry["epoch"] for entry in straight["history"]] == [1, 2, 3]
    # Three pairs of modalities, each logged by its name, and their sum.
    last = straight["history"][-1]
    assert sum(last[f"loss/{pair}"] for pair in ("audio-image", "audio-sensor", "image-sensor")) == pytest.approx(
        last["loss"], rel=1e-5
    )
    assert last["val_loss"] > 0


def test_trained_model_is_loaded(tmp_path):
    job = RunSpec(recipe(epochs=1), "softmax", 0)
    done = execute_run(job, tmp_path)
    model = eq.load(tmp_path)
    assert not model.training
    again = model.evaluate(load_run_dataset(job.recipe, None))["metrics"]
    assert {name: done["metrics"][name] for name in again} == again


def test_variant_training_options_are_used(tmp_path):
    assert len(execute_run(RunSpec(recipe(), "sigmoid", 0), tmp_path)["history"]) == 2


def test_fingerprint_ignores_other_variants():
    one = RunSpec(recipe(), "softmax", 0)
    other = RunSpec(replace(recipe(), variants={"softmax": {}}), "softmax", 0)
    changed = RunSpec(replace(recipe(), variants={"softmax": {"scale": 3.0}}), "softmax", 0)
    assert one.fingerprint() == other.fingerprint() != changed.fingerprint()
    plain = recipes.Recipe(data={"name": "digits"}, encoders={})
    assert '"model"' not in RunSpec(plain, "concat", 0).fingerprint()


def test_variants_are_compared_by_the_model_score(tmp_path):
    content = compare(recipe(epochs=1), ["softmax", "sigmoid"], seeds=2, out=tmp_path, workers=0, title="dual encoders")
    assert content["complete"]
    assert content["protocol"]["score"] == "recall@1"
    rows = {(row["method"], row["metric"]) for row in content["summary"]}
    assert ("sigmoid", "audio_to_image/recall@5") in rows
    drawn = page(content)
    assert "highest mean recall at 1" in drawn
    assert "Recall@1" in drawn or "Recall at 1" in drawn


def test_commands_train_compare_and_diagnose_error(tmp_path, capsys):
    file = write_recipe(tmp_path / "mine.yaml", recipe(epochs=1))
    out = str(tmp_path / "out")
    assert run(["train", "--config", file, "--method", "softmax", "--out", out, "--accelerator", "cpu"]) == 0
    assert "recall at 1" in capsys.readouterr().out
    assert run(["train", "--config", file, "--method", "softmax", "--out", out, "--variants.softmax.scale", "2.0"]) == 1
    assert "expected a new folder, or --resume" in capsys.readouterr().err
    assert run(["diagnose", out]) == 1
    assert "expected a run of a fusion" in capsys.readouterr().err


def test_variant_option_does_not_affect_others(tmp_path):
    file = write_recipe(tmp_path / "mine.yaml", recipe(epochs=1))
    out = tmp_path / "out"
    run(["train", "--config", file, "--method", "sigmoid", "--out", str(out), "--accelerator", "cpu",
         "--variants.softmax.scale", "2.0"])  # fmt: skip
    assert recipes.load_recipe(out / "recipe.yaml").variants["sigmoid"] == {"loss": "siglip", "train": {"epochs": 2}}


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("softmax+ogm", r"expected a variant of the recipe's model, got balancers, which are for fusions"),
        ("sofmax", "expected a known variant, got 'sofmax'. Did you mean 'softmax'"),
    ],
)
def test_methods_are_variants(method, error, tmp_path):
    with pytest.raises(ConfigError, match=error):
        execute_run(RunSpec(recipe(), method, 0), tmp_path)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": {"dim": 3}}, "expected the name of a model under model"),
        ({"model": {}}, "expected variants of a model, got variants without model"),
    ],
)
def test_ambiguous_recipes_raise(changes, error, tmp_path):
    with pytest.raises(ConfigError, match=error):
        recipes.load_recipe(write_recipe(tmp_path / "bad.yaml", recipe(), **changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": {"name": "dual_encodr"}}, "Did you mean 'dual_encoder'"),
        ({"model": {"name": "dual_encoder", "dimm": 3}}, "variant 'softmax'.*'dimm'.*Did you mean 'dim'"),
        ({"data": {"name": "generated", "task": "multilabel"}}, "expected data with one item per sample"),
        ({"encoders": {"audio": {"name": "SequenceEncoder", "dim": 8}}}, "expected two or more modalities"),
    ],
)
def test_invalid_models_raise(changes, error, tmp_path):
    with pytest.raises(ConfigError, match=error):
        execute_run(RunSpec(replace(recipe(), **changes), "softmax", 0), tmp_path)


def test_nan_error_names_the_modality():
    source = load_run_dataset(recipe(), None)
    model, _ = method_factory.build_model(method_factory.parse_method("softmax", recipe()), recipe(), source)
    module = SelfContainedTraining(model, recipe().train)
    assert isinstance(module, TrainingLoop)
    batch = source.batch("train", torch.arange(5), seed=0, epoch=0, train=True)
    batch["sensor"][3] = float("nan")
    with pytest.raises(NonFiniteError, match="sensor"):
        module.compute_loss(batch)
