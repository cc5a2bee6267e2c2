"""ReconBoost: modalities as boosting learners, each of which learns what the others together get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import has_modality, true_score
from .common.unimodal_terms import (
    at_least_single,
    check_concatenated,
    check_modalities,
    detach_unimodal_heads,
    masked_mean,
    split_concatenated,
)


def boosting_losses(
    losses: Float[Tensor, " batch"],
    others_score: Float[Tensor, " batch"],
    disagreement: Float[Tensor, " batch"],
    *,
    task_weight: float = 5.0,
    residual: float = 1.0,
    agreement: float = 0.5,
) -> Float[Tensor, " batch"]:
    """Every sample's loss of the modality that learns.

    -w_1 <y, log p> + w_2 <y p_others, log p> is its loss times w_1 - w_2 p_others[y]: what the others already answer
    counts less.

    Args:
        losses: (batch,) of the modality alone, -log p[y].
        others_score: (batch,) how right the others are together, p_others[y].
        disagreement: (batch,) squared distance to the answers of the modality that learned before.
        task_weight, residual, agreement: w_1, w_2 and the weight of the last term.

    Example:
        >>> boosting_losses(torch.tensor([2.0]), torch.tensor([0.25]), torch.tensor([1.0]))
        tensor([10.])
    """
    return (task_weight - residual * others_score) * losses + agreement * disagreement


class ReconBoost(Balancer):
    """Trains one modality an epoch, in turn, on what the others leave over, and all of them in the epoch after it.

    Every modality answers with a linear head of its own; the logits are nu sum_m y_m with a learned shrinkage nu. In
    modality m's epoch only its encoder and head learn::

        L_m = -w_1 <y, log p_m> + w_2 <y sg(p_others), log p_m> + alpha |p_m - sg p_before|^2
        p_m = softmax(y_m),  p_others = softmax(nu sum_{n != m} y_n)

    with p_before the answers of the modality that learned before it (none in the first epoch). The epoch after is one
    of rectification: everything, and nu, learns from the task's loss. 2 N epochs are a round.

    Args:
        model: of a fusion that puts pooled vectors side by side (``Concat``, ``Sum``). Its ``head`` is replaced, which
            a checkpoint holds: make the optimizer afterward. Unimodal heads only watch from now on.
        task_weight, residual, agreement: w_1, w_2 and alpha, >= 0, with w_1 > w_2 so that right answers stay wanted.
        shrinkage: nu at the start, > 0.

    Raises:
        ConfigError: one modality, a fusion of another kind, a weight out of range.

    It helps where one modality answers early and the others stop learning. No pass is added, but a modality learns in
    (N + 1) / 2N of the epochs only, and logits start small (nu = 0.01): give it several rounds. It costs no more an
    epoch than plain training.

    Encoders whose turn it is not get no gradient: under ``DistributedDataParallel`` in a loop of your own wrap a module
    that returns the loss, as Lightning does, and set ``find_unused_parameters=True``.

    Reference: Hua, Xu, Bao, Yang and Huang, "ReconBoost: Boosting Can Achieve Modality Reconcilement" (ICML 2024);
    spec 3.3.
    Differs from the released code in: multilabel and regression tasks through their own scores; the benchmark detaches
    both sides of the last term, which then teaches nothing, and here p_m learns from it.

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
        "MBSD": "it needs unimodal heads that teach, and here they only watch",
        "MMPareto": "it needs unimodal heads that teach, and here they only watch",
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
        like = next(model.head.parameters())
        head = BoostedHead(len(model.names), model.fusion.dim, model.num_outputs, shrinkage)
        model.head = head.to(like.device, like.dtype)
        detach_unimodal_heads(model)
        # Stays where it is made: whose epoch it is should not be asked of an accelerator.
        self.register_buffer("epochs", torch.tensor(0))

    epochs: Tensor

    def learner(self) -> str | None:
        """The modality that learns in this epoch; None where all of them do."""
        turn, rectifies = divmod(int(self.epochs), 2)
        return None if rectifies else self._model[0].names[turn % len(self._model[0].names)]

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """The loss of this epoch's learner, or the task's loss."""
        model, name = self._model[0], self.learner()
        if name is None:
            if output.logits is None:
                raise ConfigError("ReconBoost", expected="an output with logits", got="logits = None")
            return model.loss(output.logits, target)
        head, place = cast(BoostedHead, model.head), model.names.index(name)
        # Not a slice of the features: that would give the other encoders a gradient of zeros, and Adam moves on those.
        own = at_least_single(head.answer(place, output.tokens[name].pooled()))
        with torch.no_grad():
            answers, has = head.answers(output.features)
            others = head.shrinkage * (answers.sum(dim=1) - answers[:, place])
            score = true_score(others, target, model.task)
            before = _probabilities(answers[:, place - 1], model.task)
            comparable = has[:, place - 1] if int(self.epochs) else torch.zeros_like(has[:, 0])
        apart = (_probabilities(own, model.task) - before).square().sum(dim=-1).masked_fill(~comparable, 0.0)
        losses = boosting_losses(
            model.sample_losses(own, target), score, apart,
            task_weight=self.task_weight, residual=self.residual, agreement=self.agreement,
        )  # fmt: skip
        return masked_mean(losses, has_modality(output, name))

    def end_epoch(self) -> dict[str, float]:
        """Passes the turn on; logs ``shrinkage``."""
        self.epochs += 1
        return {"shrinkage": float(cast(BoostedHead, self._model[0].head).shrinkage.detach())}


class BoostedHead(nn.Module):
    """A linear head for every modality's pooled vector, their answers added and shrunk: nu sum_m (W_m f_m + b_m).

    A modality that a sample lacks adds nothing.

    Args:
        count: modalities.
        dim: width of one vector.
        num_outputs: classes, labels or targets.
        shrinkage: nu at the start.
    """

    def __init__(self, count: int, dim: int, num_outputs: int, shrinkage: float) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(dim, num_outputs) for _ in range(count))
        self.shrinkage = nn.Parameter(torch.tensor(shrinkage))

    def answer(self, place: int, vectors: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch output"]:
        """What one modality answers, in the precision of the weights also under autocast.

        The loss weighs w_1 = 5 times a mean cross entropy, so that in float16 the gradient of a head overflows at the
        scale with which ``GradScaler`` starts.
        """
        part = cast(nn.Linear, self.parts[place])
        with torch.autocast(vectors.device.type, enabled=False):
            return part(vectors.to(part.weight.dtype))

    def answers(self, features: Float[Tensor, "batch feature"]) -> tuple[Tensor, Tensor]:
        """(batch, modality, output) what each modality answers, zero where it is missing, and where it is there."""
        vectors, has = split_concatenated(features, len(self.parts))
        stacked = torch.stack([self.answer(place, vectors[:, place]) for place in range(len(self.parts))], dim=1)
        return at_least_single(stacked).masked_fill(~has[..., None], 0.0), has

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return self.shrinkage * self.answers(features)[0].sum(dim=1)


def _probabilities(logits: Tensor, task: str) -> Tensor:
    """What is compared between modalities: of classes and labels their probabilities, else the answers."""
    if task == "classification":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if task == "multilabel" else logits
