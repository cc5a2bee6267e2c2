"""MBSD: modalities that answer alike, the weaker one learning from the stronger where they are apart."""

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
"""No probability is taken to be less, under a logarithm."""


def self_distillation(
    one: Float[Tensor, "batch output"], other: Float[Tensor, "batch output"], target: Tensor, task: str
) -> Float[Tensor, " batch"]:
    """w (|y^1 - y^2|^2 / C + KL(sg strong || weak)) for each sample; see ``MBSD``.

    Example:
        >>> one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> self_distillation(one, other, torch.tensor([1]), "classification")
        tensor([0.8864])
    """
    scores = torch.stack([true_score(logits, target, task) for logits in (one, other)])
    strong, weak = scores.amax(dim=0).detach(), scores.amin(dim=0)
    right = _right(one, target, task) | _right(other, target, task)
    weight = (strong - weak.detach()).masked_fill(~right, 0.0)
    return weight * ((one - other).square().mean(dim=1) + _divergence(strong, weak))


class MBSD(Balancer):
    """Draws the modalities' own answers together, most where one of them is right and the other is far from it.

    With y^m what modality m alone says and p^m its probability of the true class, for each pair of modalities::

        L = task + sum_m task(y^m) + strength mean_i w_i (|y_i^1 - y_i^2|^2 / C + KL(sg strong || weak))
        w_i = |p_i^1 - p_i^2| where at least one of the two is right, else 0;  no gradient through w
        KL(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),  strong the larger of p^1 and p^2, weak the smaller

    More than two modalities have the mean over pairs.

    Args:
        model: with unimodal heads that teach, or logits that are a sum over modalities.
        strength: weight of the last term, >= 0.

    Raises:
        ConfigError: one modality, a strength out of range; in training, nothing that tells the modalities' answers.

    It helps where both modalities can know the answer and one lags. Where each knows what the other cannot, drawing
    their answers together costs what makes them worth fusing.

    Outside classification p is ``true_score``, and right means more than one half. A pair counts for samples that have
    both modalities.

    Reference: balanced self-distillation (MBSD), as BalanceBenchmark has it; spec 3.3.
    Differs from the released code in: a divergence of probabilities, where code has the bug of handing F.kl_div
    probabilities for logarithms; no gradient to the stronger side of it, and any number of modalities.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.MBSD(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
    """

    needs_heads = True
    excludes: ClassVar[Mapping[str, str]] = {"GradientBlending": "both decide what the modalities' losses weigh"}

    def __init__(self, model: Multimodal, *, strength: float = 1.0) -> None:
        super().__init__()
        check_modalities(model, "MBSD")
        if not strength >= 0:
            raise ConfigError("MBSD", expected="strength >= 0", got=f"strength = {strength}")
        self._model, self.strength = [model], strength

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """The distillation, and the modalities' losses where the loop does not count them."""
        model = self._model[0]
        logits = {name: at_least_single(y) for name, y in differentiable_unimodal_logits(model, output, "MBSD").items()}
        here = {name: has_modality(output, name) for name in model.names}
        pairs = list(combinations(model.names, 2))
        apart = [
            masked_mean(self_distillation(logits[a], logits[b], target, model.task), here[a] & here[b])
            for a, b in pairs
        ]
        total = self.strength * torch.stack(apart).mean()
        if heads_train_encoders(model) and output.unimodal_logits:
            return total
        return total + sum(loss.mean for loss in unimodal_losses(model, output, target, "MBSD").values())


def _right(logits: Float[Tensor, "batch output"], target: Tensor, task: str) -> Bool[Tensor, " batch"]:
    if task == "classification":
        return logits.argmax(dim=-1) == target
    return true_score(logits, target, task) > 0.5


def _divergence(p: Float[Tensor, " batch"], q: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """KL between two coins."""
    yes = p * (p.clamp(min=FLOOR).log() - q.clamp(min=FLOOR).log())
    return yes + (1 - p) * ((1 - p).clamp(min=FLOOR).log() - (1 - q).clamp(min=FLOOR).log())
