"""Records the metrics of every epoch in a Lightning callback that survives a resume."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from .. import data
from ..balance import Balancer, ProgressiveRollingQ, RollingQ
from ..models.fusion_model import FusionModel
from .recipes import Recipe
from .run_evaluation import collect_test_predictions, key_metrics, noise_modality

Progress = Callable[[int, int], None]


class HistoryCallback(pl.Callback):
    """Records every epoch: loss, validation score, shares, imbalance and rotations.

    Keys are those before the first rotation.

    Put it before ``BalancerCallback`` in the list of callbacks, pass ``look`` to ``BalancerCallback`` as
    ``before_end``, and call ``note`` with the logs of the balancers afterward (``RunHistory`` does).

    Args:
        source, recipe: data set and recipe of the run, to measure the keys.
        fingerprint: identifies the run; a checkpoint of another run is not resumed.
        balancers: balancers of the run.
        progress: called with (epochs done, epochs).
    """

    state_key = "journal"  # type: ignore[assignment]

    def __init__(
        self, source: data.Dataset, recipe: Recipe, fingerprint: str, balancers: list[Balancer],
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.history: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.keys_before: dict[str, Any] | None = None
        self._source, self._recipe, self.fingerprint = source, recipe, fingerprint
        staged = [stage for b in balancers if isinstance(b, ProgressiveRollingQ) for stage in b.stages]
        self._rolling = [*(b for b in balancers if isinstance(b, RollingQ)), *staged]
        self._progress = progress
        self._started = 0.0
        self._rng: Tensor | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._rng is not None:
            # In a resumed epoch, dropout continues with the random numbers that would have come next.
            torch.set_rng_state(self._rng)
            self._rng = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records the keys before the first rotation."""
        if self.keys_before is None and self._due():
            model = pl_module.model
            if isinstance(model, FusionModel):
                replaced = noise_modality(model, self._source, self._recipe)
                self.keys_before = key_metrics(
                    *(collect_test_predictions(model, self._source, "test", name) for name in (None, replaced))
                )

    def _due(self) -> bool:
        with warnings.catch_warnings():
            # The balancers raise this warning themselves when they decide.
            warnings.filterwarnings("ignore", message="RollingQ skipped a rotation")
            return any(rolling.due() for rolling in self._rolling)

    def note(self, trainer: pl.Trainer, logs: dict[str, float]) -> None:
        """Completes the entry of the epoch with the logs of the balancers."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        entry: dict[str, Any] = {"epoch": trainer.current_epoch + 1}
        entry |= {n: v for n, v in metrics.items() if n in ("loss", "air") or n.startswith(("val_", "loss/"))}
        share = {name.removeprefix("share/"): v for name, v in metrics.items() if name.startswith("share/")}
        entry |= {"share": share} if share else {}
        if logs:
            entry |= {"rotations": int(logs.get("rotations", 0)), "balance": logs}
        self.history.append(entry)
        if self._progress is not None:
            self._progress(len(self.history), int(trainer.max_epochs or 0))

    def state_dict(self) -> dict[str, Any]:
        # Stored as JSON text, which loads with weights_only=True.
        notes = {"history": self.history, "seconds": self.seconds, "keys_before": self.keys_before}
        return {"fingerprint": self.fingerprint, "notes": json.dumps(notes), "rng": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        notes = json.loads(state_dict["notes"])
        self.history, self.seconds, self.keys_before = notes["history"], notes["seconds"], notes["keys_before"]
        self._rng = state_dict.get("rng")


class RunHistory(pl.Callback):
    """Runs after ``BalancerCallback`` and completes the history entry with the logs of the balancers."""

    def __init__(self, journal: HistoryCallback, balance: Any) -> None:
        self._journal, self._balance = journal, balance

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._journal.note(trainer, self._balance.last)
