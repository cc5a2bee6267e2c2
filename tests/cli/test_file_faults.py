"""Unsafe output paths, files of different runs, damaged files, full disks, and limited terminals."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import equipoise as eq
from equipoise.cli import run
from equipoise.cli.command_line import _replacement
from equipoise.errors import ConfigError, DataError, NonFiniteError, SchemaError
from equipoise.io.atomic_files import (
    atomic_write,
    check_folder,
    check_path_component,
    make_folder,
    open_atomic,
    read_json,
)
from equipoise.io.checksums import digest
from equipoise.io.interrupt_handling import is_program
from equipoise.results import result_rows
from equipoise.training import RunSpec, compare, recipes
from equipoise.training.checkpoint import AtomicCheckpointIO, check_state, read_state_dict
from helpers.fake_results import fake_results
from helpers.runs import recipe, write_recipe

SMALL = {"name": "digits"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The folder of a comparison of two methods that differ in nothing but their seeds and names."""
    folder = tmp_path_factory.mktemp("faults")
    config = write_recipe(folder / "r.yaml", recipe(epochs=1), fusions={"twin": {"fusion": "concat"}})
    words = ["compare", "--config", config, "--methods", "concat,twin", "--workers", "0", "--out", str(folder / "o")]
    assert run(words) == 0
    return folder / "o", words


@pytest.fixture
def comparison_copy(comparison, tmp_path):
    """A copy of it, the command that continues it, and the folders of its two runs."""
    out = shutil.copytree(comparison[0], tmp_path / "o")
    return out, [*comparison[1][:-1], str(out)], out / "runs/all/concat/seed0", out / "runs/all/twin/seed0"


def error_message(capfd, *words):
    assert run([str(word) for word in words]) == 1
    message = capfd.readouterr().err.strip()
    assert message.startswith("equipoise: ")
    assert len(message.splitlines()) == 1
    return message


# What a recipe may not do


@pytest.mark.parametrize(
    "part",
    [
        "data: {name: digits, audio_noise: {class_path: evilmod.x}}",
        "data: {class_path: evilmod.X, name: digits}",
        "data: {name: evilmod}",
        "encoders: {audio: {class_path: evilmod.X}, image: {}}",
        "encoders: {audio: {name: evilmod.X}, image: {}}",
        "fusions: {joint: {fusion: evilmod.X}}",
        "fusions: {joint: {class_path: evilmod.X, init_args: {}}}",
        "balancers: {rollingq: {balancer: evilmod.X}}",
        "balancers: {rollingq: {rho: {class_path: evilmod.X}}}",
        "train: {class_path: evilmod.X}",
        "train: {optimizer: {class_path: evilmod.X}}",
        "train: evilmod.X",
        "model: {name: evilmod.X}",
        "model: {name: space, class_path: evilmod.X}",
        "reference: {class_path: evilmod.X}",
        "class_path: evilmod.X",
        "seeds: !!python/object/apply:evilmod.x []",
        "seeds: !!python/name:evilmod.x",
    ],
)
def test_recipe_imports_no_code(part, tmp_path, capfd, monkeypatch):
    (tmp_path / "evilmod.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nx = X = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = {"data": "data: {name: digits}", "encoders": "encoders: {audio: {dim: 8}, image: {dim: 8, patch: 4}}"}
    lines[part.partition(":")[0]] = part
    (tmp_path / "r.yaml").write_text("\n".join([*lines.values(), "methods: [joint+rollingq]"]))
    error_message(capfd, "compare", "--config", tmp_path / "r.yaml", "--out", tmp_path / "o", "--workers", 0)
    assert "evilmod" not in sys.modules
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "o").exists()


NAMES = ["../x", "/tmp/x", "..", ".", "", "a/b", "a\\b", ".hidden", "x" * 300, "a\nb", "a+b"]


@pytest.mark.parametrize("part", ["fusions", "balancers", "encoders"])
@pytest.mark.parametrize("name", NAMES)
def test_names_in_recipes_cannot_leave_the_folder(part, name):
    with pytest.raises(ConfigError, match=r"recipe, \w+: expected a name without / .*got"):
        recipes.recipe_from_dict({"data": SMALL, "encoders": {}, part: {name: {}}})


@pytest.mark.parametrize("name", NAMES[:-1])
def test_method_and_fold_names_cannot_leave_the_folder(name, tmp_path):
    for job in (RunSpec(recipe(), name, 0), RunSpec(recipe(), "joint", 0, name)):
        if job.fold == "":
            continue  # none
        with pytest.raises(ConfigError, match=r"expected a name without / .* It becomes the name of a folder"):
            job.folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: 1\nseeds: 2", "expected each key once, got seeds twice in line 4. Remove one."),
        ("data: {name: digits, name: emoji}", "expected each key once"),
        ("seeds: null", "expected a whole number under seeds, got None"),
        ("seeds: .nan", "expected finite numbers of at most 19 digits"),
        ("seeds: " + "9" * 30, "expected finite numbers of at most 19 digits"),
        ("seeds: " + "9" * 5000, "expected YAML, got Exceeds the limit"),
        ("seeds: !!binary eA==", "got b'x'. Quote values that are strings."),
        ("seeds: 2020-01-01", "expected a whole number under seeds, got 2020-01-01"),
        ("seeds: " + "[" * 3000 + "]" * 3000, "nested at most 30 deep"),
        ("methods: [" + "1, " * 30000 + "1]", "at most 20,000 values, got more"),
        ("methods: [1]", "expected a text under methods.0, got 1"),
        ("methods: joint", "expected a list under methods, got joint"),
        ("1: 2", "got 1. Quote values that are strings."),
        ('reference: "\\ud800"', "expected"),
        ("reference: [a]", "expected a text or nothing under reference, got ['a']"),
        ("train: {learning_rate: 1e-3}", "got 1e-3. YAML parses 1e-3 as a string; write 1.0e-3."),
        ("train: {epochs: 99999999999}", "expected epochs >= 1, got epochs = 99999999999"),
        ("encoders: &e {audio: *e}", "expected aliases without recursion, got an alias that contains itself"),
        ("fusions: {joint: {dim: [x], heads: {a: 1}}}", "expected a known option of JointAttention, got 'dim'"),
        ("fusions: {joint: {heads: {a: 1}}}", "fusion 'joint': expected heads of type int, got {'a': 1}"),
        ("data: {name: digits, audio_noise: .inf}", "expected a finite number under data.audio_noise, got inf"),
        ("model: {name: [1]}", "expected a text under model.name, got [1]"),
    ],
)  # fmt: skip
def test_invalid_recipe_values_raise(text, message, tmp_path, capfd):
    base = {"data": "data: {name: digits}", "encoders": "encoders: {audio: {dim: 8}, image: {dim: 8, patch: 4}}"}
    rest = [line for name, line in base.items() if not text.startswith(f"{name}:")]
    (tmp_path / "r.yaml").write_text("\n".join([*rest, text]))
    words = ["compare", "--config", tmp_path / "r.yaml", "--out", tmp_path / "o", "--workers", 0]
    words += [] if text.startswith("methods") else ["--methods", "joint"]
    assert message in error_message(capfd, *words)


def test_yaml_alias_expansion_is_limited(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"expected at most 20,000 values, aliases written out, got more"):
        recipes.load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match=r"expected a file of at most 1,000,000 characters"):
        recipes.load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="expected YAML in UTF-8, got"):
        recipes.load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(
        "data: {name: digits}\nencoders: &e {audio: &a {dim: 8}, image: *a}\nfusions: {}\n"
    )
    assert recipes.load_recipe(tmp_path / "r.yaml").encoders["image"] == {"dim": 8}


# Where --out may lead


def output_locations(folder):
    """name -> (path, words of the error)."""
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("mine")
    (folder / "full" / "runs").mkdir()
    (folder / "file").write_text("mine")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "elsewhere").symlink_to(folder / "full")
    (folder / "locked").mkdir(mode=0o555)
    os.mkfifo(folder / "pipe")
    (folder / "inner").mkdir()
    (folder / "inner" / "runs").symlink_to(folder / "full")
    return {
        "device": (Path("/dev/null"), "expected a folder that can be written, got '/dev/null' (it is a device)"),
        "link": (folder / "dangling", "(it is a link)"),
        "folder elsewhere": (folder / "elsewhere", "(it is a link)"),
        "file": (folder / "file", "(it is a file)"),
        "below a file": (folder / "file" / "x", "(Not a directory)"),
        "pipe": (folder / "pipe", "(it is a pipe)"),
        "read-only": (folder / "locked", "(it is read-only)"),
        "below read-only": (folder / "locked" / "x" / "y", "is read-only)"),
        "foreign": (folder / "full", "expected a folder that is new, empty, or written by equipoise, got"),
        "link inside": (folder / "inner", "expected no links to the outside in"),
    }


@pytest.mark.parametrize("command", ["compare", "train", "demo", "diagnose", "look", "evaluate"])
def test_invalid_output_locations_raise(command, comparison, tmp_path, capfd):
    before = {path: (os.lstat(path).st_mode, os.lstat(path).st_mtime_ns) for path in [Path("/dev/null")]}
    words = {
        "compare": comparison[1][:-2], "train": ["train", *comparison[1][1:3], "--method", "concat"], "demo": ["demo"],
        "diagnose": ["diagnose", comparison[0] / "runs/all/concat/seed0"],
        "look": ["look", "nowhere", "--text", "x"], "evaluate": ["evaluate", "nowhere"],
    }[command]  # fmt: skip
    known = output_locations(tmp_path)
    inside = sorted(tmp_path.rglob("*"))
    for path, message in known.values():
        line = error_message(capfd, *words, "--out", path)
        assert message in line
        assert str(path) in line
    assert sorted(tmp_path.rglob("*")) == inside
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert all(os.lstat(path).st_mode == mode for path, (mode, _) in before.items())


@pytest.mark.parametrize("words", [("report", "{out}", "--out"), ("recipes", "cp", "digits")])
def test_folder_in_place_of_a_file_raises(words, comparison, tmp_path, capfd):
    known = output_locations(tmp_path)
    for name in ("device", "link", "pipe", "below a file"):
        line = error_message(capfd, *(word.format(out=comparison[0]) for word in words), known[name][0])
        assert str(known[name][0].name) in line
    assert os.path.exists("/dev/null")
    assert not os.path.isfile("/dev/null")


def test_unrelated_files_in_output_folders_are_allowed(comparison_copy, capfd):
    out, words, *_ = comparison_copy
    (out / "notes.txt").write_text("mine")
    assert run(words) == 0
    assert "2 of 2 runs are already finished." in capfd.readouterr().out


def test_unrelated_results_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('{"score": 3}')
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(ConfigError, match=r"got '.*', which holds x\.csv\. Choose another --out"):
        check_folder(tmp_path, "compare")


def test_symlinks_are_not_followed_on_write(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("r.json", f".s.json.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=r"write: expected the path of a file, got '.*', which is a link"):
        atomic_write(tmp_path / "r.json", "x")
    atomic_write(tmp_path / "s.json", "x")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "s.json").read_text() == "x"
    with pytest.raises(ConfigError, match="which is a folder"):
        atomic_write(tmp_path, "x")


def test_forbidden_folder_raises():
    with pytest.raises(ConfigError, match=r"expected a folder that can be written, got '/proc/x/y'"):
        make_folder(Path("/proc/x/y"), "train")


def test_invalid_path_raises():
    with pytest.raises(ConfigError, match="path: expected a path, got"):
        check_folder(Path("a\0b"), "train")


# Parts that do not belong together


def test_weights_of_another_run_raise(comparison_copy, capfd):
    out, words, one, other = comparison_copy
    shutil.copy(other / "model.safetensors", one)
    shutil.copy(one / "model.safetensors", other / "search.safetensors")
    # The twin has weights of the same shapes and the same seed; let them differ.
    state = load_file(one / "model.safetensors")
    save_file({name: value + 1 if value.is_floating_point() else value for name, value in state.items()},
              one / "model.safetensors")  # fmt: skip
    message = "model.safetensors: expected the weights of this run, got other weights: damaged, or copied from another"
    with pytest.raises(DataError, match=message):
        eq.load(one)
    assert message in error_message(capfd, "diagnose", one, "--out", out.parent / "d")
    assert message in error_message(capfd, *words)


@pytest.mark.parametrize(
    "change", ["patch: 4|patch: 2", "epochs: 1|epochs: 2", "name: digits|energy: 1.0\n  name: digits"]
)
def test_edited_recipe_raises(change, comparison_copy, capfd):
    _, _, one, _ = comparison_copy
    before, _, after = change.partition("|")
    text = (one / "recipe.yaml").read_text()
    text = (
        text.replace(before, after) if before in text else text.replace("name: digits", "name: digits\n  energy: 1.0")
    )
    (one / "recipe.yaml").write_text(text)
    with pytest.raises(
        DataError, match=r"recipe\.yaml: expected the recipe that this run was trained with, got another"
    ):
        eq.load(one)
    assert "expected the recipe that this run was trained with" in error_message(capfd, "diagnose", one)


def test_broken_and_commented_recipes(comparison_copy):
    _, _, one, _ = comparison_copy
    text = (one / "recipe.yaml").read_text()
    (one / "recipe.yaml").write_text(f"# mine\n{text}")
    assert eq.load(one).names == ("audio", "image")
    (one / "recipe.yaml").write_text(f"{text}\nepochs: 3\n")
    with pytest.raises(DataError, match="expected the recipe of this run; a known option, got 'epochs'"):
        eq.load(one)


@pytest.mark.parametrize("part", ["metrics", "fingerprint", "weights", "seed"])
def test_edited_run_raises(part, comparison_copy, capfd):
    out, words, one, _ = comparison_copy
    content = json.loads((one / "run.json").read_text())
    if part == "metrics":
        content["run"]["metrics"]["accuracy"] = 0.99
    elif part == "seed":
        content["run"]["seed"] = 7
    elif part == "weights":
        del content["weights"]
    else:
        content["fingerprint"] = content["fingerprint"].replace("concat", "joint")
    (one / "run.json").write_text(json.dumps(content))
    message = (
        "expected unmodified content, got content that does not match its checksum. Remove it and start the run again"
    )
    with pytest.raises(DataError, match=message):
        eq.load(one)
    assert message in error_message(capfd, "diagnose", one, "--out", out.parent / "d")
    assert message in error_message(capfd, "report", out)
    if part != "fingerprint":  # that run counts as one of another recipe, and is trained again
        assert message in error_message(capfd, *words)
    content.pop("checksum")
    content.pop("weights", None)
    content["fingerprint"] = "x"
    (one / "run.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="expected the digest of the weights, got none"):
        eq.load(one)


def test_edited_results_raise(comparison_copy, capfd):
    out, words, *_ = comparison_copy
    content = json.loads((out / "results.json").read_text())
    content["runs"][0]["metrics"]["accuracy"] = 0.99
    (out / "results.json").write_text(json.dumps(content))
    with pytest.raises(SchemaError, match="expected unmodified content, got content that does not match its checksum"):
        result_rows.load_results(out)
    assert "does not match its checksum. Delete it and run the command" in error_message(capfd, "report", out)
    result_rows.write_results(
        out / "results.json", {name: value for name, value in content.items() if name != "checksum"}
    )
    assert "results.json: expected the content of '" in error_message(capfd, "report", out)
    # The runs themselves are as they were: the next comparison writes the results anew.
    assert run(words) == 0
    assert run(["report", str(out), "--out", str(out.parent / "page.html")]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["history"].append(3), "history 1: expected a mapping, got int"),
        (lambda run: run.update(history={"epoch": 1}), "history: expected a list"),
        (lambda run: run.update(seed=True), "seed: expected int, got True"),
        (lambda run: run["metrics"].update(accuracy="x"), "metrics: expected a mapping"),
        (lambda run: run.update(shares={"clean": {"edges": [0, 1], "counts": [1, 2]}}), r"n \+ 1 increasing edges"),
        (lambda run: run.update(shares={"clean": {"edges": [1, 0], "counts": [1]}}), r"n \+ 1 increasing edges"),
        (lambda run: run.update(keys={"after": 3}), "keys.after: expected a mapping, got int"),
        (lambda run: run.update(keys={"after": {"clean": {"audio": {}}}}), "expected the entries cosine"),
    ],
)  # fmt: skip
def test_results_with_wrong_types_raise(change, message, tmp_path):
    content = fake_results(methods=("joint",), seeds=1, epochs=1)
    change(content["runs"][0])
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(SchemaError, match=rf"read 'results\.json', run 0.*{message}"):
        result_rows.load_results(tmp_path)


def test_non_finite_weights_raise(comparison_copy):
    _, _, one, _ = comparison_copy
    path = one / "model.safetensors"
    state = load_file(path)
    name = next(name for name, value in state.items() if value.is_floating_point() and "weight" in name)
    state[name].view(-1)[0] = torch.nan
    save_file(state, path)
    with pytest.raises(NonFiniteError, match=rf"model\.safetensors: expected finite weights, got NaN .*in '{name}'"):
        eq.load(one)


def test_damaged_checkpoints_raise(comparison_copy, capfd):
    _, words, one, _ = comparison_copy
    (one / "run.json").unlink()
    path = one / "checkpoints" / "last.ckpt"
    state = read_state_dict(path)
    again = ["train", *words[1:3], "--method", "concat", "--accelerator", "cpu", "--resume", "--out", one]
    path.write_bytes(b"")
    assert "last.ckpt: expected a whole checkpoint, got EOFError" in error_message(capfd, *again)
    torch.save({**state, "equipoise_checksum": "0"}, path)
    assert "got ValueError: its checksum does not match its content" in error_message(capfd, *again)
    name = next(name for name in state["state_dict"] if name.endswith("weight"))
    state["state_dict"][name].view(-1)[0] = torch.nan
    AtomicCheckpointIO().save_checkpoint(state, path)
    assert f"expected finite weights, got NaN or infinity in '{name}'" in error_message(capfd, *again)
    del state["state_dict"][name]
    AtomicCheckpointIO().save_checkpoint(state, path)
    assert f"expected the weight '{name}' of shape" in error_message(capfd, *again)
    with pytest.raises(DataError, match="expected the weight 'weight' of shape"):
        check_state(torch.nn.Linear(2, 3), path)


def test_named_pipe_in_place_of_results_raises(tmp_path, capfd):
    os.mkfifo(tmp_path / "results.json")
    assert "results.json' (it is no file)" in error_message(capfd, "report", tmp_path)
    atomic_write(tmp_path / "deep.json", "[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        read_json(tmp_path / "deep.json")


# A disk that is full


@pytest.fixture
def full_disk(tmp_path):
    """Files of more than 20 000 bytes cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, heard)


def test_full_disk_error_names_the_file_and_removes_it(full_disk):
    for name, write in {
        "a.json": lambda path: atomic_write(path, "x" * 30_000),
        "last.ckpt": lambda path: AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(30_000)}, path),
    }.items():
        with pytest.raises(OSError, match=r"File too large: '.*" + name):
            write(full_disk / name)
    with pytest.raises(OSError, match="File too large"), open_atomic(full_disk / "b") as file:
        file.write(b"x" * 30_000)
    assert list(full_disk.iterdir()) == []


def test_full_disk_in_training_raises(full_disk, comparison, capfd):
    words = ["train", *comparison[1][1:3], "--method", "concat", "--accelerator", "cpu", "--out", full_disk / "o"]
    assert "last.ckpt: File too large." in error_message(capfd, *words)
    assert [path.name for path in (full_disk / "o").rglob("*") if path.is_file()] == ["recipe.yaml"]


def test_full_disk_is_recorded_as_a_failed_run(full_disk):
    content = compare(recipe(epochs=1), ["concat"], seeds=1, out=full_disk / "o", workers=0)
    (failure,) = content["failures"]
    assert failure["error"].endswith("last.ckpt: expected a file that can be read or written, got File too large.")
    assert failure["kind"] == "DataError"


# Terminals


def start_program(*words, **options):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "equipoise", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, **options,
    )  # fmt: skip


def test_ascii_terminals_and_non_utf8_names(comparison, tmp_path):
    name = os.fsencode(tmp_path) + b"/r\xff\xe9"
    shutil.copytree(comparison[0], os.fsdecode(name))
    process = start_program("report", os.fsdecode(name))
    message, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")
    assert os.path.isfile(name + b"/report.html")
    assert rb"\udcff" in message


def test_unencodable_characters_are_replaced():
    assert "66 ± 2 % – ✓ é".encode("ascii", "replace")
    error = UnicodeEncodeError("ascii", "66 ± é", 3, 6, "no")
    assert _replacement(error) == ("+- \\xe9", 6)


def test_closed_output_pipe():
    process = start_program("recipes", "ls")
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(timeout=120) in (0, 1)


@pytest.mark.parametrize("moment", ["imports", pytest.param("work", marks=pytest.mark.slow)])
def test_ctrl_c_during_startup(moment, tmp_path):
    process = start_program(
        "compare", "--config", "digits", "--workers", "0", "--out", tmp_path / "o",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    # torch is mapped while it is imported; the lock is there once the work begins.
    seen = {
        "imports": lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(),
        "work": lambda: (tmp_path / "o" / ".lock").exists(),
    }[moment]
    while not seen():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    message, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in message + errors
    assert {"imports": b"equipoise: Stopped", "work": b"equipoise: Interrupted"}[moment] in errors


@pytest.mark.parametrize(
    ("words", "is_it"),
    [
        ("python -m equipoise demo", True), ("python -W error -m equipoise", True), ("/usr/bin/equipoise demo", False),
        ("python /usr/bin/equipoise demo", True), ("python -c x -m equipoise", False),
        ("python train.py -m equipoise", False), ("python -m pytest equipoise", False), ("python", False),
    ],
)  # fmt: skip
def test_program_invocation_is_detected(words, is_it):
    assert is_program(words.split()) is is_it


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", ""], "expected a path, got ''"), (["--out", "a\0b"], "expected a path"),
        (["--seeds", "9" * 5000], "expected a whole number, got 999"), (["--seeds", "x"], "expected a whole number"),
        (["--train.epochs"], "argument --train.epochs: expected one argument"), (["--encoders..dim=3"], "unrecognized"),
        (["--seeds=--"], "argument --seeds: expected one argument"),
        (["--meth", "joint"], "unrecognized arguments: --meth joint"),
    ],
)  # fmt: skip
def test_usage(words, message, capfd):
    with pytest.raises(SystemExit) as left:
        run(["compare", *words])
    assert left.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.a.b.c.d.e.f.g.h.i.j.k", "1"], "command line: expected at most 10 names in an option, got 12"),
        (["--train.epochs", "[1"], "--train.epochs: expected YAML, got while parsing"),
        (["--train", "{epochs: two}"], "expected a whole number under train.epochs, got two"),
        (["--data.audio_noise", "{class_path: this.x}"], "expected audio_noise of type float, got {'class_path'"),
        (["--encoders", "3"], "expected a mapping under encoders, got 3"),
        (["--methods", "../x"], "expected a known fusion or modality, got '../x'"),
        (["--folds", "../x"], "expected no fold, since it has one split, got fold '../x'"),
        (["--seeds", "100000"], "expected at most 100,000 runs"),
    ],
)  # fmt: skip
def test_invalid_values_raise(words, message, tmp_path, capfd):
    config = write_recipe(tmp_path / "r.yaml")
    assert message in error_message(
        capfd, "compare", "--config", config, "--out", tmp_path / "o", "--workers", 0, *words
    )
    assert not (tmp_path / "o").exists()


def test_internal_error_message(capfd, monkeypatch):
    monkeypatch.delenv("EQUIPOISE_TRACEBACK", raising=False)
    monkeypatch.setattr(recipes, "recipe_names", lambda: 1 / 0)
    assert "internal error: ZeroDivisionError" in error_message(capfd, "recipes", "ls")
    monkeypatch.setenv("EQUIPOISE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run(["recipes", "ls"])


def test_packaged_recipes_match_strict_yaml():
    for name in recipes.recipe_names():
        content = yaml.safe_load(recipes.find_recipe(name).read_text(encoding="utf-8"))
        assert recipes.recipe_from_dict(content) == recipes.load_recipe(name)


def test_path_parts_and_digests(tmp_path):
    assert check_path_component("joint+rollingq", "method") == "joint+rollingq"
    (tmp_path / "x").write_bytes(b"")
    assert digest(tmp_path / "x").startswith("e3b0c442")
