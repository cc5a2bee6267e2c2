"""RollingQ for a stack of attention layers: trains and rotates one layer after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import ConfigError
from ...nn.transformer import Attention
from ..balancer import Balancer
from ..common.pending_state import Pending
from .rollingq_balancer import RollingQ


class StagedRotations(Protocol):
    """A fusion of several attention layers that can run with only the first ones, such as ``JointAttention``."""

    depth: int

    @property
    def layers(self) -> Sequence[Attention]: ...

    def use_depth(self, depth: int) -> None: ...


class ProgressiveRollingQ(Balancer):
    """Trains a deep ``JointAttention`` in stages: stage s uses blocks 1..s and applies RollingQ to block s.

    The epochs are split equally; the last stage takes the remainder. Each stage has its own budget. The rotations of
    finished stages are frozen; head, optimizer and learning-rate schedule continue. The rotations are saved with the
    model, the stage with this balancer: a checkpoint needs both state dicts.

    Blocks beyond the stage get no gradient, which data-parallel training must allow: use
    ``DistributedDataParallel(model, find_unused_parameters=True)``, in Lightning
    ``strategy="ddp_find_unused_parameters_true"``.

    Args:
        fusion: a built ``JointAttention``.
        epochs: number of epochs of the whole training.
        options: options of ``RollingQ``, for every stage.

    Raises:
        ConfigError: fewer epochs than stages.

    Reference: RollingQ (ICML 2025), section 4 (multi-layer scheme).
    Differs from the paper in: the stage lengths, which the paper does not give.
    """

    name = "progressive_rollingq"

    partial_graph = True
    notes_in_forward = True
    changes_gradients = False
    works_alone = True
    epoch: Tensor

    def __init__(self, fusion: StagedRotations, *, epochs: int, **options: Any) -> None:
        super().__init__()
        if epochs < fusion.depth:
            raise ConfigError(
                "ProgressiveRollingQ", expected=f"at least one epoch for each of {fusion.depth} stages", got=f"{epochs}"
            )
        self.stage_length = epochs // fusion.depth
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self._fusion = [fusion]
        self._stages = [RollingQ(layer, **options) for layer in fusion.layers]
        self._enter(1)

    @property
    def stages(self) -> list[RollingQ]:
        """One RollingQ for each attention layer, in order."""
        return self._stages

    def stage(self) -> int:
        """Returns the stage of the current epoch, starting at 1."""
        return min(int(self.epoch) // self.stage_length + 1, len(self._stages))

    def join(self, pending: Pending) -> None:
        super().join(pending)
        for rolling in getattr(self, "_stages", ()):
            rolling.join(pending)

    def before_step(self) -> None:
        for rolling in self._stages:
            rolling.before_step()

    def end_epoch(self) -> dict[str, float]:
        stage = self.stage()
        log = self._stages[stage - 1].end_epoch()
        log["rotations"] = float(sum(int(rolling.rotations) for rolling in self._stages))
        self.epoch += 1
        if self.stage() != stage:
            self._enter(self.stage())
        return {**log, "stage": float(stage)}

    def _enter(self, stage: int) -> None:
        self._fusion[0].use_depth(stage)
        for number, rolling in enumerate(self._stages, start=1):
            rolling.freeze(number != stage)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._enter(self.stage())


def statistics_by_full_pass(balancers: Sequence[Balancer]) -> Iterator[RollingQ]:
    """Yields each RollingQ with ``statistics="full_pass"`` (the current stage of a ProgressiveRollingQ).

    Call ``measure`` on them before the epoch ends.
    """
    for balancer in balancers:
        rolling = balancer.stages[balancer.stage() - 1] if isinstance(balancer, ProgressiveRollingQ) else balancer
        if isinstance(rolling, RollingQ) and rolling.statistics == "full_pass":
            yield rolling
