"""Runs killed by SIGKILL resume without loss; Ctrl-C leaves complete files and no process."""

import os
import random
import signal
import time

import pytest

from equipoise.errors import ConfigError
from equipoise.results import result_rows
from equipoise.training.comparison import compare
from equipoise.training.run import execute_run
from equipoise.training.run_spec import RunSpec
from helpers.runs import (
    Forked,
    assert_same_weights,
    children,
    metrics_by_run,
    recipe,
    reproducible_metrics,
    run_program,
    weights,
    workers_of,
    write_recipe,
)
from helpers.waiting import wait_for_end, wait_until

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
METHODS = ["concat", "joint+rollingq"]
LONG = 200


@pytest.fixture(scope="module")
def uninterrupted_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return compare(recipe(), METHODS, seeds=2, out=folder, workers=0), folder


def modification_times(folder):
    """Every checkpoint and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("last.ckpt")}


@pytest.mark.slow
def test_compare_killed_three_times(uninterrupted_results, tmp_path):
    full, straight = uninterrupted_results
    config, out = write_recipe(tmp_path / "r.yaml"), tmp_path / "out"
    command = ["compare", "--config", config, "--methods", ",".join(METHODS), "--seeds", 2, "--out", out]
    rng = random.Random(20)

    def whole_results():
        if (out / "results.json").exists():
            result_rows.load_results(out)

    # The first of them has workers: everything is still to be done when they are killed.
    for several in (True, False, False):
        process = (
            run_program(*command, "--workers", 2)
            if several
            else Forked(*command, "--workers", 0, said=tmp_path / "said")
        )
        before = modification_times(out)
        running = wait_until(lambda before=before: modification_times(out) != before, process, whole_results)
        workers = children(process.pid)
        assert bool(workers) == (several and running)
        # Any moment will do.
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert wait_for_end(workers) == set()
    last = Forked(*command, "--workers", 0, said=tmp_path / "said")
    assert wait_until(lambda: False, last, whole_results) is False
    content = result_rows.load_results(out)
    assert metrics_by_run(content) == metrics_by_run(full)
    assert content["complete"] is True
    assert (out / "report.html").is_file()
    for run in ("concat/seed1", "joint+rollingq/seed0"):
        assert_same_weights(weights(straight / "runs/all" / run), weights(out / "runs/all" / run))


def test_train_killed_three_times(tmp_path):
    full = execute_run(RunSpec(recipe(), "joint+rollingq", 1), tmp_path / "uninterrupted")
    config, out = write_recipe(tmp_path / "r.yaml"), tmp_path / "out"
    command = ["train", "--config", config, "--method", "joint+rollingq", "--seed", 1, "--out", out]
    command += ["--accelerator", "cpu", "--resume"]
    rng = random.Random(3)
    for _ in range(3):
        before, process = modification_times(out), Forked(*command, said=tmp_path / "said")
        wait_until(lambda before=before: modification_times(out) != before, process)
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = Forked(*command, said=tmp_path / "said")
    message = process.communicate()
    assert process.returncode == 0, message
    assert reproducible_metrics(result_rows.load_results(out)["runs"][0]) == reproducible_metrics(full)


@pytest.mark.slow
def test_ctrl_c_in_compare(tmp_path):
    """The whole group hears it, as from a terminal, while workers still import and have not said that they are deaf."""
    config, out = write_recipe(tmp_path / "r.yaml", recipe(epochs=LONG)), tmp_path / "out"
    command = ["compare", "--config", config, "--methods", "concat,joint", "--out", out, "--workers", 2]
    process = Forked(*command, said=tmp_path / "said")
    assert wait_until(lambda: len(workers_of(process.pid)) == 2, process), process.communicate()
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate()
    assert process.returncode == 130, message
    assert "Interrupted. Finished runs are saved" in message
    assert "Traceback" not in message
    assert wait_for_end(workers) == set()
    assert result_rows.load_results(out)["complete"] is False


@pytest.mark.slow
def test_ctrl_c_in_compare_while_workers_train(tmp_path):
    config, out = write_recipe(tmp_path / "r.yaml", recipe(epochs=LONG)), tmp_path / "out"
    command = ["compare", "--config", config, "--methods", "concat,joint", "--out", out, "--workers", 2]
    process = Forked(*command, said=tmp_path / "said")
    assert wait_until(lambda: len(modification_times(out)) == 2, process)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    message = process.communicate()
    assert process.returncode == 130, message
    assert wait_for_end(workers) == set()
    assert result_rows.load_results(out)["complete"] is False


def test_ctrl_c_in_train(tmp_path):
    config, out = write_recipe(tmp_path / "r.yaml", recipe(epochs=LONG)), tmp_path / "out"
    command = ["train", "--config", config, "--method", "concat", "--out", out, "--accelerator", "cpu"]
    process = Forked(*command, said=tmp_path / "said")
    assert wait_until(lambda: modification_times(out), process)
    process.send_signal(signal.SIGINT)
    message = process.communicate()
    assert process.returncode == 130, message
    assert "Traceback" not in message


def test_killed_worker_raises_and_finished_runs_are_kept(tmp_path):
    # Long enough that the worker still trains when its first epoch is told.
    plan = recipe(epochs=30)
    compare(plan, ["image"], seeds=1, out=tmp_path, workers=0)
    known = children(os.getpid())

    def kill(job, done, epochs):
        for worker in workers_of(os.getpid()) - known:
            os.kill(worker, signal.SIGKILL)

    with pytest.raises(
        ConfigError, match=r"compare: expected running worker processes, got a worker process that was killed.*kept"
    ):
        compare(plan, ["image", "joint"], seeds=1, out=tmp_path, workers=1, listener=kill)
    assert [run["method"] for run in result_rows.load_results(tmp_path)["runs"]] == ["image"]
