"""OGM-GE: OGM, and noise that makes up for the gradient that it takes away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..tokens.token_batch import Output
from .balancer import Multimodal
from .balancer_list import encoder_weight_matrices
from .common.step_rng import step_generator
from .ogm import OGM


def noise_scale(gradient: Tensor, *, size: Tensor | float = 1.0) -> Float[Tensor, ""]:
    """std(g) + 1e-8, one number for a parameter's whole gradient; a single element has no spread.

    Args:
        gradient: of a parameter.
        size: how many times the gradient of the mean loss it is; the summand 1e-8 is scaled by it.

    Example:
        >>> noise_scale(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
        tensor(2.5820)
    """
    return gradient.std(correction=min(1, gradient.numel() - 1)) + 1e-8 * size


class OGM_GE(OGM):
    """OGM with generalization enhancement: noise of the size of the gradients as they were before it.

    For every matrix and kernel of every encoder, also of those that are not slowed down::

        g <- k_m g + xi,   xi ~ N(0, std(g)^2) for each element,   std(g) of the gradient before k_m

    Args:
        model: as ``OGM`` takes it.
        alpha: strength >= 0 of the modulation; at 0 there is noise alone.
        start: epochs before it begins.
        stop: epochs after which it ends.
        seed: of the noise, which depends on it and on the number of the step alone; the same on all processes.

    Raises:
        ConfigError: as ``OGM``.

    It helps SGD with small learning rates, where the noise stands for that of small batches. Under Adam the modulation
    is divided out and the noise is not: what remains is noise as large as the gradients.

    Reference: Peng, Wei, Deng, Wang and Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR
    2022), OGM-GE; spec 3.1.
    Differs from the released code in: what ``OGM`` does, and noise from a generator of its own; as in the code its
    variance is the scalar one of each tensor, where the paper means the gradient's covariance.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.OGM_GE(model, alpha=0.3)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
    """

    name = "ogm_ge"
    gradient_scaling_only = False
    excludes: ClassVar[Mapping[str, str]] = {**OGM.excludes, "OGM": "it is a part of OGM-GE"}

    def __init__(self, model: Multimodal, *, alpha: float = 0.3, start: int = 0, stop: int = 50, seed: int = 0) -> None:
        super().__init__(model, alpha=alpha, start=start, stop=stop)
        self.seed = seed
        self.register_buffer("steps", torch.tensor(0))
        # From one moment of a step to the next; no state, since checkpoints come between steps.
        self._scales: list[tuple[nn.Parameter, Tensor]] = []

    steps: Tensor

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float] | None:
        """As ``OGM``; notes how large the gradients are before anything is done to them."""
        factors, encoders = super().gradient_scale(output, target), self._model[0].encoders
        if factors is not None:
            weights = [p for name in factors for p in encoder_weight_matrices(encoders[name])]
            size = self.gradient_size()
            self._scales = [(p, noise_scale(p.grad, size=size)) for p in weights if p.grad is not None]
        return factors

    def before_step(self) -> None:
        """Adds the noise."""
        random: dict[torch.device, torch.Generator] = {}
        for parameter, scale in self._scales:
            gradient, device = parameter.grad, parameter.device
            if device not in random:
                random[device] = step_generator(self.seed, int(self.steps), device=device)
            if gradient is not None:
                noise = torch.randn(gradient.shape, generator=random[device], device=device, dtype=gradient.dtype)
                gradient.add_(noise * scale)
        self._scales = []
        self.steps += 1
