"""CML: taking a modality away must not make the model more confident."""

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
    """How sure an answer is: the largest probability; for multilabel its mean over labels.

    A regression has no probabilities. There ``true_score`` stands for it, so that taking a modality away must not bring
    the answer closer to the truth.

    Example:
        >>> confidence(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), "classification")
        tensor([0.5000])
    """
    if task == "classification":
        return logits.softmax(dim=-1).amax(dim=-1)
    return logits.abs().sigmoid().mean(dim=-1) if task == "multilabel" else true_score(logits, target, task)


def confidence_rise(confidences: Sequence[Float[Tensor, " batch"]]) -> Float[Tensor, ""]:
    """sum_t mean_i max(0, c_{t+1,i} - c_{t,i}) over steps that each take a modality away.

    Example:
        >>> confidence_rise([torch.tensor([0.6, 0.9]), torch.tensor([0.8, 0.5])])
        tensor(0.1000)
    """
    chain = torch.stack(list(confidences))
    return (chain[1:] - chain[:-1]).relu().sum() / chain.shape[1]


class CML(Balancer):
    """Trains on chains of fewer and fewer modalities, in which confidence must not rise.

    Modalities are taken away one by one in a random order, drawn once an epoch, until one is left; y_t are the logits
    after t of them::

        loss = 1/N sum_{t=0}^{N-1} task(y_t) + strength sum_t mean_i max(0, conf(y_{t+1,i}) - conf(y_{t,i}))

    Args:
        model: any fusion; modalities are taken away between encoders and fusion.
        strength: the paper's lambda, >= 0.
        seed: of the orders.

    Raises:
        ConfigError: one modality, a negative strength.

    A modality that a sample lacks cannot be taken from it, nor its last one: its logits stay as they are. It helps
    where a model is sure of itself for one modality's sake, and makes it ready for missing ones. The fusion, not the
    encoders, runs N times: next to nothing for static fusions, but felt with deep ones.

    Reference: Ma et al., "Calibrating Multimodal Learning" (ICML 2023); spec 3.3.
    Differs from the released code in: a hinge for each sample, where the code has the bug of a single one for the
    batch's sum; any fusion and every task.

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
        """In which order modalities are taken away in this epoch; the last one stays."""
        names = self._model[0].names
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.epochs))
        return [names[place] for place in torch.randperm(len(names), generator=random).tolist()]

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """The mean loss over the chain, and what confidence rises along it."""
        model = self._model[0]
        if output.logits is None:
            raise ConfigError("CML", expected="an output with logits", got="logits = None")
        here = {name: has_modality(output, name) for name in model.names}
        left = torch.stack(list(here.values())).sum(dim=0)
        kept, chain = self.order(), [at_least_single(output.logits)]
        while len(kept) > 1:
            name = kept.pop(0)
            fewer = subset_logits(model, output.tokens, kept)
            taken = (here[name] & (left > 1))[:, None]
            chain.append(torch.where(taken, fewer, chain[-1]))
            left = left - here[name].to(left)
        losses = torch.stack([model.loss(logits, target) for logits in chain])
        rise = confidence_rise([confidence(logits, target, model.task) for logits in chain])
        return losses.mean() + self.strength * rise

    def end_epoch(self) -> dict[str, float]:
        self.epochs += 1
        return {}
