"""Loggers of Lightning by name, for runs of recipes: csv, TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MissingExtraError, unknown_name

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LOGGERS = {"csv": None, "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Name of a logger -> the package that it needs besides Lightning."""

FOLDER = "logs"
"""Folder of the logs in that of a run."""


def parse_loggers(value: str | Sequence[str], who: str = "logger") -> list[str]:
    """Returns the names in a list, or in a string with commas, each once.

    Raises:
        ConfigError: an unknown name, or a value that is no list of names.

    Example:
        >>> parse_loggers("csv, tensorboard")
        ['csv', 'tensorboard']
    """
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(who, expected="names of loggers", got=repr(value), fix=f"Known: {', '.join(LOGGERS)}.")
    names = [name.strip() for part in parts for name in part.split(",")]
    for name in names:
        if name not in LOGGERS:
            raise unknown_name(who, "logger", name, LOGGERS)
    return list(dict.fromkeys(names))


def check_loggers(names: Sequence[str]) -> None:
    """Checks that the packages of loggers are installed, before anything is trained.

    Raises:
        ConfigError: an unknown name. MissingExtraError: a package is not installed; the message has the command.
    """
    for name in parse_loggers(list(names)):
        package = LOGGERS[name]
        if package is not None and importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"logger '{name}'", expected=f"the package '{package}'", got="none installed",
                fix=f"Install it: pip install {package}",
            )  # fmt: skip


@contextmanager
def open_loggers(
    names: Sequence[str], folder: Path, *, project: str, group: str, name: str, config: Mapping[str, Any]
) -> Iterator[list[Logger]]:
    """Context manager: creates loggers that write to ``folder / "logs"``, and closes them at the end.

    ``csv`` writes ``csv/version_<n>/metrics.csv``, with another number for a resumed run; ``tensorboard`` writes event
    files to ``tensorboard/``. ``wandb`` writes an offline run to ``wandb/``, which needs no account and no network and
    is uploaded by ``wandb sync``; the environment variable ``WANDB_MODE=online`` uploads it directly. ``trackio``
    writes to its own local database, which ``trackio show`` reads (environment variable ``TRACKIO_DIR``).

    Args:
        names: of ``LOGGERS``.
        folder: folder of the run.
        project, group, name: of the run, for loggers that list runs of many folders.
        config: options to log as hyperparameters.

    Raises:
        ConfigError: an unknown name. MissingExtraError: a package is not installed.
    """
    check_loggers(names)
    loggers = [_logger(one, folder / FOLDER, project, group, name) for one in parse_loggers(list(names))]
    status = "failed"
    try:
        for logger in loggers:
            logger.log_hyperparams(dict(config))
        yield loggers
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
            # Runs of wandb and trackio stay open until the process ends, and the next one would be written into them.
            finish = getattr(getattr(logger, "experiment", None), "finish", None)
            if finish is not None:
                # trackio prints advice to stdout, which belongs to the program.
                with redirect_stdout(io.StringIO()):
                    finish()


def log_final(loggers: Sequence[Logger], metrics: Mapping[str, float | None], step: int) -> None:
    """Logs the metrics of the test split as ``test/<metric>``; undefined ones are left out."""
    known = {f"test/{name}": float(value) for name, value in metrics.items() if value is not None}
    for logger in loggers:
        logger.log_metrics(known, step=step)
        logger.save()


def _logger(kind: str, folder: Path, project: str, group: str, name: str) -> Logger:
    from lightning.pytorch import loggers

    if kind == "csv":
        return loggers.CSVLogger(folder, name="csv", flush_logs_every_n_steps=1)
    if kind == "tensorboard":
        return loggers.TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)
    if kind == "wandb":
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        offline = os.environ.get("WANDB_MODE", "offline") != "online"
        return loggers.WandbLogger(name=name, save_dir=folder, project=project, group=group, offline=offline)
    from .trackio_logger import TrackioLogger

    return TrackioLogger(project=project, group=group, name=name)
