"""``equipoise diagnose`` on tiny runs: metrics, written files, and errors in one sentence."""

import json
import shutil

import numpy as np
import pytest
import torch

from equipoise.cli import run
from equipoise.diagnostics.suite import TESTS, Diagnosis
from equipoise.results import result_rows
from equipoise.results.significance import unpack_outcomes
from equipoise.training import compare
from helpers.runs import recipe, write_recipe

METHODS = ("audio", "image", "concat", "joint", "deep")
SAME = (
    "accuracy", "accuracy_noise/audio", "accuracy_noise/image", "noise_attention_r", "noise_attention_r_own",
    "share/audio", "share/image", "air", "parameters", "flops",
)  # fmt: skip


@pytest.fixture(scope="module")
def comparison_runs(tmp_path_factory):
    """The folder of the runs of a comparison."""
    folder = tmp_path_factory.mktemp("cli")
    compare(recipe(epochs=1), METHODS, seeds=1, out=folder, workers=0)
    return folder / "runs" / "all"


@pytest.fixture
def run_folder(comparison_runs):
    return lambda method: comparison_runs / method / "seed0"


def error_message(capsys, *arguments):
    assert run(["diagnose", *map(str, arguments)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("equipoise: ")
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def joint_diagnosis(comparison_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run(["diagnose", str(comparison_runs / "joint" / "seed0"), "--out", str(out)]) == 0
    return out


def test_values_match_those_written_in_training(run_folder, joint_diagnosis):
    result = Diagnosis.load(joint_diagnosis)
    trained = json.loads((run_folder("joint") / "run.json").read_text())["run"]["metrics"]
    for name in SAME:
        assert result.metrics[name] == pytest.approx(trained[name], rel=1e-5, abs=1e-6), name
    # Those of the comparison's models of one modality, not of the heads.
    for name in ("audio", "image"):
        own = json.loads((run_folder(name) / "run.json").read_text())["run"]["metrics"]["accuracy"]
        assert result.metrics[f"accuracy_alone/{name}"] == pytest.approx(own, rel=1e-6)
    assert result.details["score"]["alone_from"] == "models"
    assert result.details["response"]["modality"] == "audio"
    assert (result.name, result.seed, result.fold, result.samples) == ("joint", 0, None, 497)
    assert result.protocol["data"] == "digits"
    assert result.protocol["outside"] == "noise"
    assert "auroc" in result.metrics


def test_unimodal_models_are_compared_on_the_same_samples(run_folder, joint_diagnosis):
    each = Diagnosis.load(joint_diagnosis).details["score"]["outcomes"]
    for name in ("audio", "image"):
        own = json.loads((run_folder(name) / "run.json").read_text())["run"]["outcomes"]["accuracy"]
        assert np.array_equal(unpack_outcomes(each[f"accuracy_alone/{name}"]), unpack_outcomes(own), equal_nan=True)
    assert not any("unpaired" in verdict.text for verdict in Diagnosis.load(joint_diagnosis).verdicts)


@pytest.mark.parametrize("change", ["no outcomes", "other length", "other data", "no recipe"])
def test_unimodal_models_on_other_samples_use_their_score(change, comparison_runs, tmp_path):
    """Files of earlier versions, and runs that were tested on something else."""
    for method in ("joint", "audio", "image"):
        shutil.copytree(comparison_runs / method, tmp_path / method)
    for name in ("audio", "image"):
        folder = tmp_path / name / "seed0"
        content = json.loads((folder / "run.json").read_text())
        del content["checksum"]
        if change == "no outcomes":
            del content["run"]["outcomes"]
        elif change == "other length":
            content["run"]["outcomes"]["accuracy"] = content["run"]["outcomes"]["accuracy"][1:]
        elif change == "other data":
            write_recipe(folder / "recipe.yaml", recipe(epochs=1), data={"name": "digits", "seed": 1})
        else:
            (folder / "recipe.yaml").unlink()
        (folder / "run.json").write_text(json.dumps(content))
    assert run(["diagnose", str(tmp_path / "joint" / "seed0"), "--tests", "noise", "--outside", "none"]) == 0
    result = Diagnosis.load(tmp_path / "joint" / "seed0" / "diagnosis")
    assert result.details["score"]["alone_from"] == "models"
    assert not any("_alone/" in metric for metric in result.details["score"]["outcomes"])
    assert "accuracy_alone/audio" in result.metrics


def test_written_files(joint_diagnosis):
    assert {path.name for path in joint_diagnosis.iterdir()} == {"diagnosis.json", "results.json", "report.html"}
    (one,) = result_rows.load_results(joint_diagnosis)["runs"]
    assert one["method"] == "joint"
    assert "<h1>joint " in (joint_diagnosis / "report.html").read_text(encoding="utf-8")


def test_verdicts_are_printed(run_folder, capsys):
    folder = run_folder("deep")
    assert run(["diagnose", str(folder), "--tests", "noise, masking", "--seed", "2", "--outside", "none"]) == 0
    message = capsys.readouterr().out
    result = Diagnosis.load(folder / "diagnosis")
    for verdict in result.verdicts:
        assert verdict.text.split()[0] in message
    assert f"({result.samples} samples)" in " ".join(message.split())
    assert "diagnosing deep" in message
    assert f"report:    {folder / 'diagnosis' / 'report.html'}" in message
    assert set(result.details) == {"score", "noise", "masking"}
    assert result.protocol["noise_seed"] == 2
    assert "outside" not in result.protocol
    # The training's own results are still there.
    assert (folder / "run.json").is_file()
    shutil.rmtree(folder / "diagnosis")


def test_several_runs_side_by_side(run_folder, tmp_path, capsys):
    folders = [str(run_folder(method)) for method in ("joint", "concat", "audio")]
    assert run(["diagnose", *folders, "--out", str(tmp_path), "--tests", "noise,masking"]) == 0
    message = capsys.readouterr().out
    assert "Not tested: masking: the model has one modality" in " ".join(message.split())
    assert [one["method"] for one in result_rows.load_results(tmp_path)["runs"]] == ["joint", "concat", "audio"]
    for name in ("joint", "concat", "audio"):
        assert Diagnosis.load(tmp_path / name).name == name
    assert "Comparison of joint, concat and audio" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_results_are_deterministic(run_folder, joint_diagnosis, tmp_path):
    state = torch.get_rng_state()
    assert run(["diagnose", str(run_folder("joint")), "--out", str(tmp_path)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (json.loads((folder / "diagnosis.json").read_text()) for folder in (joint_diagnosis, tmp_path))
    assert first == second


def test_missing_run_raises(tmp_path, comparison_runs, run_folder, capsys):
    assert "expected the folder of a finished run, with run.json" in error_message(capsys, tmp_path / "nowhere")
    message = error_message(capsys, comparison_runs.parent.parent)
    assert "It contains 5 runs of a comparison; give one of them, such as" in message
    # A wrong folder is found before the first model is tested.
    assert "nowhere' without run.json" in error_message(
        capsys, run_folder("joint"), tmp_path / "nowhere", "--out", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


def test_unfinished_run_raises(run_folder, tmp_path, capsys):
    copy = shutil.copytree(run_folder("joint"), tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    assert "without model.safetensors. Give --out of equipoise train once it is done." in error_message(capsys, copy)
    (copy / "run.json").write_text('{"run": {"meth')
    shutil.copy(run_folder("joint") / "model.safetensors", copy)
    assert "expected a complete run, got JSONDecodeError" in error_message(capsys, copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tests", "noise,maskin"], "expected a known test, got 'maskin'. Did you mean 'masking'"),
        (["--tests", ","], f"expected some of {', '.join(TESTS)} after --tests, got ','"),
        (["--modality", "imag"], "expected a known modality, got 'imag'. Did you mean 'image'?"),
    ],
)
def test_invalid_options_raise(options, message, run_folder, tmp_path, capsys):
    assert message in error_message(capsys, run_folder("joint"), "--out", tmp_path / "o", *options)
    assert not (tmp_path / "o").exists()


def test_duplicate_run_raises(run_folder, capsys):
    assert "diagnose: expected each run once, got joint, seed 0, joint, seed 0" in error_message(
        capsys, run_folder("joint"), run_folder("joint")
    )


def test_nan_in_a_batch_raises(run_folder, tmp_path, capsys, monkeypatch):
    from equipoise.data.sets.digits import Digits

    plain = Digits.augment

    def augment(self, inputs, draw, *, train):
        seen = plain(self, inputs, draw, train=train)
        seen["audio"][3] = torch.nan
        return seen

    monkeypatch.setattr(Digits, "augment", augment)
    message = error_message(capsys, run_folder("joint"), "--out", tmp_path / "o")
    assert "expected logits without NaN, got NaN for 2 of 497 samples, the first is number 3" in message
    assert not (tmp_path / "o").exists()


def test_unwritable_folder_raises(run_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(["diagnose", str(run_folder("audio")), "--tests", "cost", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err
