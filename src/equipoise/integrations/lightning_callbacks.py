"""Lightning callbacks: balancers in any ``LightningModule``, and measurements of its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from ..balance import Balancer, BalancerList, statistics_by_full_pass
from ..balance.balancer_list import takes_part_in_steps
from ..errors import ConfigError
from .step_watcher import StepWatcher

SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
"""Strategies under which a process has only a part of each parameter and gradient."""


def check_strategy(strategy: Any, who: str) -> None:
    """Raises ConfigError for a strategy of Lightning, or the name of one, that shards parameters."""
    by_name = isinstance(strategy, str) and strategy.startswith(("fsdp", "deepspeed"))
    if by_name or isinstance(strategy, SHARDED):
        got = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ConfigError(
            who, expected="a strategy that keeps the whole model in each process, such as ddp",
            got=f"{got}, under which a process has a part of each parameter and gradient",
            fix="Balancers compare whole gradients, and fuse modalities outside of the wrapped forward pass. Use ddp.",
        )  # fmt: skip


class BalancerCallback(pl.Callback):
    """Calls the step and epoch hooks of balancers, logs their metrics, and saves their state in checkpoints.

    Balancers that only attach to the model (``RollingQ(model.fusion.attention)``) can be passed directly. Those that
    add a penalty or change gradients are passed as the ``BalancerList`` whose ``loss`` the training step returns::

        def training_step(self, batch, index):
            return self.balancing.loss(self.model(batch), batch["target"])

        trainer = pl.Trainer(callbacks=[eq.lightning.BalancerCallback(module.balancing)])

    The hooks run after gradients are accumulated, reduced and unscaled, and before they are clipped. Metrics are logged
    as ``balance/...``; ``last`` holds the latest. Do not attach the same balancer to two callbacks.

    Args:
        balancers: a BalancerList, or one or several balancers.
        before_end: called with trainer and module when the statistics of an epoch are complete, before any rotation.

    Raises:
        ConfigError: a balancer that acts in training steps is passed without its BalancerList; when training begins, a
            strategy that shards parameters, with any balancer.

    Example:
        >>> from equipoise.fusion import JointAttention
        >>> from equipoise.balance import RollingQ
        >>> balancer = RollingQ(JointAttention(8).build(("audio", "image")).attention)
        >>> callback = BalancerCallback(balancer)
        >>> callback.last
        {}
    """

    def __init__(
        self,
        *balancers: BalancerList | Balancer | Sequence[Balancer],
        before_end: Callable[[pl.Trainer, pl.LightningModule], None] | None = None,
    ) -> None:
        self.balancers: list[Balancer] = []
        self._balancings = [entry for entry in balancers if isinstance(entry, BalancerList)]
        for entry in balancers:
            if isinstance(entry, BalancerList):
                self.balancers.extend(entry.balancers)
            else:
                self.balancers.extend([entry] if isinstance(entry, Balancer) else entry)
        self.last: dict[str, float] = {}
        self._before_end = before_end
        inside = {id(balancer) for balancing in self._balancings for balancer in balancing.balancers}
        for balancer in self.balancers:
            if id(balancer) not in inside and takes_part_in_steps(balancer):
                name = type(balancer).__name__
                raise ConfigError(
                    "BalancerCallback", expected=f"the BalancerList of {name}, which acts in training steps",
                    got=f"{name} alone",
                    fix="Return the loss of balancing = eq.BalancerList(model, [...]) in training_step, and "
                    "pass balancing.",
                )  # fmt: skip

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.balancers:
            check_strategy(trainer.strategy, f"BalancerCallback with {type(self.balancers[0]).__name__}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for balancer in self.balancers:
                balancer.attach_optimizer(optimizer)
            for balancing in self._balancings:
                balancing.check_optimizer(optimizer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for balancing in self._balancings:
            balancing.before_step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = {}
        train, val = (_Moved(loader, pl_module) for loader in (trainer.train_dataloader, trainer.val_dataloaders))
        for rolling in statistics_by_full_pass(self.balancers):
            rolling.measure(getattr(pl_module, "model", pl_module), train)
        if self._before_end is not None:
            self._before_end(trainer, pl_module)
        for balancer in self.balancers:
            if balancer.reviews:
                balancer.review(train, val)
        for balancer in self.balancers:
            self.last.update(balancer.end_epoch())
        # end_epoch has already reduced over processes; sync_dist avoids a warning of Lightning.
        for name, value in self.last.items():
            pl_module.log(f"balance/{name}", value, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {str(number): balancer.state_dict() for number, balancer in enumerate(self.balancers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict) != len(self.balancers):
            raise ConfigError(
                "BalancerCallback", expected=f"the state of as many balancers = {len(self.balancers)}",
                got=f"{len(state_dict)}",
                fix="Resume with the balancers that the checkpoint was written with.",
            )  # fmt: skip
        for number, balancer in enumerate(self.balancers):
            balancer.load_state_dict(state_dict[str(number)])


class WatchCallback(pl.Callback):
    """Logs shares of attention, AIR and gradient norms of every n-th step to the loggers of the Trainer.

    Training is not changed, bit for bit, and other steps cost one comparison. Logged names:

    * ``watch/share/<modality>``: the share of attention as ``eq.watch`` measures it, mean over samples, heads and
      layers; with ``per_layer``, ``watch/share/<layer>/<modality>``.
    * ``watch/air/<modality>``: the imbalance that ``RollingQ`` has measured in the epoch so far, if it is attached.
    * ``watch/gradient/<modality>``: the norm of the gradient over all trained parameters of the encoder.

    What cannot be measured is left out, and a warning gives the reason once. Only the first process measures, on its
    own batches. Gradients are read when they are accumulated, reduced and unscaled: put the callback before
    ``BalancerCallback`` in the list to read them before balancers change them, and behind it to read them afterward.
    They are read before clipping. Under FSDP, DeepSpeed and tensor parallelism, where a process has only a part of each
    gradient, they are left out. The shares of a step include forward passes that balancers add to it.

    Args:
        every_n_steps: number of optimizer steps from one measurement to the next, the first step included.
        model: the module to measure; the LightningModule by default.
        options: arguments of ``StepWatcher``: ``per_layer``, ``layers``, ``queries``, ``modality``, ``names``,
            ``encoders``, ``share`` and ``gradients``.

    Attributes:
        last: values of the last measured step.

    Raises:
        ConfigError: ``every_n_steps`` below 1. TypeError: an unknown option.

    Example:
        >>> WatchCallback(every_n_steps=50, per_layer=True).last
        {}
    """

    def __init__(self, every_n_steps: int = 100, *, model: torch.nn.Module | None = None, **options: Any) -> None:
        self._watcher, self._model = StepWatcher(every_n_steps, **options), model
        self.last: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.loggers:
            warnings.warn(
                "WatchCallback: the Trainer has no logger, so that the values are in callback.last only. "
                "Pass Trainer(logger=True).", stacklevel=2,
            )  # fmt: skip

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self._watcher.begin(trainer.global_step, pl_module if self._model is None else self._model)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._watcher.open:
            return
        sharded = isinstance(trainer.strategy, SHARDED)
        reason = f"under {type(trainer.strategy).__name__} a process has a part of each gradient" if sharded else None
        measured = self._watcher.end(reason)
        if measured is not None:
            step, self.last = measured
            for logger in trainer.loggers:
                logger.log_metrics(self.last, step=step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watcher.discard()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watcher.discard()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._watcher.discard()


class _Moved:
    """Re-iterable batches of a loader, or of several, on the module's device."""

    def __init__(self, loader: Any, module: pl.LightningModule) -> None:
        self._loader, self._module = loader, module

    def __iter__(self) -> Iterator[Any]:
        # Lightning supports several validation loaders.
        several = self._loader if isinstance(self._loader, list | tuple) else (self._loader,)
        for batch in chain.from_iterable(loader for loader in several if loader is not None):
            yield self._module.transfer_batch_to_device(batch, self._module.device, 0)
