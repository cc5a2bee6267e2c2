"""ARL: enlarges the gradient of each encoder by the certainty of its modality and by how little it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import has_modality, heads_train_encoders, prediction_entropy
from .common.unimodal_terms import (
    at_least_single,
    check_encoders_apart,
    check_modalities,
    differentiable_unimodal_logits,
    mean_of_others,
    unimodal_losses,
)


def asymmetric_factors(
    variance: Float[Tensor, " modality"], use: Float[Tensor, " modality"], known: Bool[Tensor, " modality"], *,
    temperature: float, floor: float,
) -> Float[Tensor, " modality"]:  # fmt: skip
    """Returns the factor of each encoder's gradient, 1 + softmax(temperature a_m d_m).

    a_m is 1 / H_m, normalized to sum 1, with H the variances normalized to sum 1 and clamped to at least ``floor / N``;
    d_m is the mean of the other modalities' parts of the use.

    Args:
        variance: (modality,) variance of the predictions >= 0, or their entropy.
        use: (modality,) size of the logits >= 0.
        known: (modality,) False for a modality that no sample has, whose factor is 1.

    Example:
        >>> known = torch.tensor([True, True])
        >>> asymmetric_factors(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), known, temperature=8.0, floor=0.6)
        tensor([1.8474, 1.1526])
    """
    tiny = torch.finfo(variance.dtype).tiny
    variance, use = variance.masked_fill(~known, 0.0), use.masked_fill(~known, 0.0)
    share = (variance / variance.sum().clamp(min=tiny)).clamp(min=floor / known.sum().clamp(min=1))
    certainty = (1 / share).masked_fill(~known, 0.0)
    certainty = certainty / certainty.sum().clamp(min=tiny)
    others = mean_of_others(use / use.sum().clamp(min=tiny), known)
    scores = (temperature * others * certainty).masked_fill(~known, -torch.inf)
    return 1 + torch.where(known, scores.softmax(dim=0), 0.0)


class ARL(Balancer):
    """Makes the dependence on each modality inversely proportional to its variance.

    With H_m the mean entropy of the predictions from modality m alone and D_m the mean sum of their absolute logits,
    each divided by its sum over modalities, over the samples of a step that have m::

        a_m = (1 / H_m) / sum_n (1 / H_n),   w = softmax_m(temperature a_m mean_{n != m} D_n)
        g_m <- (1 + w_m) g_m;   loss = task + gamma sum_m l_m

    for the gradients of the encoders' matrices and kernels. A regression has no entropy: H_m is the mean squared error.

    Args:
        model: with unimodal heads that train the encoders, or logits that are a sum over modalities.
        gamma: weight of the unimodal losses, >= 0.
        temperature: > 0; a larger one favors one modality more.
        floor: H_m is clamped to at least ``floor / N``, in (0, 1]; 0.6 is the 0.3 of the code for two modalities.
        start: first epoch with scaled gradients.

    Raises:
        ConfigError: one modality, an option out of range; in training, no trainable unimodal logits.

    It helps if modalities differ in noise: imbalance is then right, and the method slows the noisy one. Entropy is a
    poor proxy of variance for overconfident predictions. Adam cancels the factors, so that only the unimodal losses
    remain: use SGD, as the paper does.

    Reference: Wei, Luo and Luo, "Improving Multimodal Learning via Imbalanced Learning" (ICCV 2025), ARL.
    Differs from the released code in: whole optimizer steps over all processes, any number of modalities, where the use
    of the others is averaged; multilabel targets, by the entropy of each label, and regressions; unimodal heads, if
    they train the encoders, where the code evaluates the fusion with zeros in place of the others. The text of the
    paper was not available beyond its introduction: the formulas are those of the code.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.ARL(model, start=0)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> round(sum(balancing.end_epoch().values()), 4)
        3.0
    """

    needs_heads = True
    excludes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("AGM", "CGGM", "OGM", "OGM_GE"), "both scale the encoders' gradients"),
        "GradientBlending": "both set the weights of the unimodal losses",
        "MMPareto": "it overwrites the encoders' gradients after they are scaled",
    }

    def __init__(
        self, model: Multimodal, *, gamma: float = 1.0, temperature: float = 8.0, floor: float = 0.6, start: int = 5
    ) -> None:
        super().__init__()
        check_modalities(model, "ARL")
        check_encoders_apart(model, "ARL")
        if not gamma >= 0 or not temperature > 0 or not 0 < floor <= 1 or start < 0:
            raise ConfigError(
                "ARL", expected="gamma >= 0, temperature > 0, 0 < floor <= 1 and start >= 0",
                got=f"gamma = {gamma}, temperature = {temperature}, floor = {floor}, start = {start}",
            )  # fmt: skip
        self._model, self.gamma, self.temperature, self.floor, self.start = [model], gamma, temperature, floor, start
        self.register_buffer("epoch", torch.tensor(0))
        # In this epoch: sum of each modality's factors, and their number.
        self.register_buffer("used", torch.zeros(len(model.names) + 1, dtype=torch.float64))

    epoch: Tensor
    used: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Returns the unimodal losses times gamma, less what is part of the loss already."""
        model = self._model[0]
        counted = bool(heads_train_encoders(model) and output.unimodal_logits)
        weight = self.gamma - counted
        if weight == 0:
            return None
        losses = unimodal_losses(model, output, target, "ARL").values()
        return weight * torch.stack([loss.mean for loss in losses]).sum()

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float] | None:
        """Returns 1 + w_m from all samples of the step on all processes; None before epoch ``start``."""
        if int(self.epoch) < self.start:
            return None
        names = self._model[0].names
        variance, use, count = all_reduce_sum(self._sums(output, target))
        factors = asymmetric_factors(
            variance / count.clamp(min=1), use / count.clamp(min=1), count > 0, temperature=self.temperature,
            floor=self.floor,
        )  # fmt: skip
        self.used = self.used.to(factors.device) + torch.cat([factors, factors.new_ones(1)])
        return dict(zip(names, factors, strict=True))

    def end_epoch(self) -> dict[str, float]:
        """Returns ``scale/<name>``, the mean factor of each encoder's gradient in this epoch; 1 if there was none."""
        *sums, count = self.used.tolist()
        self.used.zero_()
        self.epoch += 1
        names = self._model[0].names
        return {f"scale/{name}": s / count if count else 1.0 for name, s in zip(names, sums, strict=True)}

    def _sums(self, output: Output, target: Tensor) -> Float[Tensor, "3 modality"]:
        """Returns sums of variances and of absolute logits over the samples that have a modality, and their number."""
        model, columns = self._model[0], []
        every = differentiable_unimodal_logits(model, output, "ARL")
        for name in model.names:
            logits, present = at_least_single(every[name].detach()), has_modality(output, name)
            if model.task == "regression":
                variance = model.sample_losses(logits, target)
            else:
                variance = prediction_entropy(logits, model.task)
            values = torch.stack([variance, logits.abs().sum(dim=1), torch.ones_like(variance)])
            columns.append(values.masked_fill(~present, 0.0).sum(dim=1))
        return torch.stack(columns, dim=1)
