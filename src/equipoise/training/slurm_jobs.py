"""Executes the runs of a comparison as Slurm jobs, through submitit; preempted jobs resume from their checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.user_code import allow_code, allowed_code
from ..errors import ConfigError, EquipoiseError, require_extra
from ..io.atomic_files import atomic_write, make_folder, read_json
from ..io.folder_lock import locked_folder
from ..io.typed_values import shorten_repr
from .run import single_thread
from .run_spec import RunSpec, is_finished
from .worker_processes import Listener, execute

WHO = "compare --executor slurm"
FOLDER = "slurm"
"""Folder of the logs and job ids, in the folder of the comparison."""
ERROR = "error.json"
"""File in the folder of a run with the error that it raised."""
CLUSTERS = ("slurm", "local")
"""Clusters of submitit; ``"local"`` starts each run as a detached process of this machine."""
POLL_SECONDS = 2.0


class SlurmRun:
    """One run as submitit executes it: a callable that can be submitted again after a preemption.

    The result is written to the folder of the run, as by any other run; an error is written to ``error.json`` there.
    """

    def __init__(self, job: RunSpec, folder: Path, options: Mapping[str, Any]) -> None:
        self.job, self.folder, self.options, self.code = job, folder, dict(options), allowed_code()

    def __call__(self) -> None:
        allow_code(self.code)
        make_folder(self.folder, "compare")
        (self.folder / ERROR).unlink(missing_ok=True)
        busy = ConfigError(
            "compare", expected=f"'{self.folder}' for this job alone", got="another job that trains this run",
            fix="Cancel one of both with scancel.",
        )  # fmt: skip
        with locked_folder(self.folder, busy), single_thread():
            result = execute(self.job, self.folder, None, self.options)
            if isinstance(result, BaseException):
                content = {"error": str(result), "kind": type(result).__name__}
                atomic_write(self.folder / ERROR, json.dumps(content))

    def checkpoint(self) -> Any:
        """Called by submitit before a preemption or time limit: the same run is submitted again, and resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_slurm(
    todo: Sequence[RunSpec], out: Path, listener: Listener | None, trainer_options: Mapping[str, Any], *,
    slurm_options: Mapping[str, Any] | None = None, cluster: str = "slurm",
) -> Generator[tuple[RunSpec, Any], None, None]:  # fmt: skip
    """Submits every run as a job and yields (run, result or exception) in order of completion.

    Jobs continue if this process is stopped. A second call with the same folder waits for the jobs that are still
    queued or running and submits only the other runs.

    Args:
        todo: runs to execute.
        out: folder of the comparison, on a file system that all nodes share.
        listener: called with (run, epochs, epochs) after each run.
        trainer_options: options of Lightning's ``Trainer`` for each run.
        slurm_options: options of ``submitit.AutoExecutor.update_parameters``, such as ``timeout_min`` and
            ``slurm_partition``.
        cluster: cluster of submitit, ``"slurm"`` or ``"local"``.

    Raises:
        ConfigError: Slurm is not installed, or an option is unknown.
        MissingExtraError: submitit is not installed.
    """
    with require_extra(WHO):
        import submitit
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            WHO, expected="the command sbatch", got="none on the PATH",
            fix="Run it on a login node of the cluster, or use --executor local.",
        )  # fmt: skip
    logging.getLogger("submitit").setLevel(logging.ERROR)
    executor = submitit.AutoExecutor(folder=out / FOLDER / "%j", cluster=cluster)
    try:
        executor.update_parameters(name=f"equipoise-{out.name}", **_parameters(slurm_options or {}))
    except (AssertionError, NameError, TypeError, ValueError) as error:
        raise ConfigError(
            WHO, expected="options of submitit.AutoExecutor", got=str(error).splitlines()[0],
            fix="Such as --slurm timeout_min=120 --slurm slurm_partition=gpu.",
        ) from error  # fmt: skip
    registry = _JobRegistry(out / FOLDER / f"{cluster}.json")
    waiting: dict[str, tuple[RunSpec, Any]] = {}
    for job in todo:
        key = str(job.folder(out).relative_to(out))
        # Runs of other recipes in the same folder have the same key, and other fingerprints.
        job_id = registry.find(key, job, out)
        attached = None if job_id is None else submitit.SlurmJob(out / FOLDER / "%j", job_id)
        if attached is None:
            (job.folder(out) / ERROR).unlink(missing_ok=True)
            try:
                attached = executor.submit(SlurmRun(job, job.folder(out), trainer_options))
            except Exception as error:  # submitit raises errors of several kinds with the output of sbatch.
                got = str(error).strip().splitlines()[-1]
                raise ConfigError(WHO, expected="a job that Slurm accepts", got=shorten_repr(got)) from error
            registry.add(key, job, attached.job_id)
        waiting[key] = job, attached
    while waiting:
        ended = [key for key, (job, submitted) in waiting.items() if _has_ended(submitted, job, out, cluster)]
        for key in ended:
            job, submitted = waiting.pop(key)
            result = _result(job, submitted, out)
            if listener is not None and not isinstance(result, BaseException):
                listener(job, job.recipe.train.epochs, job.recipe.train.epochs)
            yield job, result
        if waiting and not ended:
            time.sleep(POLL_SECONDS)


class _JobRegistry:
    """Job ids of submitted runs, in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = read_json(path)
        except (OSError, ValueError):
            content = {}
        self.jobs: dict[str, Any] = content if isinstance(content, dict) else {}

    def find(self, key: str, job: RunSpec, out: Path) -> str | None:
        """Returns the id of the job of a run if it is still queued or running."""
        entry = self.jobs.get(key)
        if not isinstance(entry, dict) or entry.get("fingerprint") != job.fingerprint():
            return None
        job_id = str(entry.get("job", ""))
        if not job_id.replace("_", "").isdecimal() or (job.folder(out) / ERROR).exists():
            return None
        return job_id if _is_active(job_id) else None

    def add(self, key: str, job: RunSpec, job_id: str) -> None:
        self.jobs[key] = {"job": job_id, "fingerprint": job.fingerprint()}
        atomic_write(self.path, json.dumps(self.jobs, indent=1))


def _parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a small training, with the given options."""
    return {"timeout_min": 60, "cpus_per_task": 1, "mem_gb": 4, **options}


def _is_active(job_id: str) -> bool:
    """Returns whether Slurm lists a job as queued or running."""
    if shutil.which("squeue") is None:
        return False
    listed = subprocess.run(
        ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"], capture_output=True, text=True, check=False
    )
    return listed.returncode == 0 and bool(listed.stdout.strip())


def _has_ended(submitted: Any, job: RunSpec, out: Path, cluster: str) -> bool:
    # The result file of submitit is only checked for existence and never read.
    if submitted.paths.result_pickle.exists():
        return True
    if cluster != "slurm":
        return submitted.done()
    # Unlike sacct, squeue also works on clusters without accounting. A job that has just ended leaves the queue before
    # its files are visible on other nodes.
    if _is_active(submitted.job_id):
        return False
    time.sleep(POLL_SECONDS)
    return not _is_active(submitted.job_id)


def _result(job: RunSpec, submitted: Any, out: Path) -> Any:
    folder = job.folder(out)
    try:
        run = is_finished(job, folder)
    except EquipoiseError as error:
        return error
    if run is not None:
        return run
    try:
        return RuntimeError(str(read_json(folder / ERROR)["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        return RuntimeError(
            f"job {submitted.job_id} ended without a result: out of memory, cancelled or past its time limit. "
            f"Its log is {submitted.paths.stderr}. Repeat the command to resume it."
        )
