"""Command line: help, version, exit status, recipes, report, and training on two processes."""

import json
import re

import pytest

from equipoise import __version__
from equipoise.cli import run
from equipoise.cli.commands import COMMANDS
from equipoise.cli.recipe_overrides import load_with_changes, split_recipe_options
from equipoise.results import result_rows
from equipoise.training import recipes
from helpers.runs import recipe, run_program, weights, write_recipe


def exit_status(*arguments):
    """Status with which the program ends itself."""
    with pytest.raises(SystemExit) as left:
        run([str(argument) for argument in arguments])
    return left.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, capsys):
    assert exit_status(command, "--help") == 0
    examples = capsys.readouterr().out.partition("examples:\n")[2].strip("\n").split("\n")
    # Each in a line of its own.
    assert all(line.startswith(f"  equipoise {command}") for line in examples)


def test_help_lists_every_command(capsys):
    assert exit_status("--help") == 0
    message = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} ", message, re.MULTILINE) for command in COMMANDS)


def test_version(capsys):
    assert exit_status("--version") == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["compair"], ["compare", "--sedes", "3"], ["compare", "--seeds", "x"], ["recipes", "mv"]]
)
def test_usage_errors(arguments, capsys):
    assert exit_status(*arguments) == 2
    assert "error:" in capsys.readouterr().err


def test_recipes_are_listed_and_copied_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["recipes", "ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipes.recipe_names())
    assert run(["recipes", "cp", "digits"]) == 0
    assert run(["recipes", "cp", "digits", "mine.yaml"]) == 0
    assert (
        recipes.load_recipe("mine.yaml")
        == recipes.load_recipe("digits.yaml")
        == recipes.load_recipe(recipes.FOLDER / "digits.yaml")
    )
    capsys.readouterr()
    assert run(["recipes", "cp", "digits"]) == 1
    assert "recipes cp: expected a file that does not exist yet, got 'digits.yaml'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished_comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    config = write_recipe(folder / "r.yaml", recipe(epochs=1))
    arguments = [
        "compare",
        "--config",
        config,
        "--methods",
        "concat,joint",
        "--out",
        str(folder / "o"),
        "--workers",
        "0",
    ]
    assert run(arguments) == 0
    return arguments, folder / "o"


def test_compare_continues_finished_runs(finished_comparison, capsys):
    arguments, folder = finished_comparison
    before = (folder / "results.json").read_text()
    assert run(arguments) == 0
    message = capsys.readouterr().out
    assert "2 of 2 runs are already finished." in message
    assert json.loads(before)["runs"] == result_rows.load_results(folder)["runs"]
    assert (folder / "report.html").is_file()


def test_options_of_one_variant_are_combined():
    words = ["train", "--config", "transfer", "--method", "plain", "--variants.plain.width", "8"]
    rest, changes = split_recipe_options([*words, "--variants.plain.kind=cycle"], pytest.fail)
    assert rest == words[:5]
    assert load_with_changes("transfer", changes).variants["plain"] == {"width": 8, "kind": "cycle"}


def test_overrides_keep_the_rest_of_the_recipe(finished_comparison, tmp_path):
    arguments, _ = finished_comparison
    more = ["--out", str(tmp_path), "--methods", "concat", "--encoders.audio.depth", "2", "--train.batch_size", "500"]
    # Several options of one encoder hold together.
    more += ["--encoders.audio.heads=1", "--balancers.mine.balancer", "RollingQ", "--balancers.mine.rho", "1e-3"]
    assert run([*arguments, *more]) == 0
    used = recipes.load_recipe(tmp_path / "runs/all/concat/seed0/recipe.yaml")
    assert used.encoders["audio"] == {**recipe().encoders["audio"], "depth": 2, "heads": 1}
    assert used.balancers["mine"] == {"balancer": "RollingQ", "rho": 0.001}
    assert used.encoders["image"] == recipe().encoders["image"]
    assert (used.train.batch_size, used.train.epochs) == (500, 1)


@pytest.mark.parametrize("what", ["", "results.json"])
def test_report_on_a_folder_and_on_a_file(what, finished_comparison, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run(["report", str(finished_comparison[1] / what), "--out", str(page)]) == 0
    assert "<html" in page.read_text(encoding="utf-8")
    message = capsys.readouterr().out
    assert f"report:  {page}\n" in message
    assert f"results: {finished_comparison[1] / 'results.json'}\n" in message
    assert list(tmp_path.iterdir()) == [page]


def test_report_in_results_folder_has_its_image(finished_comparison, tmp_path, capsys):
    (tmp_path / "mine.json").write_text((finished_comparison[1] / "results.json").read_text())
    assert run(["report", str(tmp_path / "mine.json")]) == 0
    assert f"results: {tmp_path / 'mine.json'}\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "report.html", "summary.png"}


def test_train_does_not_overwrite_results(tmp_path, capsys):
    config, out = write_recipe(tmp_path / "r.yaml", recipe(epochs=1)), str(tmp_path / "o")
    command = ["train", "--config", config, "--method", "concat", "--accelerator", "cpu", "--out", out]
    assert run(command) == 0
    first = result_rows.load_results(tmp_path / "o")["runs"]
    capsys.readouterr()
    assert run(command) == 1
    assert "train: expected a new folder, or --resume" in capsys.readouterr().err
    assert run([*command, "--resume"]) == 0
    assert result_rows.load_results(tmp_path / "o")["runs"] == first
    capsys.readouterr()
    assert run([*command, "--resume", "--seed", "1"]) == 1
    assert "expected the recipe, method, seed and fold of the interrupted run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_match_one_process(tmp_path):
    config = write_recipe(tmp_path / "r.yaml", recipe(epochs=2), fusions={"joint": {"dropout": 0.0}})
    command = ["train", "--config", config, "--method", "joint+rollingq", "--accelerator", "cpu", "--devices"]
    process = run_program(*command, 2, "--strategy", "ddp", "--out", tmp_path / "two")
    assert run([*command, "1", "--out", str(tmp_path / "one")]) == 0
    message = process.communicate()[0]
    assert process.returncode == 0, message
    # Only the first process speaks and writes.
    assert message.count("epoch 2/2") == message.count("weights:") == 1
    assert "Warning" not in message
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert names[0] == names[1]
    one, two = (result_rows.load_results(tmp_path / name)["runs"][0] for name in ("one", "two"))
    assert [entry["rotations"] for entry in two["history"]] == [0, 1]
    for first, second in zip(one["history"], two["history"], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["air"] == pytest.approx(first["air"], abs=1e-3)
    assert two["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"], abs=0.01)
    rotations = [weights(tmp_path / name)["fusion.attention.core.rolling.rotation"] for name in ("one", "two")]
    assert float((rotations[0] - rotations[1]).abs().max()) < 1e-2


@pytest.mark.slow
@pytest.mark.distributed
def test_stages_train_in_two_processes(tmp_path):
    """Blocks of later stages get no gradient, which plain DDP does not bear."""
    config = write_recipe(tmp_path / "r.yaml", recipe(epochs=2))
    process = run_program(
        "train", "--config", config, "--method", "deep+progressive", "--accelerator", "cpu", "--devices", 2,
        "--strategy", "ddp", "--out", tmp_path / "o",
    )  # fmt: skip
    message = process.communicate()[0]
    assert process.returncode == 0, message
    (done,) = result_rows.load_results(tmp_path / "o")["runs"]
    assert [entry["balance"]["stage"] for entry in done["history"]] == [1, 2]
