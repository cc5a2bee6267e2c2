"""What the loop minimizes: a fusion's task loss with heads and balancers, or the losses that a model brings itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..balance import Balancer, BalancerList
from ..diagnostics.prediction_collection import collect_with_attention
from ..diagnostics.task_scores import SCORES, task_score
from ..models.fusion_model import FusionModel
from ..models.self_contained import SelfContainedModel
from .loop import TrainingLoop
from .recipes import TrainOptions


class BalancedTraining(TrainingLoop):
    """Trains a FusionModel; balancers plug in.

    Args:
        model: what is trained.
        options: how.
        balancers: ``BalancerList`` calls them in every step; give ``module.balancing`` to the ``Balance`` callback, which
            calls what happens once an epoch.
        seed: of dropout, see ``Loop``.

    Raises:
        NonFiniteError: a loss that is NaN or infinite, with the batch, and the modality whose input is.
    """

    model: FusionModel

    def __init__(
        self, model: FusionModel, options: TrainOptions, *, balancers: Sequence[Balancer] = (), seed: int = 0
    ) -> None:
        super().__init__(model, options, seed=seed)
        # Not registered: what they remember lies in the model, or in the Balance callback's state.
        self.balancing = BalancerList(model, balancers)

    def forward(self, batch: Mapping[str, Any]):
        return self.model(batch)

    def minimized(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        output, target = self.model(batch), batch["target"]
        loss = self.balancing.loss(output, target)
        with torch.no_grad():
            return loss, {"loss": self.model.loss(output.logits, target)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Gradients are accumulated, reduced and unscaled here, and not yet clipped.
        self.balancing.before_step()

    def on_validation_epoch_start(self) -> None:
        self._angles: dict[str, list[Tensor]] = {"cosine": [], "key_norm": []}

    def on_validation_epoch_end(self) -> None:
        if self._angles["cosine"] and len(self.model.names) > 1:
            first, *others = torch.cat(self._angles["cosine"]).nanmean(dim=(0, 1))
            self.log("air", (first - torch.stack(others).mean()).to(self.device), sync_dist=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with collect_with_attention(self.model, self._angles):
            output = self.model(batch)
        target = batch["target"]
        found, task = task_score(output.logits, target, self.model.task), self.model.task
        self.log(f"val_{SCORES[task]}", found, prog_bar=True, batch_size=len(target), sync_dist=True)
        if output.share is not None:
            for index, name in enumerate(output.names):
                self.log(f"share/{name}", output.share[..., index].mean(), batch_size=len(target), sync_dist=True)


class SelfContainedTraining(TrainingLoop):
    """Trains a model that brings its own losses; validation sees the same ones.

    Args:
        model: what is trained.
        options: how.
        seed: of dropout, see ``Loop``.

    Raises:
        NonFiniteError: a loss that is NaN or infinite, with the batch, and the modality whose input is.
    """

    model: SelfContainedModel

    def __init__(self, model: SelfContainedModel, options: TrainOptions, *, seed: int = 0) -> None:
        super().__init__(model, options, seed=seed)
        self.balancing = BalancerList(model, ())  # type: ignore[arg-type]

    def minimized(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.model.losses(batch)
        loss = torch.stack([term.reshape(()) for term in terms.values()]).sum()
        parts = {f"loss/{name}": term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        return loss, {"loss": loss.detach(), **parts}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, _ = self.minimized(batch)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch["target"]), sync_dist=True)
