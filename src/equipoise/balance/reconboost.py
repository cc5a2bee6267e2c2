"""ReconBoost: modalities as boosting learners, each trained on the residual of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.modality_heads import ModalityHeads, replace_head
from .common.unimodal_scores import has_modality, true_score
from .common.unimodal_terms import at_least_single, check_concatenated, check_modalities, masked_mean


def boosting_losses(
    losses: Float[Tensor, " batch"],
    others_score: Float[Tensor, " batch"],
    disagreement: Float[Tensor, " batch"],
    *,
    task_weight: float = 5.0,
    residual: float = 1.0,
    agreement: float = 0.5,
) -> Float[Tensor, " batch"]:
    """Returns the loss of the trained modality for each sample.

    -w_1 <y, log p> + w_2 <y p_others, log p> equals its loss times w_1 - w_2 p_others[y]: samples that the others
    already predict have a smaller weight.

    Args:
        losses: (batch,) unimodal losses, -log p[y].
        others_score: (batch,) scores of the other modalities together, p_others[y].
        disagreement: (batch,) squared distance to the predictions of the previously trained modality.
        task_weight, residual, agreement: w_1, w_2 and the weight of the last term.

    Example:
        >>> boosting_losses(torch.tensor([2.0]), torch.tensor([0.25]), torch.tensor([1.0]))
        tensor([10.])
    """
    return (task_weight - residual * others_score) * losses + agreement * disagreement


class ReconBoost(Balancer):
    """Trains one modality per epoch, alternately, on the residual of the others, and all of them in the next epoch.

    Each modality has a linear head; the logits are nu sum_m y_m with a learned shrinkage nu. In an epoch of modality m
    only its encoder and head are trained::

        L_m = -w_1 <y, log p_m> + w_2 <y sg(p_others), log p_m> + alpha |p_m - sg p_before|^2
        p_m = softmax(y_m),  p_others = softmax(nu sum_{n != m} y_n)

    with p_before the predictions of the previously trained modality (none in the first epoch). The next epoch is a
    rectification epoch: all parameters and nu are trained with the task loss. 2 N epochs form a round.

    Args:
        model: with a fusion that concatenates pooled vectors (``Concat``, ``Sum``). Its ``head`` is replaced and saved
            in checkpoints: create the optimizer afterward. Unimodal heads are detached.
        task_weight, residual, agreement: w_1, w_2 and alpha, >= 0, with w_1 > w_2 so that all weights are positive.
        shrinkage: initial nu, > 0.

    Raises:
        ConfigError: one modality, a fusion of another kind, a weight out of range.

    It helps if one modality converges early and the others stop learning. It needs no additional passes, but a modality
    is trained in only (N + 1) / 2N of the epochs, and logits start small (nu = 0.01): train for several rounds. An
    epoch costs no more than in plain training.

    Encoders of the other modalities get no gradient: with ``DistributedDataParallel`` in a custom loop, wrap a module
    that returns the loss, as Lightning does, and set ``find_unused_parameters=True``.

    Reference: Hua, Xu, Bao, Yang and Huang, "ReconBoost: Boosting Can Achieve Modality Reconcilement" (ICML 2024).
    Differs from the released code in: multilabel and regression tasks, with their own scores; the benchmark detaches
    both sides of the last term, which then has no gradient, and here p_m is trained by it.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancer = eq.balance.ReconBoost(model)
        >>> [(balancer.learner(), balancer.end_epoch())[0] for _ in range(5)]
        ['audio', None, 'image', None, 'audio']
    """

    replaces = ("task",)
    partial_graph = True
    excludes: ClassVar[Mapping[str, str]] = {
        "MBSD": "it needs unimodal heads that train the encoders, and here they are detached",
        "MMPareto": "it needs unimodal heads that train the encoders, and here they are detached",
    }

    def __init__(
        self, model: Multimodal, *, task_weight: float = 5.0, residual: float = 1.0, agreement: float = 0.5,
        shrinkage: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_modalities(model, "ReconBoost")
        check_concatenated(model, "ReconBoost")
        if not (task_weight > residual >= 0 and agreement >= 0 and shrinkage > 0):
            raise ConfigError(
                "ReconBoost", expected="task_weight > residual >= 0, agreement >= 0 and shrinkage > 0",
                got=f"task_weight = {task_weight}, residual = {residual}, agreement = {agreement}, "
                f"shrinkage = {shrinkage}",
            )  # fmt: skip
        self._model = [model]
        self.task_weight, self.residual, self.agreement = task_weight, residual, agreement
        replace_head(model, BoostedHead, shrinkage)
        # Keep this buffer on the CPU: reading it must not sync the GPU.
        self.register_buffer("epochs", torch.tensor(0))

    epochs: Tensor

    def learner(self) -> str | None:
        """Returns the modality that is trained in this epoch; None if all are trained."""
        index, rectifies = divmod(int(self.epochs), 2)
        return None if rectifies else self._model[0].names[index % len(self._model[0].names)]

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the boosting loss of this epoch's modality, or the task loss."""
        model, name = self._model[0], self.learner()
        if name is None:
            if output.logits is None:
                raise ConfigError("ReconBoost", expected="an output with logits", got="logits = None")
            return model.loss(output.logits, target)
        head, index = cast(BoostedHead, model.head), model.names.index(name)
        # Not a slice of the features: the other encoders would get zero gradients, with which Adam still updates.
        own_logits = at_least_single(head.modality_logits(index, output.tokens[name].pooled()))
        with torch.no_grad():
            logits, present = head.all_logits(output.features)
            others = head.shrinkage * (logits.sum(dim=1) - logits[:, index])
            score = true_score(others, target, model.task)
            previous = _probabilities(logits[:, index - 1], model.task)
            comparable = present[:, index - 1] if int(self.epochs) else torch.zeros_like(present[:, 0])
        disagreement = (
            (_probabilities(own_logits, model.task) - previous).square().sum(dim=-1).masked_fill(~comparable, 0.0)
        )
        losses = boosting_losses(
            model.sample_losses(own_logits, target), score, disagreement,
            task_weight=self.task_weight, residual=self.residual, agreement=self.agreement,
        )  # fmt: skip
        return masked_mean(losses, has_modality(output, name))

    def end_epoch(self) -> dict[str, float]:
        """Advances to the next epoch; returns ``shrinkage``."""
        self.epochs += 1
        return {"shrinkage": float(cast(BoostedHead, self._model[0].head).shrinkage.detach())}


class BoostedHead(ModalityHeads):
    """A linear head per modality with added and scaled logits: nu sum_m (W_m f_m + b_m).

    A modality that a sample lacks contributes 0.

    Args:
        count: number of modalities.
        dim: width of one vector.
        num_outputs: number of classes, labels or targets.
        shrinkage: initial nu.
    """

    def __init__(self, count: int, dim: int, num_outputs: int, shrinkage: float) -> None:
        super().__init__(count, dim, num_outputs)
        self.shrinkage = nn.Parameter(torch.tensor(shrinkage))

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return self.shrinkage * self.all_logits(features)[0].sum(dim=1)


def _probabilities(logits: Tensor, task: str) -> Tensor:
    """Returns the values compared between modalities: probabilities of classes or labels, else predictions."""
    if task == "classification":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if task == "multilabel" else logits
