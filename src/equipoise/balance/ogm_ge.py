"""OGM-GE: OGM with gradient noise as generalization enhancement."""

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
    """Returns std(g) + 1e-8, one number for a parameter's whole gradient; the std of a single element is 0.

    Args:
        gradient: gradient of a parameter.
        size: ratio of the gradient to that of the mean loss; the summand 1e-8 is scaled by it.

    Example:
        >>> noise_scale(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
        tensor(2.5820)
    """
    return gradient.std(correction=min(1, gradient.numel() - 1)) + 1e-8 * size


class OGM_GE(OGM):
    """OGM with generalization enhancement: adds noise with the standard deviation of the original gradients.

    For each matrix and kernel of each encoder, also of those with k_m = 1::

        g <- k_m g + xi,   xi ~ N(0, std(g)^2) for each element,   std(g) of the gradient before k_m

    Args:
        model: model, with the requirements of ``OGM``.
        alpha: strength >= 0 of the modulation; with 0 only noise is added.
        start: first epoch with modulation.
        stop: first epoch without modulation again.
        seed: seed of the noise, which depends only on it and on the step number; the same on all processes.

    Raises:
        ConfigError: as ``OGM``.

    It helps SGD with small learning rates, where the noise replaces that of small batches. Adam cancels the modulation
    but not the noise: the gradients then have noise as large as themselves and no balancing.

    Reference: Peng, Wei, Deng, Wang and Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR
    2022), OGM-GE.
    Differs from the released code in: the differences of ``OGM``, and noise from a separate generator; as in the code,
    the variance is one scalar per tensor, where the paper uses the covariance of the gradient.

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
    excludes: ClassVar[Mapping[str, str]] = {**OGM.excludes, "OGM": "OGM-GE includes it"}

    def __init__(self, model: Multimodal, *, alpha: float = 0.3, start: int = 0, stop: int = 50, seed: int = 0) -> None:
        super().__init__(model, alpha=alpha, start=start, stop=stop)
        self.seed = seed
        self.register_buffer("steps", torch.tensor(0))
        # Passed from gradient_scale to before_step; not a buffer, since checkpoints are written between steps.
        self._scales: list[tuple[nn.Parameter, Tensor]] = []

    steps: Tensor

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float] | None:
        """Returns the factors of ``OGM``, and stores the standard deviations of the original gradients."""
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
