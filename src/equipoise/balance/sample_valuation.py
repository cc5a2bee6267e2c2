"""Sample valuation: trains a modality again on samples where its Shapley value is low."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..fusion.subset_tokens import modality_subsets, shapley_values
from ..nn.distributed import all_reduce_sum
from ..nn.eval_mode import eval_mode_no_grad
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.subset_predictions import subset_logits
from .common.unimodal_scores import correctness, has_modality
from .common.unimodal_terms import at_least_single, check_modalities

THRESHOLDS = (1.0, 0.4, -0.1)
"""Each threshold that a value is below adds one copy."""
ROUNDING = 1e-6


class SampleValuation(Balancer):
    """Adds unimodal copies of samples for which a modality has a low Shapley value.

    v(S) is 1 if the prediction from modalities S is correct, v() = 0, and phi_{i,m} is the Shapley value of modality m
    for sample i. From the second epoch on, a batch contains weighted copies of its samples::

        loss = (sum_i task_i + sum_m sum_i w_{i,m} task_i(fewer modalities)) / (samples + sum of w)
        sample    w_{i,m} = number of thresholds 1, 0.4, -0.1 above phi_{i,m};  modality m alone
        modality  w_{i,m} = 2/3 / (N - 1) sum_{k != l} |gap_k - gap_l|;  m and all modalities with at least its gap

    with gap_m = 1 - mean phi_m over the previous epoch. Copies reuse the encoder outputs of the original samples.

    Args:
        model: any fusion; modalities are removed between encoders and fusion.
        level: ``"sample"`` or ``"modality"``.
        value: ``"correct"``, or ``"size_correct"``, which multiplies v(S) by the number of modalities in S.

    Raises:
        ConfigError: one modality, an unknown level or value.

    It helps if a modality is neglected for some samples only. Values are those of the running model, so early values
    are unreliable. The fusion runs 2^N - 1 more times without gradient and N more times with gradient, the encoders
    once: cheap for two modalities and a static fusion, expensive for five and a deep one. The loss is normalized per
    batch, so accumulated batches are not exactly equivalent to one large batch.

    Reference: Wei et al., "Enhancing Multimodal Cooperation via Sample-level Modality Valuation" (CVPR 2024).
    Differs from the released code in: values of the current batch, where the benchmark, by a bug, uses those of the
    first batch for all; copies are weights in the batch instead of entries in the data set; graded scores for
    regressions.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.SampleValuation(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> round(sum(balancing.end_epoch().values()), 4)  # half of the predictions are correct
        0.5
    """

    name = "valuation"
    replaces: ClassVar[tuple[str, ...]] = ("task",)
    changes_gradients = False

    def __init__(
        self, model: Multimodal, *, level: Literal["sample", "modality"] = "sample",
        value: Literal["correct", "size_correct"] = "correct",
    ) -> None:  # fmt: skip
        super().__init__()
        check_modalities(model, "SampleValuation")
        if level not in ("sample", "modality") or value not in ("correct", "size_correct"):
            raise ConfigError(
                "SampleValuation", expected="level 'sample' or 'modality' and value 'correct' or 'size_correct'",
                got=f"{level = }, {value = }",
            )  # fmt: skip
        self._model, self.level, self.value = [model], level, value
        self.register_buffer("epochs", torch.tensor(0))
        self.register_buffer("gaps", torch.zeros(len(model.names), dtype=torch.float64))
        # In this epoch: sums of values, and numbers of samples.
        self.register_buffer("running", torch.zeros(2, len(model.names), dtype=torch.float64))

    epochs: Tensor
    gaps: Tensor
    running: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the loss over samples and their copies; in the first epoch over samples only."""
        model = self._model[0]
        if output.logits is None:
            raise ConfigError("SampleValuation", expected="an output with logits", got="logits = None")
        present = torch.stack([has_modality(output, name) for name in model.names])
        values = self.values(output, target)
        self.note("values", torch.stack([values.masked_fill(~present, 0.0).sum(dim=1), present.sum(dim=1).to(values)]))
        if int(self.epochs) == 0:
            return model.loss(output.logits, target)
        losses = model.sample_losses(at_least_single(output.logits), target)
        total = losses.sum()
        copies = self._copies(values).masked_fill(~present, 0.0).to(losses)
        for name, weights in zip(model.names, copies, strict=True):
            logits = subset_logits(model, output.tokens, self._modalities_of_copy(name))
            total = total + (weights * model.sample_losses(logits, target)).sum()
        # Use the same denominator in all processes, since gradients are averaged over them.
        weight, processes = all_reduce_sum(torch.stack([copies.sum() + len(target), total.new_ones(())]))
        return total * processes / weight

    def before_step(self) -> None:
        """Adds the values of the step to the sums of the epoch."""
        values = self.noted_sum("values")
        if values is not None:
            self.running = self.running.to(values.device) + values

    @torch.no_grad()
    def values(self, output: Output, target: Tensor) -> Float[Tensor, "modality batch"]:
        """Returns phi of each sample, from the current model in evaluation mode; 0 for missing modalities."""
        model = self._model[0]
        present = torch.stack([has_modality(output, name) for name in model.names])
        worth = [torch.zeros(len(target), dtype=torch.float64, device=present.device)]
        with eval_mode_no_grad(model):  # type: ignore[arg-type]
            for subset in modality_subsets(model.names)[1:]:
                logits = subset_logits(model, output.tokens, subset)
                size = present[[model.names.index(name) for name in subset]].sum(dim=0)
                factor = (size > 0) if self.value == "correct" else size
                worth.append(factor * correctness(logits, target, model.task).double())
        return shapley_values(torch.stack(worth))

    def end_epoch(self) -> dict[str, float]:
        """Returns ``value/<name>``, the mean value of each modality."""
        total, count = all_reduce_sum(self.running)
        means = (total / count.clamp(min=1)).to(self.gaps.device)
        self.gaps.copy_(torch.where(count.to(means.device) > 0, 1 - means, self.gaps))
        self.epochs += 1
        self.running = torch.zeros_like(self.running)
        return {f"value/{name}": mean for name, mean in zip(self._model[0].names, means.tolist(), strict=True)}

    def _copies(self, values: Tensor) -> Tensor:
        """Returns (modality, batch) weights of the copies."""
        if self.level == "sample":
            return torch.stack([values < bound - ROUNDING for bound in THRESHOLDS]).sum(dim=0).to(values)
        weight = (self.gaps[:, None] - self.gaps).abs().sum() * 2 / 3 / (len(self.gaps) - 1)
        return torch.full_like(values, float(weight))

    def _modalities_of_copy(self, name: str) -> list[str]:
        """Returns the modalities in the copies for one modality."""
        if self.level == "sample":
            return [name]
        names, gaps = self._model[0].names, self.gaps.tolist()
        return [other for other, gap in zip(names, gaps, strict=True) if gap >= gaps[names.index(name)]]
