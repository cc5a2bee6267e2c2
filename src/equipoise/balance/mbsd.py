"""MBSD: balanced self-distillation from the stronger to the weaker modality of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ConfigError
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import has_modality, heads_train_encoders, true_score
from .common.unimodal_terms import (
    at_least_single,
    check_modalities,
    differentiable_unimodal_logits,
    masked_mean,
    unimodal_losses,
)

FLOOR = 1e-8
"""Minimum probability in logarithms."""


def self_distillation(
    one: Float[Tensor, "batch output"], other: Float[Tensor, "batch output"], target: Tensor, task: str
) -> Float[Tensor, " batch"]:
    """Returns w (|y^1 - y^2|^2 / C + KL(sg strong || weak)) for each sample; see ``MBSD``.

    Example:
        >>> one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> self_distillation(one, other, torch.tensor([1]), "classification")
        tensor([0.8864])
    """
    scores = torch.stack([true_score(logits, target, task) for logits in (one, other)])
    strong, weak = scores.amax(dim=0).detach(), scores.amin(dim=0)
    correct = _correct(one, target, task) | _correct(other, target, task)
    weight = (strong - weak.detach()).masked_fill(~correct, 0.0)
    return weight * ((one - other).square().mean(dim=1) + _divergence(strong, weak))


class MBSD(Balancer):
    """Pulls unimodal predictions together, most if one of them is correct and the other differs.

    With y^m the unimodal logits of modality m and p^m its probability of the true class, for each pair of modalities::

        L = task + sum_m task(y^m) + strength mean_i w_i (|y_i^1 - y_i^2|^2 / C + KL(sg strong || weak))
        w_i = |p_i^1 - p_i^2| if at least one of the two is correct, else 0;  no gradient through w
        KL(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),  strong the larger of p^1 and p^2, weak the smaller

    For more than two modalities it is the mean over pairs.

    Args:
        model: with unimodal heads that train the encoders, or logits that are a sum over modalities.
        strength: weight of the last term, >= 0.

    Raises:
        ConfigError: one modality, a strength out of range; in training, no trainable unimodal logits.

    It helps if both modalities can predict the target and one lags behind. If they carry different information, pulling
    their predictions together discards it.

    For other tasks p is ``true_score``, and a prediction is correct if it exceeds one half. A pair counts for samples
    that have both modalities.

    Reference: balanced self-distillation (MBSD), as implemented in BalanceBenchmark (GeWu-Lab, 2025).
    Differs from the released code in: a divergence of probabilities, where the code, by a bug, passes probabilities to
    F.kl_div as log probabilities; no gradient to the stronger side, and any number of modalities.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.MBSD(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
    """

    needs_heads = True
    excludes: ClassVar[Mapping[str, str]] = {"GradientBlending": "both set the weights of the unimodal losses"}

    def __init__(self, model: Multimodal, *, strength: float = 1.0) -> None:
        super().__init__()
        check_modalities(model, "MBSD")
        if not strength >= 0:
            raise ConfigError("MBSD", expected="strength >= 0", got=f"strength = {strength}")
        self._model, self.strength = [model], strength

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the distillation term, plus the unimodal losses if they are not part of the loss yet."""
        model = self._model[0]
        logits = {name: at_least_single(y) for name, y in differentiable_unimodal_logits(model, output, "MBSD").items()}
        present = {name: has_modality(output, name) for name in model.names}
        pairs = list(combinations(model.names, 2))
        apart = [
            masked_mean(self_distillation(logits[a], logits[b], target, model.task), present[a] & present[b])
            for a, b in pairs
        ]
        total = self.strength * torch.stack(apart).mean()
        if heads_train_encoders(model) and output.unimodal_logits:
            return total
        return total + sum(loss.mean for loss in unimodal_losses(model, output, target, "MBSD").values())


def _correct(logits: Float[Tensor, "batch output"], target: Tensor, task: str) -> Bool[Tensor, " batch"]:
    if task == "classification":
        return logits.argmax(dim=-1) == target
    return true_score(logits, target, task) > 0.5


def _divergence(p: Float[Tensor, " batch"], q: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Returns the KL divergence between two Bernoulli distributions."""
    positive = p * (p.clamp(min=FLOOR).log() - q.clamp(min=FLOOR).log())
    return positive + (1 - p) * ((1 - p).clamp(min=FLOOR).log() - (1 - q).clamp(min=FLOOR).log())
