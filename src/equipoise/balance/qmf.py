"""QMF: adds unimodal logits weighted by the confidence of each sample, ranked by the losses of earlier epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Batch, Multimodal
from .common.modality_heads import ModalityHeads, replace_head
from .common.unimodal_terms import check_concatenated, check_modalities, masked_mean


def confidence(logits: Float[Tensor, "*batch output"], task: str) -> Float[Tensor, " *batch"]:
    """Returns the negative energy of predictions: logsumexp_k y_k; multilabel: sum_k softplus(y_k).

    Example:
        >>> confidence(torch.tensor([[0.0, 0.0]]), "classification")
        tensor([0.6931])
    """
    return logits.logsumexp(dim=-1) if task == "classification" else F.softplus(logits).sum(dim=-1)


def ranking_loss(
    weights: Float[Tensor, " batch"], losses: Float[Tensor, " batch"], present: Bool[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Returns the hinge loss that gives samples with larger losses smaller weights.

    Over the pairs of neighbors (i, j = i + 1, the last with the first) that both have the modality::

        mean max(0, g (w_i - w_j) + |kappa_i - kappa_j|),   g = sign(kappa_i - kappa_j)

    Args:
        weights: (batch,) w, weights of the modality.
        losses: (batch,) kappa in [0, 1], normalized losses of the samples so far.
        present: (batch,) samples that have the modality.

    Example:
        >>> ranking_loss(torch.tensor([1.0, 0.5]), torch.tensor([0.2, 0.0]), torch.tensor([True, True]))
        tensor(0.7000)
    """
    gap = losses - losses.roll(-1)
    hinge = (gap.sign() * (weights - weights.roll(-1)) + gap.abs()).clamp(min=0.0)
    return masked_mean(hinge, present & present.roll(-1))


class QMF(Balancer):
    """Replaces the head by one head per modality, whose logits are weighted by their confidence and added::

        y = sum_m w^m y^m,   w^m = scale logsumexp_k y^m_k
        loss = l(y) + sum_m (l(y^m) + strength rank^m)

    ``rank^m`` asks w^m to be smaller for samples whose mean loss over the epochs so far is larger; see
    ``ranking_loss``. The means are scaled to [0, 1] over all samples. In recipes ``qmf`` is ``concat+qmf``.

    Args:
        model: classification or multilabel, with a fusion that concatenates pooled vectors (``Concat``, ``Sum``). Its
            ``head`` is replaced and saved in checkpoints: create the optimizer afterward. Unimodal heads are detached.
        scale: factor of the weights, > 0.
        strength: weight of the ranking loss, >= 0.
        samples: number of training samples; each batch must then have ``"index"``, (batch,) the numbers of its samples,
            as the loaders of ``eq.data`` have. None ranks samples by the losses of the current batch alone.

    Raises:
        ConfigError: one modality, a regression, a fusion of another kind, an option out of range; in training, a batch
            without ``"index"``, or a number that is not below ``samples``.

    A baseline of dynamic fusion. Weights can be negative if all logits are. Weights are learned on clean data, and
    nothing forces them to be small for damaged inputs. Ranks are formed inside a batch, so that accumulated batches are
    not exactly equivalent to one large batch. Nothing is learned across modalities.

    Reference: Zhang, Wu, Zhang, Hu, Fu, Zhou and Peng, "Provable Dynamic Fusion for Low-Quality Multimodal Data" (ICML
    2023), QMF.
    Differs from the released code in: the margin, which the code adds on the wrong side, where it permits wrong orders
    up to the margin; mean losses instead of sums; missing modalities, and multilabel targets by the energy of their
    labels. The text of the paper was not available beyond its introduction: the formulas are those of the code.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.QMF(model, samples=4)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> batch["index"] = torch.arange(4)
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> sorted(balancing.end_epoch())
        ['weight/audio', 'weight/image']
    """

    changes_gradients = False
    fusion_in_recipes = "concat"
    excludes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("AMCo", "MLA", "MMCosine", "ReconBoost", "TMC"), "both replace the model's head"),
        **dict.fromkeys(
            ("MBSD", "MMPareto"), "it needs unimodal heads that train the encoders, and here they are detached"
        ),
    }

    def __init__(
        self, model: Multimodal, *, scale: float = 0.1, strength: float = 1.0, samples: int | None = None
    ) -> None:
        super().__init__()
        check_modalities(model, "QMF")
        check_concatenated(model, "QMF")
        if model.task == "regression":
            raise ConfigError(
                "QMF", expected="a task with classes or labels, whose logits have an energy", got="a regression",
                fix="Choose a method that is defined for regressions.",
            )  # fmt: skip
        if not scale > 0 or not strength >= 0 or (samples is not None and samples < 1):
            raise ConfigError(
                "QMF", expected="scale > 0, strength >= 0 and samples >= 1 or None",
                got=f"scale = {scale}, strength = {strength}, samples = {samples}",
            )  # fmt: skip
        self._model, self.strength, self.samples = [model], strength, samples
        replace_head(model, ConfidenceHead, model.task, scale)
        count = len(model.names)
        # For each sample and modality: sum of losses, and their number; of the epochs so far, and of this one.
        self.register_buffer("history", torch.zeros(2, samples or 0, count))
        self.register_buffer("epoch", torch.zeros(2, samples or 0, count))
        # In this epoch: sums of each modality's weights, and numbers of samples.
        self.register_buffer("running", torch.zeros(2, count, dtype=torch.float64))

    history: Tensor
    epoch: Tensor
    running: Tensor

    def prepare(self, batch: Batch) -> Batch:
        """Stores the numbers of the samples."""
        if self.samples is not None:
            self.keep("index", self._checked(batch.get("index")))
        return batch

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the losses of the modalities, and the ranking losses of their weights."""
        model, head = self._model[0], cast(ConfidenceHead, self._model[0].head)
        logits, present = head.all_logits(output.features)
        weights = head.weights(logits, present)
        losses = torch.stack([model.sample_losses(own, target) for own in logits.unbind(dim=1)], dim=1)
        # None without ``samples``, and in evaluation mode.
        index = self.kept("index", output)
        index = None if index is None else index.to(losses.device)
        ranks = self._ranks(losses.detach(), present, index)
        total = losses.new_zeros(())
        for m in range(len(model.names)):
            own = masked_mean(losses[:, m], present[:, m])
            total = total + own + self.strength * ranking_loss(weights[:, m], ranks[:, m], present[:, m])
        self.note("weights", torch.stack([weights.sum(dim=0), present.sum(dim=0)]))
        if index is not None:
            self.note("index", index)
            self.note("losses", torch.stack([losses.masked_fill(~present, 0.0), present.to(losses)]))
        return total

    def before_step(self) -> None:
        """Adds the losses of the step to those of the epoch."""
        weights = self.noted_sum("weights")
        if weights is not None:
            self.running = self.running.to(weights.device) + weights
        for index, losses in zip(self.noted("index"), self.noted("losses"), strict=True):
            self.epoch = self.epoch.to(losses.device).index_add(1, index, losses.to(self.epoch.dtype))

    def end_epoch(self) -> dict[str, float]:
        """Returns ``weight/<name>``, the mean weight of each modality over the samples that have it."""
        self.history = self.history.to(self.epoch.device) + all_reduce_sum(self.epoch)
        self.epoch = torch.zeros_like(self.epoch)
        total, count = all_reduce_sum(self.running)
        self.running = torch.zeros_like(self.running)
        means = (total / count.clamp(min=1)).tolist()
        return {f"weight/{name}": mean for name, mean in zip(self._model[0].names, means, strict=True)}

    def _checked(self, index: object) -> Int[Tensor, " batch"]:
        if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point():
            raise ConfigError(
                "QMF", expected="batch['index'], the numbers of the samples", got=type(index).__name__,
                fix="Add it to the batches, or create QMF(model, samples=None).",
            )  # fmt: skip
        samples = self.samples or 0
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < samples:
            raise ConfigError(
                "QMF", expected=f"sample numbers from 0 to samples - 1 = {samples - 1}",
                got=f"numbers from {int(index.min())} to {int(index.max())}",
            )  # fmt: skip
        return index

    def _ranks(
        self, losses: Float[Tensor, "batch modality"], present: Bool[Tensor, "batch modality"], index: Tensor | None
    ) -> Float[Tensor, "batch modality"]:
        """Returns mean losses so far, this batch included, scaled to [0, 1] over all samples of each modality."""
        total, count = losses, torch.ones_like(losses)
        others = losses.new_zeros(0, losses.shape[1])
        if index is not None:
            past, number = (part.to(losses) for part in self.history.to(losses.device))
            total, count = total + past[index], count + number[index]
            others = (past / number.clamp(min=1)).masked_fill(number == 0, torch.nan)
        means = (total / count).masked_fill(~present, torch.nan)
        known = torch.cat([means, others])
        low = known.nan_to_num(nan=torch.inf).amin(dim=0)
        high = known.nan_to_num(nan=-torch.inf).amax(dim=0)
        span = torch.where(high > low, high - low, 1.0)
        return ((means - low) / span).nan_to_num(nan=0.0)


class ConfidenceHead(ModalityHeads):
    """A linear head per modality; logits are added, weighted by their confidence.

    Args:
        count: number of modalities.
        dim: width of one vector.
        num_outputs: number of classes or labels.
        task: see ``confidence``.
        scale: factor of the weights.
    """

    def __init__(self, count: int, dim: int, num_outputs: int, task: str, scale: float) -> None:
        super().__init__(count, dim, num_outputs)
        self.task, self.scale = task, scale

    def weights(
        self, logits: Float[Tensor, "batch modality output"], present: Bool[Tensor, "batch modality"]
    ) -> Float[Tensor, "batch modality"]:
        """Returns the weight of each modality, 0 for missing ones."""
        return self.scale * confidence(logits, self.task).masked_fill(~present, 0.0)

    def pieces(self, features: Float[Tensor, "batch feature"]) -> list[Float[Tensor, "batch output"]]:
        """Computes the part of each modality in the logits."""
        logits, present = self.all_logits(features)
        return list((self.weights(logits, present)[..., None] * logits).unbind(dim=1))

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return torch.stack(self.pieces(features)).sum(dim=0)
