"""CML: penalizes confidence that rises when a modality is removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.subset_predictions import subset_logits
from .common.unimodal_scores import has_modality, true_score
from .common.unimodal_terms import at_least_single, check_modalities


def confidence(logits: Float[Tensor, "batch output"], target: Tensor, task: str) -> Float[Tensor, " batch"]:
    """Returns the confidence: the largest probability; for multilabel the mean over labels.

    A regression has no probabilities; it uses ``true_score``, so that removing a modality must not reduce the error.

    Example:
        >>> confidence(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), "classification")
        tensor([0.5000])
    """
    if task == "classification":
        return logits.softmax(dim=-1).amax(dim=-1)
    return logits.abs().sigmoid().mean(dim=-1) if task == "multilabel" else true_score(logits, target, task)


def confidence_rise(confidences: Sequence[Float[Tensor, " batch"]]) -> Float[Tensor, ""]:
    """Returns sum_t mean_i max(0, c_{t+1,i} - c_{t,i}) over steps that each remove a modality.

    Example:
        >>> confidence_rise([torch.tensor([0.6, 0.9]), torch.tensor([0.8, 0.5])])
        tensor(0.1000)
    """
    chain = torch.stack(list(confidences))
    return (chain[1:] - chain[:-1]).relu().sum() / chain.shape[1]


class CML(Balancer):
    """Trains on decreasing subsets of modalities, along which confidence must not rise.

    Modalities are removed one by one, in a random order drawn once per epoch, until one is left; y_t are the logits
    after removing t of them::

        loss = 1/N sum_{t=0}^{N-1} task(y_t) + strength sum_t mean_i max(0, conf(y_{t+1,i}) - conf(y_{t,i}))

    Args:
        model: any fusion; modalities are removed between encoders and fusion.
        strength: the paper's lambda, >= 0.
        seed: seed of the orders.

    Raises:
        ConfigError: one modality, a negative strength.

    Removing a modality that a sample lacks, or its last one, leaves its logits unchanged. It helps if a model is
    overconfident because of one modality, and prepares it for missing modalities. The fusion, not the encoders, runs N
    times, which is cheap for static fusions and expensive for deep ones.

    Reference: Ma et al., "Calibrating Multimodal Learning" (ICML 2023).
    Differs from the released code in: a hinge per sample, where the code, by a bug, has a single one for the sum over
    the batch; any fusion and every task.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.CML(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
    """

    replaces: ClassVar[tuple[str, ...]] = ("task",)

    def __init__(self, model: Multimodal, *, strength: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        check_modalities(model, "CML")
        if not strength >= 0:
            raise ConfigError("CML", expected="strength >= 0", got=f"strength = {strength}")
        self._model, self.strength, self.seed = [model], strength, seed
        self.register_buffer("epochs", torch.tensor(0))

    epochs: Tensor

    def order(self) -> list[str]:
        """Returns the order in which modalities are removed in this epoch; the last one is not removed."""
        names = self._model[0].names
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.epochs))
        return [names[index] for index in torch.randperm(len(names), generator=random).tolist()]

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the mean loss over the subsets plus the penalty on rising confidence."""
        model = self._model[0]
        if output.logits is None:
            raise ConfigError("CML", expected="an output with logits", got="logits = None")
        present = {name: has_modality(output, name) for name in model.names}
        left = torch.stack(list(present.values())).sum(dim=0)
        remaining, chain = self.order(), [at_least_single(output.logits)]
        while len(remaining) > 1:
            name = remaining.pop(0)
            logits = subset_logits(model, output.tokens, remaining)
            removed = (present[name] & (left > 1))[:, None]
            chain.append(torch.where(removed, logits, chain[-1]))
            left = left - present[name].to(left)
        losses = torch.stack([model.loss(logits, target) for logits in chain])
        rise = confidence_rise([confidence(logits, target, model.task) for logits in chain])
        return losses.mean() + self.strength * rise

    def end_epoch(self) -> dict[str, float]:
        self.epochs += 1
        return {}
