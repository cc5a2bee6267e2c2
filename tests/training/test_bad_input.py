"""Invalid user input ends with status 1 and a one-sentence error, without a traceback."""

import gzip
import wave

import pytest
import torch

from equipoise.cli import run
from equipoise.errors import NonFiniteError
from equipoise.training import compare, recipes
from equipoise.training import run as experiment
from helpers.runs import recipe, weights, write_recipe

TEXT = recipes.dump_recipe(recipe(epochs=2))


def error_message(capfd, *arguments, status=1):
    """Returns stderr of the command as one line."""
    assert run([str(argument) for argument in arguments]) == status
    message = capfd.readouterr()
    assert "Traceback" not in message.out + message.err
    return message.err.strip()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (TEXT, "- a\n- b\n", "recipe r.yaml: expected a mapping of options, got list."),
        (TEXT, "", "expected a mapping of options, got NoneType."),
        (TEXT, "a: [1\n", "recipe r.yaml: expected YAML, got while parsing a flow sequence"),
        (TEXT, "data: !!python/object/apply:os.system ['false']", "expected YAML, got could not determine"),
        (TEXT, "encoders: {}", "recipe r.yaml: expected an entry data, got none."),
        ("name: digits", "kind: digits", "expected the name of the data set under data"),
        ("name: digits", "name: digit", "expected a known data set, got 'digit'. Did you mean 'digits'"),
        ("name: digits", "name: digits\n  audio_nois: 1.0", "expected a known option of Digits, got 'audio_nois'."),
        ("name: digits", "name: digits\n  audio_noise: loud", "expected audio_noise of type float, got 'loud'."),
        ("epochs:", "epoch:", "expected a known training option, got 'epoch'. Did you mean 'epochs'?"),
        ("epochs: 2", "epochs: two", "expected a whole number under train.epochs, got two."),
        ("epochs: 2", "epochs: -1", "train: expected epochs >= 1, got epochs = -1."),
        ("seeds: 1", "seeds: many", "expected a whole number under seeds, got many."),
        (
            "unimodal: probe", "unimodal: prob",
            "one of 'probe', 'train', 'ensemble', 'none' under train.unimodal, got prob.",
        ),
        ("clip: null", "clip: much", "expected a number or nothing under train.clip, got much."),
        ("precision: 32-true", "precision: 33-true", "train: expected a known precision, got '33-true'."),
        ("data:\n  name: digits", "data: digits", "recipe r.yaml: expected a mapping under data, got digits."),
        ("methods:\n- concat\n- joint", "methods: joint", "expected a list under methods, got joint."),
        ("    depth: 2\n", "    depth: 2\n    train: 3\n", "fusion 'deep': expected a mapping under train, got 3."),
        ("methods:", "method:", "expected a known option, got 'method'. Did you mean 'methods' or 'model'?"),
        ("PatchEncoder", "PatchEncodr", "encoder 'image': expected a known encoder, got 'PatchEncodr'. Did you mean"),
        ("patch: 4", "ptch: 4", "expected a known option of PatchEncoder, got 'ptch'. Did you mean 'patch'"),
        ("patch: 4", "patch: four", "encoder 'image': expected patch of type int, got 'four'."),
        ("patch: 4", "patch: 4\n    channels: 1\n    size: 3", "options that PatchEncoder takes, got"),
        ("  audio:", "  audi:", "expected a known modality of the data set 'digits', got 'audi'. Did you mean"),
        ("noise_modality: audio", "noise_modality: aduio", "got 'aduio'. Did you mean 'audio'?"),
        ("reference: null", "reference: conct", "got 'conct'. Did you mean 'concat'"),
        ("references: {}", "references: {joint: conct}", "method 'conct': expected a known fusion or modality"),
        (
            "references: {}", "references: {joint: ' joint'}",
            "recipe: references: expected another method to compare with, got joint:  joint. Name its control",
        ),
        ("references: {}", "references: concat", "expected a mapping under references, got concat."),
        ("fusion: joint", "fusion: jont", "expected a known fusion, got 'jont'. Did you mean 'joint'"),
        ("depth: 2", "dim: 2", "fusion 'deep': expected a known option of JointAttention, got 'dim'."),
        ("rho: 1.0", "rho: high", "expected rho of type float, got 'high'."),
        ("balancer: progressive_rollingq", "balancer: progressive", "Did you mean 'progressive_rollingq'?"),
    ],
)  # fmt: skip
def test_recipes(before, after, message, tmp_path, capfd):
    path = tmp_path / "r.yaml"
    assert before in TEXT
    path.write_text(TEXT.replace(before, after))
    methods = "concat,deep,deep+progressive,joint+rollingq"
    line = error_message(
        capfd, "compare", "--config", path, "--methods", methods, "--out", tmp_path / "o", "--workers", 0
    )
    assert message in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_encoders_of_different_width_raise(tmp_path, capfd):
    path = write_recipe(tmp_path / "r.yaml")
    line = error_message(capfd, "compare", "--config", path, "--encoders.audio.dim", 10, "--out", tmp_path / "o")
    assert line == (
        "equipoise: encoder 'image': expected the width of encoder 'audio', dim = 10, got dim = 8. "
        "Give both the same dim under encoders, such as 10."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "--methods", "joit"],
            "method 'joit': expected a known fusion or modality, got 'joit'. Did you mean",
        ),
        (
            ["compare", "--methods", "joint+rolingq"],
            "expected a known balancer, got 'rolingq'. Did you mean 'rollingq'",
        ),
        (["compare", "--methods", "concat+rollingq"], "expected a fusion whose attention sees two or more modalities"),
        (
            ["compare", "--methods", "concat+progressive"],
            "expected a fusion that can be trained in stages, got concat.",
        ),
        (["compare", "--seeds", "0"], "compare: expected at least one method and one seed, got 2 methods and 0 seeds."),
        (["compare", "--workers", "-1"], "expected workers >= 0"),
        (["compare", "--train.epochs", "-1"], "expected epochs >= 1"),
        (
            ["compare", "--folds", "A"],
            "data set 'digits': expected no fold, since it has one split, got fold 'A'. Leave",
        ),
        (["train", "--fold", "A"], "data set 'digits': expected no fold, since it has one split, got fold 'A'. Leave"),
        (["compare", "--methods", ","], "compare: expected names after --methods, separated by commas, got ','."),
        (["compare", "--methods", ""], "compare: expected names after --methods, separated by commas, got ''."),
        (["compare", "--folds", ","], "compare: expected names after --folds, separated by commas, got ','."),
        (["compare", "--accelerator", "abacus"], "train: expected options that Lightning's Trainer takes, got"),
        (["compare", "--data.energie", "1"], "got 'energie'. Did you mean 'energy'?"),
        (
            ["train", "--devices", "two", "--accelerator", "cpu"],
            "options that Lightning's Trainer takes, got `devices`",
        ),
        (["train", "--strategy", "dpp"], "got You selected an invalid strategy name: `strategy='dpp'`."),
    ],
)
def test_command_lines(arguments, message, tmp_path, capfd):
    command, *rest = arguments
    path = write_recipe(tmp_path / "r.yaml")
    assert message in error_message(capfd, command, "--config", path, "--out", tmp_path / "o", *rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "--config", "digts"],
            "expected a known recipe, got 'digts'. Did you mean 'digits' or 'av_digits' or 'av_digits_ood'?",
        ),
        (["compare", "--config", "no/digits.yaml"], "expected an existing file or the name of a packaged recipe"),
        (["compare", "--config", "."], "recipe: expected a file or the name of a packaged recipe, got the folder '.'."),
        (["recipes", "cp", "digts"], "Did you mean 'digits'"),
        (
            ["recipes", "cp"],
            "recipes cp: expected a recipe's name, got none. One of: av_digits, av_digits_ood, av_mnist",
        ),
        (["report", "nowhere"], "read 'nowhere': expected a results file, got no such file."),
    ],
)
def test_names_of_files(arguments, message, capfd):
    assert message in error_message(capfd, *arguments)


@pytest.mark.parametrize("command", ["compare", "train"])
def test_unwritable_folder_raises(command, tmp_path, capfd):
    path = write_recipe(tmp_path / "r.yaml")
    line = error_message(capfd, command, "--config", path, "--out", f"{path}/out")
    assert "expected a folder that can be written, got" in line
    assert "Not a directory" in line
    assert "no/where" in error_message(capfd, "recipes", "cp", "digits", "no/where/x.yaml")


def test_results_of_other_schema_or_truncated(tmp_path, capfd):
    (tmp_path / "results.json").write_text('{"schema": 7}')
    assert "read 'results.json': expected schema 1, got schema 7." in error_message(capfd, "report", tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 1, "runs"')
    assert "expected JSON, got a file that is truncated" in error_message(capfd, "report", tmp_path)


def test_missing_data_raise(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    line = error_message(
        capfd, "compare", "--config", "av_digits", "--data.root", tmp_path / "none", "--out", tmp_path / "o"
    )
    assert "expected a folder 'fsdd/recordings' under EQUIPOISE_DATA or root, got none in" in line
    assert "Set EQUIPOISE_DATA to the folder" in line


@pytest.mark.parametrize(
    ("rate", "cut", "message"), [(16000, 0, "a rate of 8000 Hz, got 16000 Hz"), (8000, 9, "truncated")]
)
def test_damaged_recordings_raise(rate, cut, message, tmp_path, capfd, monkeypatch):
    from equipoise.data.sets.av_digits import SPEAKERS

    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    (tmp_path / "mnist").mkdir()
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        with gzip.open(tmp_path / "mnist" / name, "wb") as file:
            file.write(b"")
    for digit in range(10):
        for speaker in SPEAKERS:
            with wave.open(str(folder / f"{digit}_{speaker}_0.wav"), "wb") as file:
                file.setparams((1, 2, rate, 0, "NONE", ""))
                file.writeframes(bytes(200))
    last = folder / f"9_{SPEAKERS[-1]}_0.wav"
    last.write_bytes(last.read_bytes()[: 244 - cut])
    monkeypatch.setenv("EQUIPOISE_DATA", str(tmp_path))
    line = error_message(capfd, "compare", "--config", "av_digits", "--out", tmp_path / "o")
    assert message in line
    assert ".wav" in line


@pytest.fixture
def corrupt_dataset(monkeypatch):
    """Digits of which one training image is NaN from the second epoch on."""
    source = experiment.load_run_dataset(recipe(), None)
    real = type(source).batch

    def batch(self, split, index, **options):
        result = real(self, split, index, **options)
        if split == "train" and options["epoch"] >= 1:
            result["image"] = result["image"].clone()
            result["image"][index == 421] = torch.nan
        return result

    monkeypatch.setattr(type(source), "batch", batch)


def test_nan_in_a_batch_raises(corrupt_dataset, tmp_path, capfd, monkeypatch):
    path = write_recipe(tmp_path / "r.yaml")
    out = tmp_path / "o"
    line = error_message(capfd, "train", "--config", path, "--method", "joint", "--out", out, "--accelerator", "cpu")
    assert "training, epoch 2, batch " in line
    assert "modality 'image': expected finite values" in line
    assert "in 1 of 250 samples, the first has index 421. Fix or drop that sample" in line
    monkeypatch.undo()
    # The checkpoint of the first epoch stays, and leads to what an undisturbed run reaches.
    assert (
        run(["train", "--config", path, "--method", "joint", "--out", str(out), "--accelerator", "cpu", "--resume"])
        == 0
    )
    experiment.execute_run(experiment.RunSpec(recipe(), "joint", 0), tmp_path / "whole")
    full, resumed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(full[name], resumed[name]) for name in full)


def test_nan_is_recorded_as_a_failed_run(corrupt_dataset, tmp_path):
    content = compare(recipe(), ["joint", "audio"], seeds=1, out=tmp_path, workers=0)
    assert [failure["kind"] for failure in content["failures"]] == [NonFiniteError.__name__]
    assert [run["method"] for run in content["runs"]] == ["audio"]


def test_absent_modality(monkeypatch, tmp_path):
    source = experiment.load_run_dataset(recipe(), None)
    real = type(source).batch

    def batch(self, *args, **options):
        result = real(self, *args, **options)
        result.pop("audio")
        return result

    monkeypatch.setattr(type(source), "batch", batch)
    content = compare(recipe(), ["joint"], seeds=1, out=tmp_path, workers=0)
    assert (
        "FusionModel 'audio': expected a batch with audio, image, got a batch with image"
        in content["failures"][0]["error"]
    )


def test_truncated_checkpoint(tmp_path, capfd):
    path, out = write_recipe(tmp_path / "r.yaml"), tmp_path / "o"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 not all of it")
    line = error_message(capfd, "train", "--config", path, "--out", out, "--resume")
    assert "last.ckpt: expected a whole checkpoint, got" in line
    assert "Remove it to start this run again." in line
