"""Lightning logger for trackio, for which Lightning has none."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from ..errors import MissingExtraError


class TrackioLogger(Logger):
    """Writes metrics to the local database of trackio; ``trackio show`` displays them.

    As with Lightning's ``WandbLogger``, the run stays open after training, so that test metrics can be added:
    ``logger.experiment.finish()`` ends it, and so does the end of the process.

    Args:
        project: name of the project.
        name: name of the run.
        group: group of the run.

    Raises:
        MissingExtraError: trackio is not installed.
    """

    def __init__(self, *, project: str, name: str, group: str | None = None) -> None:
        super().__init__()
        self._project, self._name, self._group = project, name, group
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        """Name of the project."""
        return self._project

    @property
    def version(self) -> str:
        """Name of the run."""
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio, which starts at first use."""
        if self._run is None:
            try:
                import trackio  # pyright: ignore[reportMissingImports]
            except ModuleNotFoundError as error:
                if error.name != "trackio":
                    raise
                raise MissingExtraError(
                    "TrackioLogger", expected="the package 'trackio'", got="none installed",
                    fix="Install it: pip install trackio",
                ) from error  # fmt: skip
            # trackio prints advice to stdout, which belongs to the program.
            with contextlib.redirect_stdout(io.StringIO()):
                self._run = trackio.init(
                    project=self._project, name=self._name, group=self._group, config=self._config,
                    embed=False, auto_log_gpu=False, auto_log_cpu=False,
                )  # fmt: skip
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Sets the configuration of the run; call it before the first metric."""
        self._config = dict(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Logs metrics of a step."""
        self.experiment.log({name: float(value) for name, value in metrics.items()}, step=step)
