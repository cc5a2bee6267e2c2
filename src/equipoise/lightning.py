"""Lightning callbacks: balancing in anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl

from .balance import Balancer, ProgressiveRollingQ, RollingQ
from .errors import ConfigError


class Balance(pl.Callback):
    """Calls ``end_epoch`` of balancers after every training epoch, logs what they say, and keeps their state.

    The balancers themselves are attached to the model already (``RollingQ(model.fusion.attention)``). Their log appears
    under ``balance/...``; ``last`` holds it too. Put no second one around the same balancer.

    Args:
        balancers: one or several.
        before_end: called with trainer and module when the epoch's statistics are complete and before anything is
            rotated.

    Example:
        >>> from equipoise.fusion import JointAttention
        >>> balancer = RollingQ(JointAttention(8).build(("audio", "image")).attention)
        >>> callback = Balance(balancer)
        >>> callback.last
        {}
    """

    def __init__(
        self,
        *balancers: Balancer | Sequence[Balancer],
        before_end: Callable[[pl.Trainer, pl.LightningModule], None] | None = None,
    ) -> None:
        self.balancers: list[Balancer] = []
        for entry in balancers:
            self.balancers.extend([entry] if isinstance(entry, Balancer) else entry)
        self.last: dict[str, float] = {}
        self._before_end = before_end

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = {}
        for balancer in self.balancers:
            rolling = balancer.stages[balancer.stage() - 1] if isinstance(balancer, ProgressiveRollingQ) else balancer
            if isinstance(rolling, RollingQ) and rolling.stats == "pass":
                self._measure(trainer, pl_module, rolling)
        if self._before_end is not None:
            self._before_end(trainer, pl_module)
        for balancer in self.balancers:
            self.last.update(balancer.end_epoch())
        # Processes have agreed in end_epoch already; Lightning wants to be told that it may reduce.
        for name, value in self.last.items():
            pl_module.log(f"balance/{name}", value, sync_dist=True)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, balancer: RollingQ) -> None:
        model = getattr(pl_module, "model", pl_module)
        batches = trainer.train_dataloader or []
        moved = (pl_module.transfer_batch_to_device(batch, pl_module.device, 0) for batch in batches)
        balancer.measure(model, moved)

    def state_dict(self) -> dict[str, Any]:
        return {str(number): balancer.state_dict() for number, balancer in enumerate(self.balancers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict) != len(self.balancers):
            raise ConfigError(
                "Balance", expected=f"the state of as many balancers = {len(self.balancers)}", got=f"{len(state_dict)}",
                fix="Resume with the balancers that the checkpoint was written with.",
            )  # fmt: skip
        for number, balancer in enumerate(self.balancers):
            balancer.load_state_dict(state_dict[str(number)])
