"""Weights and checkpoints: atomic writes, damaged files, and no code execution."""

import pytest
import torch

from equipoise.errors import DataError
from equipoise.training import method_factory
from equipoise.training.checkpoint import AtomicCheckpointIO, load_weights, read_state_dict, save_weights
from equipoise.training.run import execute_run, load_run_dataset
from equipoise.training.run_evaluation import evaluate_run
from helpers.runs import recipe, run_spec


def build_model(method="joint+rollingq"):
    torch.manual_seed(7)
    return method_factory.build_model(
        method_factory.parse_method(method, recipe()), recipe(), load_run_dataset(recipe(), None)
    )[0]


def test_weights_restore_the_model(tmp_path):
    this = run_spec("joint+rollingq", epochs=2)
    run = execute_run(this, tmp_path)
    model = build_model()
    load_weights(model, tmp_path / "model.safetensors")
    assert int(model.fusion.attention.core.rolling.rotations) == 1
    result = evaluate_run(model, load_run_dataset(recipe(), None), recipe())["metrics"]
    assert result == {name: run["metrics"][name] for name in result}
    assert not list(tmp_path.rglob("*.partial"))


def test_damaged_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(DataError, match=r"model\.safetensors: expected a safetensors file of weights"):
        load_weights(build_model(), path)
    save_weights(build_model(), path)
    with pytest.raises(DataError, match=r"expected weights of this model, got .* Build the model with the recipe"):
        load_weights(build_model("concat"), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="expected a safetensors file of weights, got"):
        load_weights(build_model(), path)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_checkpoint_with_code_is_not_executed(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"callbacks": Evil()}, path)
    with pytest.raises(DataError, match=r"last\.ckpt: expected a whole checkpoint, got .* Remove it to start"):
        read_state_dict(path)


def test_checkpoints_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    real = torch.save

    def dies(value, file):
        real(value, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 2}, path)
    assert read_state_dict(path) == {"epoch": 1}
