"""OGM: scales down the gradient of the encoder whose modality predicts best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_terms import check_encoders_apart, check_modalities, discrepancy_ratio, score_sums


def modulation(scores: Float[Tensor, " modality"], *, alpha: float) -> Float[Tensor, " modality"]:
    """Returns the factor of each encoder's gradient: 1 - tanh(alpha rho) if rho = s_m / mean_{n != m} s_n > 1, else 1.

    Args:
        scores: (modality,) s_m >= 0; 0 if no sample has the modality.
        alpha: strength >= 0.

    Example:
        >>> modulation(torch.tensor([40.0, 10.0]), alpha=0.1)
        tensor([0.6201, 1.0000])
    """
    ratio = discrepancy_ratio(scores)
    return torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), 1.0)


class OGM(Balancer):
    """Scales down the gradient of each encoder whose modality predicts better than the others.

    With s_m the mean probability of the true class from modality m alone, over the samples of a step that have it::

        rho_m = s_m / mean_{n != m} s_n
        k_m = 1 - tanh(alpha rho_m) where rho_m > 1, else 1;   g_m <- k_m g_m

    for the gradients of the encoders' matrices and kernels, not of biases and norms.

    Args:
        model: with logits that are a sum over modalities (``Concat``, ``Sum``), or with unimodal heads.
        alpha: strength >= 0; 0 changes nothing. The paper uses 0.1 to 0.8.
        start: first epoch with modulation.
        stop: first epoch without modulation again.

    Raises:
        ConfigError: one modality, an option out of range; in training, no source of unimodal logits.

    It helps if one modality converges first and its encoder's gradients dominate, under SGD. Adam cancels the factor.
    The factor jumps from 1 to 1 - tanh(alpha) at rho = 1, so near balance it alternates.

    Reference: Peng, Wei, Deng, Wang and Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR
    2022), OGM.
    Differs from the released code in: all matrices and kernels of an encoder, where the code scales only convolutions,
    and the mean of the others for any number of modalities, where the benchmark, by bugs, divides by the smallest score
    or, by an indentation, only for the last modality.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.OGM(model, alpha=0.3)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
    """

    gradient_scaling_only = True
    excludes: ClassVar[Mapping[str, str]] = {
        "AGM": "both scale the encoders' gradients",
        "MMPareto": "it overwrites the encoders' gradients after they are scaled",
    }

    def __init__(self, model: Multimodal, *, alpha: float = 0.3, start: int = 0, stop: int = 50) -> None:
        super().__init__()
        self._who = type(self).__name__
        check_modalities(model, self._who)
        check_encoders_apart(model, self._who)
        if not alpha >= 0 or not 0 <= start <= stop:
            raise ConfigError(
                self._who, expected="alpha >= 0 and 0 <= start <= stop",
                got=f"alpha = {alpha}, start = {start}, stop = {stop}",
            )  # fmt: skip
        self._model, self.alpha, self.start, self.stop = [model], alpha, start, stop
        self.register_buffer("epoch", torch.tensor(0))
        # In this epoch: sum of each modality's factors, and their number.
        self.register_buffer("used", torch.zeros(len(model.names) + 1, dtype=torch.float64))

    epoch: Tensor
    used: Tensor

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float] | None:
        """Returns k_m from the scores of all samples of the step on all processes; None outside [start, stop)."""
        if not self.start <= int(self.epoch) < self.stop:
            return None
        model = self._model[0]
        total, count = all_reduce_sum(score_sums(model, output, target, self._who))
        factors = modulation(total / count.clamp(min=1), alpha=self.alpha)
        self.used = self.used.to(factors.device) + torch.cat([factors, factors.new_ones(1)])
        return dict(zip(model.names, factors, strict=True))

    def end_epoch(self) -> dict[str, float]:
        """Returns ``scale/<name>``, the mean factor of each encoder's gradient in this epoch; 1 if there was none."""
        *sums, count = self.used.tolist()
        self.used.zero_()
        self.epoch += 1
        names = self._model[0].names
        return {f"scale/{name}": s / count if count else 1.0 for name, s in zip(names, sums, strict=True)}
