"""Tiny recipes and runs on the bundled digits, for the tests of training, comparison and the command line."""

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equipoise import data
from equipoise.cli import run
from equipoise.data.dataset import Dataset, Split, split_statistics
from equipoise.training import recipes
from equipoise.training.run import execute_run
from equipoise.training.run_spec import RunSpec

ENCODERS = {
    "audio": {"name": "SequenceEncoder", "dim": 8, "depth": 1, "heads": 2, "stride": 16},
    "image": {"name": "PatchEncoder", "dim": 8, "depth": 1, "heads": 2, "patch": 4},
}
DEEP = {"deep": {"fusion": "joint", "depth": 2, "heads": 1}, "still": {"fusion": "joint", "dropout": 0.0}}
ROLLING = {"rho": 1.0, "beta": 0.0, "max_rotations": 1, "warmup_epochs": 1}
BALANCERS = {"rollingq": ROLLING, "progressive": {"balancer": "progressive_rollingq", "beta": 0.0}}


def recipe(*, balancers=None, **train):
    """Returns a recipe with encoders of width 8, a batch size of 250 and the given training options."""
    config = recipes.Recipe(
        data={"name": "digits"},
        encoders=ENCODERS,
        methods=["concat", "joint"],
        seeds=1,
        fusions=DEEP,
        balancers={**BALANCERS, **(balancers or {})},
        noise_modality="audio",
    )
    return config.with_train(**{"epochs": 3, "batch_size": 250, **train})


def write_recipe(path, base=None, /, **changes):
    """Writes a recipe and returns its path."""
    path.write_text(recipes.dump_recipe(replace(base or recipe(), **changes)), encoding="utf-8")
    return str(path)


def reproducible_metrics(run):
    """Returns the reproducible metrics of a run: all except times."""
    metrics = {name: value for name, value in run["metrics"].items() if name != "seconds_per_epoch"}
    return {**run, "metrics": metrics}


def metrics_by_run(content):
    """Returns the reproducible metrics of every run."""
    return [reproducible_metrics(run) for run in content["runs"]]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name].nan_to_num(9.0), other[name].nan_to_num(9.0))]
    assert not different


class Interruption(Exception):
    """Simulates a crash."""


def run_interrupted(job, folder, *moments):
    """Runs training, interrupts it at the given points, and resumes it."""
    for moment in moments:

        def crash(done, epochs, moment=moment):
            if done == moment:
                raise Interruption

        with pytest.raises(Interruption):
            execute_run(job, folder, progress=crash)
    return execute_run(job, folder)


def run_spec(method="joint", *, seed=0, balancers=None, **train):
    return RunSpec(recipe(balancers=balancers, **train), method, seed)


def run_program(*arguments, **options):
    """Runs the program in a separate process."""
    return subprocess.Popen(
        [sys.executable, "-W", "error::DeprecationWarning", "-m", "equipoise", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )  # fmt: skip


class Forked:
    """The program in a fork of this process, which has imported everything already; its output goes to a file."""

    def __init__(self, *arguments, said):
        self._said, self.returncode = said, None
        with warnings.catch_warnings():
            # A warning about forking with several threads; torch's thread pool is idle here.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                os.setsid()
                # Restore the default handler, in case the tests run in the background with SIGINT ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(stream, 1)
                os.dup2(stream, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                torch.set_num_threads(1)
                status = run([str(argument) for argument in arguments])
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def poll(self):
        if self.returncode is None and os.waitpid(self.pid, os.WNOHANG) != (0, 0):
            self.returncode = -1
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._said.read_text()


def children(pid):
    """Returns the descendants of a process, from /proc."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = entry.read_text().partition(" (")
        except OSError:
            continue
        state, parent = rest.rpartition(")")[2].split()[:2]
        if state != "Z":
            parents[int(number)] = int(parent)
    result, layer = set(), {pid}
    while layer:
        layer = {child for child, parent in parents.items() if parent in layer} - result
        result |= layer
    return result


def workers_of(pid):
    """Returns the worker processes without the resource tracker, which forks may share."""
    return {child for child in children(pid) if b"spawn_main" in command_line(child)}


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class RandomData(Dataset):
    """Random data with any names and task; each modality contains a third of the information on the target."""

    def __init__(self, names=("audio", "image"), task="classification", outputs=3, sizes=(61, 17, 23), seed=0):
        random = torch.Generator().manual_seed(seed)
        self.names, self.task, self.num_outputs = tuple(names), task, outputs
        splits = []
        for size in sizes:
            inputs = {
                name: torch.randn(size, 5 + index, 3 + 2 * index, generator=random) for index, name in enumerate(names)
            }
            scores = torch.randn(size, outputs, generator=random)
            target = scores.argmax(dim=1) if task == "classification" else scores
            splits.append(Split(inputs, (target > 0).float() if task == "multilabel" else target))
        self.train, self.val, self.test = splits
        self.noise = split_statistics(self.train.inputs)

    def augment(self, inputs, draw, *, train):
        return dict(inputs)


def loaders(source, *, batch_size=16, seed=0):
    return (
        data.loader(source, "train", batch_size, seed=seed, train=True),
        data.loader(source, "val", 64, seed=seed, train=False),
    )
