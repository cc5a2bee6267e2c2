"""LFM: adds the divergence of unimodal predictions to the loss, with a learned weight."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.gradients_by_term import term_gradients
from .common.unimodal_scores import has_modality, modality_logits
from .common.unimodal_terms import at_least_single, check_modalities, masked_mean

LEAST, MOST = 0.05, 0.95
"""Bounds of the learned weight."""


def divergence(
    one: Float[Tensor, "batch output"], other: Float[Tensor, "batch output"], task: str
) -> Float[Tensor, " batch"]:
    """Returns the Jensen-Shannon divergence of the predictions of two modalities.

    Classification: of the two softmaxes, at most log 2. Multilabel: of each label's probability, mean over labels.
    Regression: the predictions are means of normal distributions of variance 1, compared with the normal distribution
    around their mean, (a - b)^2 / 8, mean over outputs.

    Example:
        >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[99.0, 0.0]]), "classification")
        tensor([0.2158])
    """
    if task == "regression":
        return (one - other).square().mean(dim=-1) / 8
    if task == "multilabel":
        p, q = (torch.stack([F.logsigmoid(y), F.logsigmoid(-y)], dim=-1) for y in (one, other))
    else:
        p, q = one.log_softmax(dim=-1)[:, None], other.log_softmax(dim=-1)[:, None]
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle) + q.exp() * (q - middle)).sum(dim=-1) / 2).mean(dim=-1)


def hyper_gradient(task: Float[Tensor, " n"], apart: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Returns the derivative of the task loss after a small gradient step with respect to a_1, per unit of step size.

    The step is along 2 ((1 - a_1) g_task + a_1 g_apart), so that d task / d a_1 = 2 (g_task - g_apart) . g_task.

    Example:
        >>> hyper_gradient(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]))
        tensor(4.)
    """
    return 2 * ((task - apart) * task).sum()


class LFM(Balancer):
    """Adds the divergence of the modalities' predictions to the task loss, with a learned weight::

        loss = 2 (a_0 task + a_1 mean over pairs JS(y^m, y^n)),   a_0 + a_1 = 1
        after each step  a_1 <- clip(a_1 - rate 2 (g_task - g_JS) . g_task, 0.05, 0.95)

    with g the gradients of both terms with respect to all parameters. The rate is halved every 20 epochs.

    Args:
        model: with logits that are a sum over modalities, or unimodal heads that train the encoders.
        a1: weight of the divergence, in [0, 1]; the initial weight if it is learned.
        schedule: ``"learned"`` or ``"fixed"``.
        rate: learning rate of a_1, > 0.

    Raises:
        ConfigError: one modality, an option out of range; in training, no trainable unimodal logits.

    It helps if one modality predicts well and the others can learn its predictions. If modalities carry different
    information, agreement discards it. Learning a_1 takes two more backward passes, so that an epoch takes about twice
    as long; they run when the loop calls ``backward`` and are scaled as the loop scales the loss. A fixed weight costs
    almost nothing. In recipes the unimodal heads train the encoders, so that their losses are added.

    Reference: Yang et al., "Facilitating Multimodal Classification via Dynamically Learning Modality Gap" (NeurIPS
    2024).
    Differs from the released code in: a true Jensen-Shannon divergence, where the code, by a bug, swaps the logs; the
    hyper-gradient uses all parameters, where the code uses only the first tensor; the divergence of a regression is our
    extension.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.LFM(model, a1=0.5)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> 0.05 <= balancing.end_epoch()["a1"] <= 0.95
        True
    """

    replaces: ClassVar[tuple[str, ...]] = ("task",)
    needs_heads = True
    changes_gradients = False

    def __init__(
        self, model: Multimodal, *, a1: float = 0.5, schedule: Literal["learned", "fixed"] = "learned",
        rate: float = 1e-4,
    ) -> None:  # fmt: skip
        super().__init__()
        check_modalities(model, "LFM")
        if not 0 <= a1 <= 1 or not rate > 0 or schedule not in ("learned", "fixed"):
            raise ConfigError(
                "LFM", expected="0 <= a1 <= 1, rate > 0 and schedule 'learned' or 'fixed'",
                got=f"{a1 = }, {rate = }, {schedule = }",
            )  # fmt: skip
        self._model, self.schedule, self.rate = [model], schedule, rate
        self.register_buffer("a1", torch.tensor(a1, dtype=torch.float64))
        self.register_buffer("epochs", torch.tensor(0))

    a1: Tensor
    epochs: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the weighted sum of both terms; registers their gradients if the weight is learned."""
        model = self._model[0]
        if output.logits is None:
            raise ConfigError("LFM", expected="an output with logits", got="logits = None")
        task, apart = model.loss(output.logits, target), self._divergence(output)
        if self.schedule == "learned":
            self.when_reached(partial(self._gradients, task, apart, len(target)))
        a1 = self.a1.to(task)
        return 2 * ((1 - a1) * task + a1 * apart)

    def before_step(self) -> None:
        sums = self.noted_sum("gradients")
        if sums is None:
            return
        sums = all_reduce_sum(sums)
        task, apart = (sums[:, :-1] / sums[:, -1:].clamp(min=1)).double()
        rate = self.rate * 0.5 ** (int(self.epochs) // 20)
        # Ignore a product that overflows; NaN would persist.
        change = torch.nan_to_num(rate * hyper_gradient(task, apart), nan=0.0, posinf=0.0, neginf=0.0)
        self.a1 = (self.a1.to(task) - change).clamp(LEAST, MOST)

    def end_epoch(self) -> dict[str, float]:
        """Returns ``a1``, the weight of the divergence."""
        self.epochs += 1
        return {"a1": float(self.a1)}

    def _divergence(self, output: Output) -> Tensor:
        """Returns the mean divergence over pairs of modalities, each over the samples that have both."""
        model = self._model[0]
        logits = modality_logits(model, output, "LFM", trains=True)
        pairs = []
        for one, other in combinations(model.names, 2):
            losses = divergence(at_least_single(logits[one]), at_least_single(logits[other]), model.task)
            pairs.append(masked_mean(losses, has_modality(output, one) & has_modality(output, other)))
        return torch.stack(pairs).mean()

    def _gradients(self, task: Tensor, apart: Tensor, size: int, gradient: Tensor) -> dict[str, Tensor]:
        """Returns both gradients times samples, and the number of samples.

        Gradients are computed at the loss scale of the training loop, and then unscaled.
        """
        gradients = torch.stack([self._gradient(term, gradient) for term in (task, apart)]) / gradient
        return {"gradients": torch.cat([gradients * size, gradients.new_full((2, 1), size)], dim=1)}

    def _gradient(self, loss: Tensor, gradient: Tensor) -> Tensor:
        """Returns the gradient with respect to all trainable parameters as one vector."""
        model: Any = self._model[0]
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = term_gradients(loss, parameters, gradient, "LFM")
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, gradients, strict=True)]
        )
