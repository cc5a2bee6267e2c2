"""compare: planning, reuse of finished runs, content of the results, failures, and independence of the number of
workers.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import equipoise as eq
from equipoise.errors import ConfigError, DataError
from equipoise.results import result_rows
from equipoise.results.significance import unpack_outcomes
from equipoise.training import comparison, left_out, method_factory, run_evaluation
from equipoise.training import run as experiment
from equipoise.training.comparison import compare, device, plan_runs
from helpers.runs import metrics_by_run, recipe

METHODS = ["concat", "joint", "joint+rollingq"]


@pytest.fixture(scope="module")
def finished_comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return compare(recipe(epochs=2), METHODS, seeds=2, out=folder, workers=0, title="tiny"), folder


def trained_methods(recipe, names, out, **options):
    """Which runs a comparison really trains."""
    seen = []
    content = compare(
        recipe, names, out=out, workers=0, listener=lambda job, *_: seen.append((job.method, job.seed)), **options
    )
    return content, list(dict.fromkeys(seen))


@pytest.mark.parametrize(("given", "used"), [({}, "cpu"), ({"accelerator": "auto"}, "auto")])
def test_each_run_uses_one_device(given, used, tmp_path, monkeypatch):
    met = []
    real = experiment.pl.Trainer
    monkeypatch.setattr(experiment.pl, "Trainer", lambda **options: met.append(options) or real(**options))
    compare(recipe(epochs=1), ["concat"], seeds=1, out=tmp_path, workers=0, **given)
    # The first one only shows whether the options fit together.
    assert [(options["accelerator"], options["devices"]) for options in met] == [(used, 1)] * 2


@pytest.mark.parametrize(
    ("accelerator", "there", "devices"),
    [("cpu", 3, [1] * 4), ("gpu", 1, [1] * 4), ("gpu", 0, [1] * 4), ("gpu", 3, [[0], [1], [2], [0]])],
)
def test_runs_alternate_between_devices(accelerator, there, devices, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    assert [device(accelerator, number) for number in range(4)] == [
        {"accelerator": accelerator, "devices": expected} for expected in devices
    ]


def test_results_schema(finished_comparison):
    content, folder = finished_comparison
    stored = result_rows.load_results(folder)
    written = json.loads((folder / "results.json").read_text())
    assert len(written.pop("checksum")) == 64
    assert stored == written == content
    assert stored["schema"] == 1
    assert stored["failures"] == []
    assert [(run["method"], run["seed"]) for run in stored["runs"]] == [(m, s) for m in METHODS for s in (0, 1)]
    assert stored["protocol"]["methods"] == METHODS
    assert (stored["protocol"]["recipe"], stored["protocol"]["seeds"]) == ("tiny", [0, 1])


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_present_and_in_range(finished_comparison, method):
    for run in finished_comparison[0]["runs"]:
        metrics = run["metrics"]
        if run["method"] != method:
            continue
        fractions = ["accuracy", "accuracy_noise/audio", "accuracy_noise/image", "val_accuracy"]
        if method != "concat":
            fractions += ["share/audio", "share/image"]
            assert -1 <= metrics["noise_attention_r"] <= 1
            assert -1 <= metrics["noise_attention_r_own"] <= 1
            assert metrics["noise_attention_r_own"] != metrics["noise_attention_r"]
            assert -2 <= metrics["air"] <= 2
            assert metrics["share/audio"] + metrics["share/image"] < 1 + 1e-6
            assert run["noise_modality"] == "audio"
            heads = 1
            for when in run["keys"].values():
                for histograms in when.values():
                    assert all(sum(part["cosine"]["counts"]) == 497 * heads for part in histograms.values())
            assert sum(run["shares"]["clean"]["counts"]) == 497
        assert all(0 <= metrics[name] <= 1 for name in fractions)
        assert metrics["parameters"] > 1000
        assert metrics["flops"] > metrics["parameters"]
        assert metrics["seconds_per_epoch"] > 0
        assert [entry["epoch"] for entry in run["history"]] == [1, 2]
        assert all(math.isfinite(entry["loss"]) for entry in run["history"])


def test_outcomes_of_every_test_sample_are_stored(finished_comparison):
    for run in finished_comparison[0]["runs"]:
        metrics, outcomes = run["metrics"], run["outcomes"]
        assert set(outcomes) == {"accuracy", "accuracy_noise/audio", "accuracy_noise/image"}
        for metric, packed in outcomes.items():
            assert isinstance(packed, str)
            each = unpack_outcomes(packed)
            assert each.shape == (497,)
            assert each.mean() == pytest.approx(metrics[metric], abs=1e-6)


def test_rotation_count_and_key_statistics(finished_comparison):
    for run in finished_comparison[0]["runs"]:
        if run["method"] == "joint+rollingq":
            assert [entry["rotations"] for entry in run["history"]] == [0, 1]
            assert set(run["keys"]) == {"before", "after"}


def test_statistics_are_paired(finished_comparison):
    rows = {(row["method"], row["metric"]): row for row in finished_comparison[0]["summary"]}
    row = rows["joint+rollingq", "accuracy"]
    assert (row["reference"], row["pairs"], row["n"]) == ("joint", 2, 2)
    values = {(run["method"], run["seed"]): run["metrics"]["accuracy"] for run in finished_comparison[0]["runs"]}
    gaps = [values["joint+rollingq", seed] - values["joint", seed] for seed in (0, 1)]
    assert row["difference"] == pytest.approx(sum(gaps) / 2)
    assert rows["joint", "accuracy"]["reference"] == "concat"


@pytest.mark.slow
def test_workers_do_not_change_results(finished_comparison, tmp_path):
    content = compare(recipe(epochs=2), METHODS[1:], seeds=1, out=tmp_path, workers=2)
    expected = [
        run for run in metrics_by_run(finished_comparison[0]) if run["method"] in METHODS[1:] and run["seed"] == 0
    ]
    assert metrics_by_run(content) == expected


def test_only_new_runs_are_executed(finished_comparison):
    before, folder = finished_comparison
    content, seen = trained_methods(recipe(epochs=2), METHODS, folder, seeds=2)
    assert seen == []
    assert content["runs"] == before["runs"]
    _, seen = trained_methods(recipe(epochs=2), ["concat"], folder, seeds=3)
    assert seen == [("concat", 2)]


def test_changed_recipe_is_rerun(tmp_path):
    _, seen = trained_methods(recipe(epochs=1), ["concat"], tmp_path, seeds=1)
    first = result_rows.load_results(tmp_path)
    _, again = trained_methods(recipe(epochs=1, learning_rate=0.01), ["concat"], tmp_path, seeds=1)
    assert seen == again == [("concat", 0)]
    assert result_rows.load_results(tmp_path)["runs"][0]["history"] != first["runs"][0]["history"]
    # What is merely compared with what does not change what was run.
    plan = recipe(epochs=1, learning_rate=0.01)
    plan.methods.append("joint")
    assert trained_methods(plan, ["concat"], tmp_path, seeds=1)[1] == []


@pytest.mark.parametrize("error", [DataError("sample 3", expected="sound", got="silence"), ZeroDivisionError("odd")])
def test_one_failure_does_not_stop_the_others(error, tmp_path, monkeypatch):
    real = experiment.fit_model

    def fails(model, balancers, job, *rest):
        if job.method == "joint":
            raise error
        return real(model, balancers, job, *rest)

    monkeypatch.setattr(experiment, "fit_model", fails)
    content = compare(recipe(epochs=1), ["joint", "concat"], seeds=1, out=tmp_path, workers=0)
    assert [run["method"] for run in content["runs"]] == ["concat"]
    assert content["complete"] is False
    (failure,) = result_rows.load_results(tmp_path)["failures"]
    assert (failure["method"], failure["seed"]) == ("joint", 0)
    assert str(error) in failure["error"]
    monkeypatch.undo()
    content, seen = trained_methods(recipe(epochs=1), ["joint", "concat"], tmp_path, seeds=1)
    assert seen == [("joint", 0)]
    assert (content["failures"], content["complete"]) == ([], True)


@pytest.mark.parametrize("name", ["joit", "joint+rolingq", "deep+progressiv"])
def test_unknown_names_raise_before_running(name, tmp_path):
    with pytest.raises(ConfigError, match=r"expected a known .* Did you mean"):
        compare(recipe(), ["concat", name], seeds=1, out=tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_invalid_options_raise_before_running(tmp_path):
    wrong = recipe(balancers={"rollingq": {"beeta": 1.0}})
    with pytest.raises(ConfigError, match=r"'joint\+rollingq': expected a known option of RollingQ, got 'beeta'"):
        compare(wrong, ["concat", "joint+rollingq"], seeds=1, out=tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_second_comparison_in_the_same_folder_raises(tmp_path):
    def another(job, done, epochs):
        with pytest.raises(ConfigError, match=r"for this process alone, got another process.*choose another --out"):
            compare(recipe(epochs=1), ["concat"], seeds=1, out=tmp_path, workers=0)
        met.append(job)

    met = []
    compare(recipe(epochs=1), ["concat"], seeds=1, out=tmp_path, workers=0, listener=another)
    assert len(met) == 1


@pytest.mark.parametrize(
    ("names", "seeds", "workers", "message"),
    [
        ([], 1, 0, "at least one method and one seed, got 0 methods and 1 seeds"),
        (["concat"], 0, 0, "got 1 methods and 0 seeds"),
        (["concat"], 1, -1, "expected workers >= 0, got workers = -1"),
    ],
)
def test_invalid_plans_raise(names, seeds, workers, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        compare(recipe(), names, seeds=seeds, out=tmp_path, workers=workers)


def test_state_is_read_once_and_each_input_is_predicted_once(tmp_path, monkeypatch):
    passes, states = [], []
    collect, finished = run_evaluation.collect_predictions, comparison.is_finished
    monkeypatch.setattr(
        run_evaluation, "collect_predictions",
        lambda model, batches, *, noise=None: passes.append(noise) or collect(model, batches, noise=noise),
    )  # fmt: skip
    monkeypatch.setattr(comparison, "is_finished", lambda *job: states.append(job) or finished(*job))
    begun = []
    for _ in range(2):
        compare(
            recipe(epochs=1), ["concat", "joint"], seeds=1, out=tmp_path, workers=0,
            begin=lambda plan, done: begun.append((len(plan), len(done))),
        )  # fmt: skip
    # Clean, and noise in each modality, for both; only attention also has noise of each sample's own level.
    named = [noise and (noise.modality, noise.distribution) for noise in passes]
    each = [None, ("audio", "dataset"), ("image", "dataset")]
    assert named == [*each, *each, ("audio", "per_sample")]
    assert len(states) == 4
    assert begun == [(2, 0), (2, 2)]


def test_plan_is_ordered_by_seed():
    plan = plan_runs(recipe(), ["concat", "joint", "concat"], 2, ["A", "B"])
    order = [(job.seed, job.fold, job.method) for job in plan]
    assert order == [(s, f, m) for s in (0, 1) for f in "AB" for m in ("concat", "joint")]
    assert len({job.folder(Path("x")) for job in plan}) == 8


def test_one_kind_of_corruption_is_excluded(tmp_path):
    config = replace(recipe(epochs=1, balancers={"reliability": {"corruptions": ["blur", "zeros"]}}), left_out=["blur"])
    method = "concat+corruption+reliability"
    content = compare(config, [method], seeds=1, out=tmp_path, workers=0)
    assert content["protocol"]["left_out"] == ["blur"]
    source = experiment.load_run_dataset(config, None)
    loaded = eq.load(tmp_path / "runs" / "all" / method / "seed0")
    found = eq.diagnostics.robustness(
        loaded, list(eq.data.loader(source, "test", 256, seed=0, train=False)), corruptions=["blur"],
        severities=[1, 3, 5], statistics=source.noise,
    )  # fmt: skip
    for name in found.names:
        assert content["runs"][0]["metrics"][f"accuracy_corrupted/{name}"] == pytest.approx(found.mean(name))
    parsed = method_factory.parse_method(method, config)
    _, (balancer,) = method_factory.build_model(parsed, config, source)
    assert "blur" not in balancer.corruptions
    assert {"white_noise", "zeros"} < set(balancer.corruptions)
    assert left_out.without_left_out(config.balancers["reliability"], config) == {"corruptions": ["zeros"]}
    with pytest.raises(ConfigError, match="expected a corruption that remains"):
        left_out.without_left_out({"corruptions": ["blur"]}, config)
    with pytest.raises(ConfigError, match=r"expected corruptions that fit the data: .* got replaced"):
        compare(replace(recipe(), left_out=["replaced"]), ["concat"], seeds=1, out=tmp_path, workers=0)
