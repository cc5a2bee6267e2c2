"""benchmarks/paper_tables.py: the figures of finished runs, in the rows of the paper."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import equipoise as eq
from equipoise import data
from equipoise.diagnostics.corruption_test import corruption_curve
from equipoise.diagnostics.ood_metrics import auroc, fpr95
from equipoise.diagnostics.quag_test import quag
from equipoise.errors import ConfigError, DataError
from equipoise.training.run import execute_run
from equipoise.training.run_spec import RunSpec
from helpers.runs import recipe
from helpers.tolerance import TOL

RUNS = [("joint", 0), ("joint", 1), ("joint+rollingq", 0), ("deep", 0), ("deep+progressive", 0), ("audio", 0)]
HELD = [7, 8, 9]
SHORT = {"limit_train_batches": 1}
CLOSE = TOL[torch.float32]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("paper_tables")


@pytest.fixture(scope="module")
def cells(script):
    return importlib.import_module("paper_cells")


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """A comparison on digits and one without three of them, of models that have hardly learned anything."""
    full, part = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("part")
    config = recipe(epochs=2)
    for method, seed in RUNS:
        job = RunSpec(config, method, seed)
        execute_run(job, job.folder(full), trainer_options=SHORT)
    job = RunSpec(replace(config, data={"name": "digits", "held_out": HELD}), "joint", 0)
    execute_run(job, job.folder(part), trainer_options=SHORT)
    return full, part


def stored(folder, method, seed=0):
    return json.loads((folder / f"runs/all/{method}/seed{seed}/run.json").read_text())["run"]["metrics"]


def table(script, number):
    return next(table for table in (*script.TABLES, script.OOD_TABLE) if table.number == number)


def test_noise_settings_match_the_runs(script, finished_runs):
    result = script.measure(table(script, "2"), finished_runs[0], "all", None)
    assert {method: sorted(own["r"]) for method, own in result.items()} == {"joint": [0, 1], "joint+rollingq": [0]}
    for method, own in result.items():
        for seed, r in own["r"].items():
            assert r == pytest.approx(stored(finished_runs[0], method, seed)["noise_attention_r"], rel=CLOSE["rtol"])
            t = r * math.sqrt((2 * 497 - 2) / (1 - r * r))
            # Beyond 2.58 standard deviations lies 1 % of both sides.
            assert own["sure"][seed] == float(abs(t) > 2.58)


def test_levels_start_at_clean_accuracy(script, finished_runs):
    result = script.measure(table(script, "3"), finished_runs[0], "all", 1)["joint"]
    assert list(result) == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert result["0.00"] == {0: pytest.approx(stored(finished_runs[0], "joint")["accuracy"])}
    source = data.load_dataset("digits")
    served = data.loader(source, "test", 256, seed=0, train=False)
    std = source.noise["audio"][1]
    curve = corruption_curve(eq.load(finished_runs[0] / "runs/all/joint/seed0"), served, modality="audio", std=std)
    assert [own[0] for own in result.values()] == list(curve.accuracy)


def test_masking_names_the_remaining_modality(script, finished_runs):
    result = script.measure(table(script, "8"), finished_runs[0], "all", None)
    source, model = data.load_dataset("digits"), eq.load(finished_runs[0] / "runs/all/joint/seed1")
    batch = source.batch("test", torch.arange(497), seed=0, epoch=0, train=False)
    for kept in (["audio", "image"], ["audio"], ["image"]):
        with torch.no_grad():
            answer = model({name: batch[name] if name in kept else None for name in source.names}).logits.argmax(dim=1)
        name = "full" if len(kept) == 2 else kept[0]
        assert result["joint"][name][1] == pytest.approx(float((answer == batch["target"]).float().mean()))
    assert result["audio"]["accuracy"] == {0: stored(finished_runs[0], "audio")["accuracy"]}
    assert "image" not in result


def test_quag_uses_two_layers(script, finished_runs):
    result = script.measure(table(script, "9"), finished_runs[0], "all", None)
    assert set(result) == {"deep", "deep+progressive"}
    for method, own in result.items():
        served = data.loader(data.load_dataset("digits"), "test", 256, seed=0, train=False)
        direct = quag(eq.load(finished_runs[0] / f"runs/all/{method}/seed0"), served)
        assert own["origin"][0] == direct.origin == pytest.approx(stored(finished_runs[0], method)["accuracy"])
        for name in ("unimodal", "crossmodal", "avg-audio", "avg-image"):
            assert own[name][0] == direct.scores[name]
    text = script.measure(table(script, "9, text"), finished_runs[0], "all", 1)
    assert set(text) == {"joint", "joint+rollingq"}
    assert set(text["joint"]) == {"origin", "all"}


def gen(logits):
    """Negative generalized entropy, computed with a loop over samples."""
    rows = logits.double().softmax(dim=1).tolist()
    return torch.tensor([-sum((p * (1 - p)) ** 0.1 for p in row) for row in rows], dtype=torch.float64)


def test_unknown_classes_are_the_held_out_classes(script, finished_runs):
    result = script.measure(table(script, "10"), finished_runs[1], "all", None)["joint"]
    assert result["accuracy"][0] == pytest.approx(stored(finished_runs[1], "joint")["accuracy"])
    source, model = data.load_dataset("digits", held_out=HELD), eq.load(finished_runs[1] / "runs/all/joint/seed0")
    seen = {}
    for name, shown in (("known", source), *((kind, data.ood_split(source, kind)) for kind in ("near", "far"))):
        batch = shown.batch("test", torch.arange(len(shown.test)), seed=0, epoch=0, train=False)
        with torch.no_grad():
            seen[name] = gen(model(batch).logits)
    for kind, size in (("near", 137), ("far", 1000)):
        assert len(seen[kind]) == size
        near = {"abs": CLOSE["rtol"] * 100}
        assert result[f"auroc/{kind}"][0] == pytest.approx(auroc(seen["known"], seen[kind]), **near)
        assert result[f"fpr95/{kind}"][0] == pytest.approx(fpr95(seen["known"], seen[kind]), abs=2 / 360)


def test_hand_computed_cells(script, cells):
    result = replace(table(script, "3"), alone={"0.25": ("audio", 53.9)})
    figures = {
        "joint": {"0.00": {0: 0.5, 1: 0.7, 2: 0.6}, "0.25": {0: 0.4, 1: 0.5, 2: 0.6}},
        "joint+rollingq": {"0.00": {1: 0.8, 2: 0.5}, "0.25": {2: 0.65}},
        "audio": {"accuracy": {0: 0.3, 1: 0.4}},
    }
    head, clean, first, second, *_ = cells.rows(result, figures)
    names = ["`joint`", "paper", "`joint+rollingq`", "paper", "difference", "paper", "`ensemble+corruption`"]
    assert head == ["", *names, "alone", "paper"]
    assert clean == [
        "level 0.00", "60.0 ± 10.0", "67.0", "65.0 ± 21.2", "69.3", "+0.0 (higher on 1 of 2)", "+2.3", "", "", "",
    ]  # fmt: skip
    assert first == [
        "level 0.25", "50.0 ± 10.0 (−10.0)", "62.7 (−4.3)", "65.0 (+15.0)", "67.2 (−2.1)", "+5.0 (higher on 1 of 1)",
        "+4.5", "", "35.0 ± 7.1", "53.9",
    ]  # fmt: skip
    assert second[1::2] == ["", "", "", "", ""]


def test_unscaled_and_nan_values(script, cells):
    figures = {"joint": {"r": {0: -0.25, 1: math.nan}}, "joint+rollingq": {"r": {0: 0.5, 1: 0.1}}}
    _, r, _ = cells.rows(table(script, "2"), figures)
    assert r == [
        "r", "−0.25", "0.52 / 0.44", "0.30 ± 0.28", "0.76 / 0.78", "+0.75 (higher on 1 of 1)", "+0.24 / +0.34", "",
    ]  # fmt: skip


def test_published_drops_and_differences(script, cells):
    def column(number, index):
        return [row[index] for row in cells.rows(table(script, number), {})[1:]]

    assert column("3", 2) == ["67.0", "62.7 (−4.3)", "52.9 (−14.1)", "43.2 (−23.8)", "34.7 (−32.3)"]
    # It prints −1.9 for the first level, which its own figures contradict.
    assert column("3", 4) == ["69.3", "67.2 (−2.1)", "58.2 (−11.1)", "47.5 (−21.8)", "40.6 (−28.7)"]
    assert column("8", 2) == ["67.0", "46.6", "40.3"]
    assert column("8", 4) == ["69.3", "47.4", "42.1"]
    assert column("8", 9) == ["", "53.9", "57.0"]
    assert column("9", 2) == ["69.1", "67.8 (−1.3)", "65.5 (−3.6)", "64.8 (−4.3)", "65.6 (−3.5)"]
    assert column("9", 4) == ["70.1", "63.8 (−6.3)", "63.8 (−6.3)", "62.9 (−7.2)", "62.1 (−8.0)"]
    assert column("9, text", 2) == ["48.8 / 67.0", "46.5 (−2.3) / 68.2 (+1.2)"]
    assert column("9, text", 4) == ["51.9 / 69.3", ""]
    assert column("10", 2) == ["51.6 / 48.7", "77.3", "64.4", "77.9", "70.4"]
    assert column("10", 4) == ["54.0 / 51.8", "74.9", "68.6", "76.9", "73.2"]


def test_program_prints_tables_and_progress(script, cells, finished_runs, capsys):
    threads = torch.get_num_threads()
    try:
        script.main([str(finished_runs[0]), "--ood", str(finished_runs[1]), "--seeds", "1"])
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert [line.split(".")[0] for line in out.splitlines() if line.startswith("##")] == [
        f"## Table {number}" for number in ("2", "3", "8", "9", "9, text", "10")
    ]
    assert "Ours: digits. Seeds: `joint` 0; `joint+rollingq` 0. Paper: KS." in out
    assert "Ours: digits, without the classes 7, 8, 9. Seeds: `joint` 0. Paper: HMDB51." in out
    assert "Data and model size differ from the paper" in out.splitlines()[0]
    assert err.splitlines()[:2] == ["table 2: joint, seed 0", "table 2: joint+rollingq, seed 0"]
    for block in out.split("## ")[1:]:
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) == 1
    accuracy = 100 * stored(finished_runs[0], "joint")["accuracy"]
    assert f"| level 0.00 | {accuracy:.1f} | 67.0 |" in out


def test_no_finished_runs(script, cells):
    assert "Seeds: none is finished." in cells.markdown(table(script, "9"), {}, "digits")


def test_invalid_comparison_folder_raises(script, tmp_path):
    with pytest.raises(DataError, match=r"paper_tables: expected the folder of a comparison, with runs/<fold>/.*Give"):
        script.fold_of(tmp_path, None)
    for fold in "AB":
        (tmp_path / "runs" / fold).mkdir(parents=True)
    assert script.fold_of(tmp_path, "B") == "B"
    with pytest.raises(ConfigError, match="paper_tables: expected one of the folds A, B, got no --fold"):
        script.fold_of(tmp_path, None)
    with pytest.raises(ConfigError, match="expected one of the folds A, B, got --fold C"):
        script.fold_of(tmp_path, "C")
