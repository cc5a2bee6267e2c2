"""Runs as cluster jobs; submitit's local cluster executes them in detached processes of this machine."""

import contextlib
import os
import signal

import pytest

from equipoise.errors import ConfigError
from equipoise.training import execute_run, recipes
from equipoise.training.comparison import compare
from equipoise.training.run_spec import RunSpec, is_finished
from equipoise.training.slurm_jobs import SlurmRun, run_on_slurm
from helpers.runs import assert_same_weights, children, reproducible_metrics, weights
from helpers.waiting import wait_until

submitit = pytest.importorskip("submitit")

RECIPE = recipes.load_recipe("generated").with_train(epochs=1)
OPTIONS = {"accelerator": "cpu"}


# submitit drops the handle of the process that supervises a local job while it runs.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_jobs_write_the_runs_of_compare_and_report_errors(tmp_path):
    diverging = RECIPE.with_train(optimizer="sgd", learning_rate=1e30)
    todo = [RunSpec(RECIPE, "concat", 0), RunSpec(diverging, "concat", 1)]
    finished = []
    jobs = run_on_slurm(
        todo, tmp_path / "jobs", lambda job, *epochs: finished.append(job.seed), OPTIONS, cluster="local"
    )
    results = {job.seed: result for job, result in jobs}
    assert finished == [0]
    assert is_finished(todo[0], todo[0].folder(tmp_path / "jobs")) == results[0]
    assert "NaN" in str(results[1]) or "finite" in str(results[1])
    expected = compare(RECIPE, ["concat"], seeds=1, out=tmp_path / "workers", workers=0)["runs"][0]
    for run in (expected, results[0]):
        run["metrics"].pop("seconds_per_epoch")
    assert results[0]["metrics"] == expected["metrics"]


def test_preempted_job_is_submitted_again():
    job = RunSpec(RECIPE, "concat", 0)
    run = SlurmRun(job, job.folder("folder"), OPTIONS)
    assert run.checkpoint().function is run


def test_requires_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="expected the command sbatch, got none"):
        compare(RECIPE, ["concat"], seeds=1, out=tmp_path / "out", executor="slurm")


@pytest.mark.parametrize(("options", "got"), [({"no_such_option": 1}, "no_such_option"), ({"timeout_min": "x"}, "x")])
def test_rejects_unknown_options_of_slurm(tmp_path, options, got):
    with pytest.raises(ConfigError, match=got):
        next(
            run_on_slurm(
                [RunSpec(RECIPE, "concat", 0)], tmp_path, None, OPTIONS, slurm_options=options, cluster="local"
            )
        )


def test_rejects_unknown_executors_and_misplaced_options(tmp_path):
    with pytest.raises(ConfigError, match="executor"):
        compare(RECIPE, ["concat"], seeds=1, out=tmp_path, executor="pbs")
    with pytest.raises(ConfigError, match="only with executor slurm"):
        compare(RECIPE, ["concat"], seeds=1, out=tmp_path, slurm_options={"timeout_min": 1})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_job_resumes_with_the_undisturbed_result(tmp_path):
    job = RunSpec(RECIPE.with_train(epochs=4), "joint", 0)
    expected = execute_run(job, tmp_path / "undisturbed", trainer_options=OPTIONS)
    folder, out = job.folder(tmp_path / "jobs"), tmp_path / "jobs"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    executor = submitit.AutoExecutor(folder=out / "slurm" / "%j", cluster="local")
    executor.update_parameters(timeout_min=60)
    submitted = executor.submit(SlurmRun(job, folder, OPTIONS))
    process = submitted._process
    assert wait_until(checkpoint.exists, process)
    # The job trains in a child of the process that supervises it.
    for pid in (*children(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert is_finished(job, folder) is None
    ((_, resumed),) = run_on_slurm([job], out, None, OPTIONS, cluster="local")
    assert reproducible_metrics(resumed) == reproducible_metrics(expected)
    assert_same_weights(weights(folder), weights(tmp_path / "undisturbed"))
