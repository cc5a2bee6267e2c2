"""AMCo: more and more classes are hidden from the modality that dominates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import has_modality, summed
from .common.unimodal_terms import at_least_single, check_modalities, masked_mean


def hidden_part(progress: float, epsilon: float) -> float:
    """The curriculum: which part of the classes is hidden, sin(pi/2 min(progress, epsilon) / epsilon).

    Example:
        >>> round(hidden_part(0.1, 0.3), 6)
        0.5
    """
    return math.sin(math.pi / 2 * min(progress, epsilon) / epsilon)


def masses(
    parts: Float[Tensor, "modality batch output"], here: Bool[Tensor, "modality batch"], task: str
) -> Float[Tensor, "modality batch"]:
    """How much of each sample's answer is each modality's; sums to 1 over those that the sample has.

    Classification: their mass in one softmax over the logits of all modalities together. Multilabel and regression,
    where a strong answer may be negative: their part of the sum of absolute values.

    Example:
        >>> masses(torch.zeros(2, 1, 3), torch.tensor([[True], [True]]), "classification").T
        tensor([[0.5000, 0.5000]])
    """
    if task == "classification":
        scores = parts.logsumexp(dim=-1).masked_fill(~here, -torch.inf)
        return scores.softmax(dim=0).masked_fill(~here, 0.0)
    sizes = parts.abs().sum(dim=-1).masked_fill(~here, 0.0)
    return sizes / sizes.sum(dim=0).clamp(min=torch.finfo(sizes.dtype).tiny)


class AMCo(Balancer):
    """Hides random classes of the dominant modality's logits, more of them with every step::

        y = M sum_m mask_m * y^m + b        mask_m = 0 at floor(p C) random classes if m dominates, else 1
        loss = task(y) + sum_m task(y^m)
        p = sin(pi/2 min(l, epsilon) / epsilon),   l <- l + rate epoch after each step (epochs count from 0)

    A modality dominates when the batch's mean of its mass, in one softmax over the logits of all modalities, is above
    sigma. ``model.head`` becomes the old head followed by M (outputs x outputs); without training it changes nothing.

    Args:
        model: with logits that are a sum over modalities: Concat or Sum.
        sigma: in (0, 1).
        epsilon: at which l all classes are hidden, > 0.
        rate: > 0.
        seed: of the classes.

    Raises:
        ConfigError: one modality, an option out of range; in training, logits that are no sum over modalities.

    It helps where a modality drowns another one's logits. As published it is a short curriculum: in the second epoch l
    grows by 0.1 in each step, so that after three steps a dominant modality is hidden whole; lower ``rate`` to make it
    last. Dominance is decided on each batch, so accumulated batches are not exactly one large one.

    Reference: Zhou et al., "Adaptive Mask Co-optimization for Modal Dependence in Multimodal Learning" (ICASSP 2023);
    spec 3.3.
    Differs from the released code in: M starts as the identity; the dominant modality is decided over all processes,
    among the samples that have a choice, and by absolute values for tasks without classes.

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
    excludes: ClassVar[Mapping[str, str]] = {"MMCosine": "both put a head of their own in place of the model's"}

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
        """The task's loss with classes hidden, and each modality's own."""
        model, head = self._model[0], cast(MixedHead, self._model[0].head)
        found = model.fusion.contributions(output, head.head)
        if found is None:
            raise ConfigError(
                "AMCo", expected="logits that are a sum over modalities",
                got=f"fusion {type(model.fusion).__name__}", fix="Use Concat or Sum: it hides what modalities say.",
            )  # fmt: skip
        parts = torch.stack([at_least_single(found[name]) for name in model.names])
        here = torch.stack([has_modality(output, name) for name in model.names])
        hides = self._dominant(parts.detach(), here)[:, None] & self.hidden_classes().to(here.device)
        shown = parts.masked_fill(hides[:, None], 0.0).sum(dim=0)
        alone = [
            masked_mean(model.sample_losses(part, target), counts) for part, counts in zip(parts, here, strict=True)
        ]
        logits = at_least_single(head.mix(shown.to(head.mix.weight.dtype)))
        if votes := model.votes(output):
            # They join the logits behind M, and what is hidden is not voted for either.
            said = torch.stack([votes[name] for name in model.names])
            logits = logits + said.masked_fill(hides[:, None], 0.0).sum(dim=0)
        return model.loss(logits, target) + torch.stack(alone).sum()

    def hidden_classes(self) -> Bool[Tensor, " output"]:
        """Which classes a dominant modality must not speak of in this step."""
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
        """``hidden``: the part of the classes that a dominant modality does not see."""
        self.epochs += 1
        return {"hidden": hidden_part(float(self.progress), self.epsilon)}

    def _dominant(self, parts: Tensor, here: Tensor) -> Tensor:
        """(modality,) True for the one whose mean mass is above sigma, over samples with two or more modalities."""
        counts = here & (here.sum(dim=0) > 1)
        mass = masses(parts, here, self._model[0].task).masked_fill(~counts, 0.0).sum(dim=1)
        total, size = summed(torch.stack([mass, counts.sum(dim=1).to(mass)]))
        mean = total / size.clamp(min=1)
        return (mean > self.sigma) & (mean == mean.max())


class MixedHead(nn.Module):
    """A head whose logits pass one more linear layer, at first the identity.

    Args:
        head: whatever the model had.
        num_outputs: its logits.
    """

    def __init__(self, head: nn.Module, num_outputs: int) -> None:
        super().__init__()
        like = next(head.parameters(), torch.empty(0))
        self.head = head
        # Without torch's own start, which would draw random numbers.
        mix = nn.utils.skip_init(nn.Linear, num_outputs, num_outputs, device=like.device, dtype=like.dtype)
        self.mix = cast(nn.Linear, mix)
        nn.init.eye_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return self.mix(self.head(features))
