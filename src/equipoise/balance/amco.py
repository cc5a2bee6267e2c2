"""AMCo: masks an increasing part of the classes in the logits of the dominant modality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import has_modality
from .common.unimodal_terms import at_least_single, check_modalities, masked_mean


def hidden_part(progress: float, epsilon: float) -> float:
    """Returns the part of the classes that is masked, sin(pi/2 min(progress, epsilon) / epsilon).

    Example:
        >>> round(hidden_part(0.1, 0.3), 6)
        0.5
    """
    return math.sin(math.pi / 2 * min(progress, epsilon) / epsilon)


def masses(
    parts: Float[Tensor, "modality batch output"], present: Bool[Tensor, "modality batch"], task: str
) -> Float[Tensor, "modality batch"]:
    """Returns each modality's share of each sample's prediction; sums to 1 over the sample's modalities.

    Classification: the mass in one softmax over the concatenated logits of all modalities. Multilabel and regression,
    where strong predictions may be negative: the share of the sum of absolute values.

    Example:
        >>> masses(torch.zeros(2, 1, 3), torch.tensor([[True], [True]]), "classification").T
        tensor([[0.5000, 0.5000]])
    """
    if task == "classification":
        scores = parts.logsumexp(dim=-1).masked_fill(~present, -torch.inf)
        return scores.softmax(dim=0).masked_fill(~present, 0.0)
    sizes = parts.abs().sum(dim=-1).masked_fill(~present, 0.0)
    return sizes / sizes.sum(dim=0).clamp(min=torch.finfo(sizes.dtype).tiny)


class AMCo(Balancer):
    """Masks random classes in the dominant modality's logits, more of them with each step::

        y = M sum_m mask_m * y^m + b        mask_m = 0 at floor(p C) random classes if m dominates, else 1
        loss = task(y) + sum_m task(y^m)
        p = sin(pi/2 min(l, epsilon) / epsilon),   l <- l + rate epoch after each step (epochs count from 0)

    A modality is dominant if the batch mean of its mass, in one softmax over the logits of all modalities, is above
    sigma. ``model.head`` is replaced by the old head followed by M (outputs x outputs), initialized as the identity.

    Args:
        model: with logits that are a sum over modalities: Concat or Sum.
        sigma: threshold of dominance, in (0, 1).
        epsilon: value of l from which all classes are masked, > 0.
        rate: growth of l, > 0.
        seed: seed of the random classes.

    Raises:
        ConfigError: one modality, an option out of range; in training, logits that are not a sum over modalities.

    It helps if the logits of one modality dominate. As published it is a short curriculum: in the second epoch l grows
    by 0.1 in each step, so that after three steps all logits of a dominant modality are masked; lower ``rate`` to
    extend it. Dominance is decided on each batch, so accumulated batches are not exactly equivalent to one large batch.

    Reference: Zhou et al., "Adaptive Mask Co-optimization for Modal Dependence in Multimodal Learning" (ICASSP 2023).
    Differs from the released code in: M starts as the identity; the dominant modality is decided over all processes,
    among the samples with several modalities, and by absolute values for tasks without classes.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.AMCo(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> balancing.end_epoch()
        {'hidden': 0.0}
    """

    replaces: ClassVar[tuple[str, ...]] = ("task",)
    excludes: ClassVar[Mapping[str, str]] = {"MMCosine": "both replace the model's head"}

    def __init__(
        self, model: Multimodal, *, sigma: float = 0.5, epsilon: float = 0.3, rate: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        check_modalities(model, "AMCo")
        if not 0 < sigma < 1 or not epsilon > 0 or not rate > 0:
            raise ConfigError(
                "AMCo", expected="0 < sigma < 1, epsilon > 0 and rate > 0", got=f"{sigma = }, {epsilon = }, {rate = }"
            )
        model.head = MixedHead(model.head, model.num_outputs)
        self._model, self.sigma, self.epsilon, self.rate, self.seed = [model], sigma, epsilon, rate, seed
        self.register_buffer("epochs", torch.tensor(0))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("progress", torch.tensor(0.0, dtype=torch.float64))

    epochs: Tensor
    steps: Tensor
    progress: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the task loss with masked classes plus the unimodal losses."""
        model, head = self._model[0], cast(MixedHead, self._model[0].head)
        contributions = model.fusion.contributions(output, head.head)
        if contributions is None:
            raise ConfigError(
                "AMCo",
                expected="logits that are a sum over modalities",
                got=f"fusion {type(model.fusion).__name__}",
                fix="Use Concat or Sum: it masks the contributions of modalities.",
            )
        parts = torch.stack([at_least_single(contributions[name]) for name in model.names])
        present = torch.stack([has_modality(output, name) for name in model.names])
        masked = self._dominant(parts.detach(), present)[:, None] & self.masked_classes().to(present.device)
        visible = parts.masked_fill(masked[:, None], 0.0).sum(dim=0)
        unimodal = [
            masked_mean(model.sample_losses(part, target), mask) for part, mask in zip(parts, present, strict=True)
        ]
        logits = at_least_single(head.mix(visible.to(head.mix.weight.dtype)))
        if ensemble_logits := model.ensemble_logits(output):
            # Ensemble logits are added after M, with the same classes masked.
            added = torch.stack([ensemble_logits[name] for name in model.names])
            logits = logits + added.masked_fill(masked[:, None], 0.0).sum(dim=0)
        return model.loss(logits, target) + torch.stack(unimodal).sum()

    def masked_classes(self) -> Bool[Tensor, " output"]:
        """Returns the classes that are masked for a dominant modality in this step."""
        outputs = self._model[0].num_outputs
        number = math.floor(hidden_part(float(self.progress), self.epsilon) * outputs)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.steps))
        hidden = torch.zeros(outputs, dtype=torch.bool)
        hidden[torch.randperm(outputs, generator=random)[:number]] = True
        return hidden

    changes_gradients = False

    def before_step(self) -> None:
        self.steps += 1
        self.progress += self.rate * int(self.epochs)

    def end_epoch(self) -> dict[str, float]:
        """Returns ``hidden``, the part of the classes that is masked for a dominant modality."""
        self.epochs += 1
        return {"hidden": hidden_part(float(self.progress), self.epsilon)}

    def _dominant(self, parts: Tensor, present: Tensor) -> Tensor:
        """Returns (modality,) True for a modality with mean mass above sigma, over samples with several modalities."""
        counts = present & (present.sum(dim=0) > 1)
        mass = masses(parts, present, self._model[0].task).masked_fill(~counts, 0.0).sum(dim=1)
        total, size = all_reduce_sum(torch.stack([mass, counts.sum(dim=1).to(mass)]))
        mean = total / size.clamp(min=1)
        return (mean > self.sigma) & (mean == mean.max())


class MixedHead(nn.Module):
    """A head followed by a linear layer that is initialized as the identity.

    Args:
        head: head of the model.
        num_outputs: number of logits.
    """

    def __init__(self, head: nn.Module, num_outputs: int) -> None:
        super().__init__()
        like = next(head.parameters(), torch.empty(0))
        self.head = head
        # Skip torch's default initialization, which would consume random numbers.
        mix = nn.utils.skip_init(nn.Linear, num_outputs, num_outputs, device=like.device, dtype=like.dtype)
        self.mix = cast(nn.Linear, mix)
        nn.init.eye_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return self.mix(self.head(features))
