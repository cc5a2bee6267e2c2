"""Loading a trained model from its run folder, and errors for invalid folders."""

import shutil

import pytest
import torch

import equipoise as eq
from equipoise.errors import DataError
from equipoise.training import compare, execute_run
from equipoise.training import run as experiment
from equipoise.training.run import load_run_dataset
from equipoise.training.run_loading import finished_run
from helpers.runs import recipe, run_spec

METHODS = ["image", "concat", "joint", "joint+rollingq", "deep+progressive", "joint+corruption+reliability"]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """method -> the folder of its run and the very model that was trained."""
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        models = []
        real = experiment.save_weights
        patch.setattr(experiment, "save_weights", lambda model, path: models.append(model) or real(model, path))
        for method in METHODS:
            folder = tmp_path_factory.mktemp("run")
            execute_run(run_spec(method, epochs=2), folder)
            result[method] = folder, models[-1].eval()
    return result


@pytest.mark.parametrize("method", METHODS)
def test_loaded_model_gives_the_same_logits(method, trained_run):
    folder, model = trained_run[method]
    state = torch.get_rng_state()
    loaded = eq.load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in loaded.modules())
    batch = load_run_dataset(recipe(), None).batch("test", torch.arange(31), seed=0, epoch=0, train=False)
    with torch.no_grad():
        expected = model(batch).logits
        assert torch.equal(loaded(batch).logits, expected)
        if "rollingq" in method:
            rolling = loaded.fusion.attention.core.rolling
            assert int(rolling.rotations) == 1
            # The rotation is part of what is compared.
            rolling.rotation.copy_(torch.eye(rolling.rotation.shape[-1]))
            assert not torch.equal(loaded(batch).logits, expected)


def test_reliability_does_not_change_training(trained_run, tmp_path):
    folder, _ = trained_run["joint+corruption+reliability"]
    loaded = eq.load(folder)
    assert isinstance(loaded, eq.Reliability)
    assert loaded.is_fitted
    assert loaded.names == ("audio", "image")
    plain = execute_run(run_spec("joint+corruption", epochs=2), tmp_path / "plain")
    weights = eq.load(tmp_path / "plain").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in loaded.model.state_dict().items())
    wrapped = finished_run(folder)
    assert wrapped["history"] == plain["history"]
    assert set(wrapped["metrics"]) >= {"accuracy", "accuracy_noise/audio", "accuracy_noise/image"}
    batch = load_run_dataset(recipe(), None).batch("test", torch.arange(31), seed=0, epoch=0, train=False)
    assert set(loaded(batch).reliability) == {"audio", "image"}


@pytest.fixture
def run_copy(trained_run, tmp_path):
    return shutil.copytree(trained_run["joint"][0], tmp_path / "copy")


def test_truncated_weights(run_copy):
    path = run_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"model\.safetensors: expected a safetensors file of weights, got"):
        eq.load(run_copy)


def test_weights_of_another_method_raise(run_copy, trained_run):
    shutil.copy(trained_run["concat"][0] / "model.safetensors", run_copy)
    with pytest.raises(DataError, match=r"model\.safetensors: expected weights of this model, got"):
        eq.load(run_copy)


@pytest.mark.parametrize("text", ['{"run": {"meth', "[]", '{"run": {"fold": null}}'])
def test_damaged_run(text, run_copy):
    (run_copy / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"load '.*run\.json': expected a complete run, got .* Remove it and start"):
        eq.load(str(run_copy))


def test_unfinished_run_raises(run_copy):
    (run_copy / "model.safetensors").unlink()
    (run_copy / "run.json").unlink()
    with pytest.raises(DataError, match=r"got '.*copy' without run\.json, model\.safetensors\. Give --out of"):
        eq.load(run_copy)
    with pytest.raises(DataError, match=r"load: expected the folder of a finished run, .*got '.*nowhere' without"):
        eq.load(run_copy / "nowhere")


def test_comparison_folder_raises(tmp_path):
    compare(recipe(epochs=1), ["audio", "image"], seeds=1, out=tmp_path, workers=0)
    with pytest.raises(DataError, match=r"It contains 2 runs of a comparison; give one .*such as '.*all/audio/seed0'"):
        eq.load(tmp_path)
    assert eq.load(tmp_path / "runs/all/image/seed0").names == ("image",)
