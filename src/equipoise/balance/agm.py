"""AGM: scales encoder gradients by the deviation of a modality's error from its running mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..fusion.subset_tokens import derived, modality_subsets, shapley_values
from ..nn.distributed import all_reduce_sum
from ..nn.eval_mode import eval_mode_no_grad
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.subset_predictions import subset_logits
from .common.unimodal_scores import has_modality, true_score
from .common.unimodal_terms import check_encoders_apart, check_modalities, mean_of_others

FLOOR = 1e-8
"""Minimum probability, to bound errors."""
CEILING = 7.0
"""Maximum of tau - r."""


def coefficients(
    errors: Float[Tensor, " modality"],
    usual: Float[Tensor, " modality"],
    valid: Bool[Tensor, " modality"],
    *,
    alpha: float,
) -> Float[Tensor, " modality"]:
    """kappa_m = exp(alpha min(tau_m - r_m, 7)).

    r_m = exp(mean_{n != m} e_n - e_m), and tau_m is the same of the mean errors.

    Args:
        errors: (modality,) e_m of this step.
        usual: (modality,) means of e_m over the previous steps.
        valid: (modality,) False if the modality has no error in this step or had none before; its coefficient is 1.
        alpha: strength.

    Example:
        >>> coefficients(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]), torch.tensor([True, True]), alpha=0.1)
        tensor([0.9387, 1.1875])
    """
    ratio, mean_ratio = ((mean_of_others(values, valid) - values).exp() for values in (errors, usual))
    return torch.where(valid, (alpha * (mean_ratio - ratio).clamp(max=CEILING)).exp(), 1.0)


class AGM(Balancer):
    """Scales each encoder's gradient by comparing the modality's relative error with its running mean.

    With phi_m the Shapley value of modality m's tokens for the logits, over all subsets including the empty one::

        e_m = mean_i -log softmax(phi_m)[y_i]
        r_m = exp(mean_{n != m} e_n - e_m)
        tau_m: the same of the means of e over the previous steps
        kappa_m = exp(alpha min(tau_m - r_m, 7));   g_m <- kappa_m g_m

    A modality with a smaller error than the others has r > 1. If its lead is larger than usual, r > tau, its encoder's
    gradient is reduced. In the first step with a modality there is no tau, and kappa is 1.

    If an element of the head's gradient exceeds ``clip``, the norm of the model's whole gradient is clipped to it; both
    are measured on the gradient of the mean loss, independently of how the loop scales it.

    Subsets are evaluated by fusing the encoders' tokens again, in evaluation mode and without gradient. The other
    modalities have no tokens, since zeros would still get attention.

    Args:
        model: any fusion; unimodal heads are not needed.
        alpha: strength >= 0.
        clip: > 0; infinity never clips.

    Raises:
        ConfigError: one modality, an option out of range.

    It helps if modalities temporarily fall behind, under SGD; Adam cancels the factor. The fusion runs 2^N times, which
    is cheap for static fusions of a few modalities and expensive for deep fusions of five. In a regression the Shapley
    value, which is only a part of the prediction, is compared with the whole target.

    Reference: Li, Li, Hu, Lei, Li and Zhou, "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation"
    (ICCV 2023).
    Differs from the released code in: the whole Shapley value, where the code omits the value of the empty set and the
    benchmark, by a bug, all terms with it; only matrices and kernels are scaled.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.AGM(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
    """

    gradient_scaling_only = True
    excludes: ClassVar[Mapping[str, str]] = {
        "OGM_GE": "both scale the encoders' gradients",
        "MMPareto": "it overwrites the encoders' gradients after they are scaled",
    }

    def __init__(self, model: Multimodal, *, alpha: float = 0.1, clip: float = 5.0) -> None:
        super().__init__()
        check_modalities(model, "AGM")
        check_encoders_apart(model, "AGM")
        if not alpha >= 0 or not clip > 0:
            raise ConfigError("AGM", expected="alpha >= 0 and clip > 0", got=f"alpha = {alpha}, clip = {clip}")
        self._model, self.alpha, self.clip = [model], alpha, clip
        count = len(model.names)
        # Running mean of each modality's errors, and number of steps.
        self.register_buffer("usual", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(count, dtype=torch.float64))
        # In this epoch: sum of each modality's factors, and their number.
        self.register_buffer("used", torch.zeros(count + 1, dtype=torch.float64))

    usual: Tensor
    steps: Tensor
    used: Tensor

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float]:
        """Returns kappa_m for all samples of the step on all processes."""
        names = self._model[0].names
        total, count = all_reduce_sum(self._error_sums(output, target))
        errors = total / count.clamp(min=1)
        valid, errors = (count > 0) & errors.isfinite(), errors.nan_to_num()
        self.to(errors.device)
        factors = coefficients(errors, self.usual, valid & (self.steps > 0), alpha=self.alpha)
        self.steps += valid
        self.usual += torch.where(valid, (errors - self.usual) / self.steps.clamp(min=1), 0.0)
        self.used += torch.cat([factors, factors.new_ones(1)])
        return dict(zip(names, factors, strict=True))

    def before_step(self) -> None:
        """Clips the gradient, without a GPU sync."""
        model: nn.Module = self._model[0]  # type: ignore[assignment]
        heads = [p.grad for p in self._model[0].head.parameters() if p.grad is not None]
        if not heads or math.isinf(self.clip):
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        largest = torch.stack([gradient.abs().max() for gradient in heads]).max()
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        bound = self.clip * self.gradient_size()
        factor = torch.where(largest > bound, (bound / norm.clamp(min=FLOOR)).clamp(max=1.0), 1.0)
        for gradient in gradients:
            gradient.mul_(factor)

    def end_epoch(self) -> dict[str, float]:
        """Returns ``scale/<name>``, the mean factor of each encoder's gradient in this epoch."""
        *sums, count = self.used.tolist()
        self.used.zero_()
        names = self._model[0].names
        return {f"scale/{name}": s / count if count else 1.0 for name, s in zip(names, sums, strict=True)}

    def _error_sums(self, output: Output, target: Tensor) -> Float[Tensor, "2 modality"]:
        """Returns, for each modality, the sum of its errors over the samples that have it, and their number."""
        model = self._model[0]
        # Tokens may be half precision while the weights are not, and the autocast context may have exited.
        dtype = next(model.head.parameters()).dtype
        tokens = {name: replace(part, values=part.values.to(dtype)) for name, part in output.tokens.items()}
        tokens = derived(output.tokens, tokens)
        with eval_mode_no_grad(model):  # type: ignore[arg-type]
            logits = torch.stack([subset_logits(model, tokens, subset) for subset in modality_subsets(model.names)])
        columns = []
        for name, response in zip(model.names, shapley_values(logits), strict=True):
            present = has_modality(output, name)
            errors = -true_score(response, target, model.task).clamp(min=FLOOR).log()
            columns.append(torch.stack([errors.masked_fill(~present, 0.0).sum(), present.sum()]).double())
        return torch.stack(columns, dim=1)
