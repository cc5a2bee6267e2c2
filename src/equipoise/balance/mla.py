"""MLA: trains modalities alternately through one shared head, with gradient projection against forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import has_modality, prediction_entropy
from .common.unimodal_terms import (
    at_least_single,
    check_concatenated,
    check_modalities,
    detach_unimodal_heads,
    masked_mean,
    split_concatenated,
)


def next_projector(projector: Float[Tensor, "d d"], row: Float[Tensor, " d"], *, alpha: float) -> Float[Tensor, "d d"]:
    """Updates the recursive projector with one more mean feature.

    Args:
        projector: (d, d) current P.
        row: (d,) mean feature r.
        alpha: a > 0; small values project out all of r.

    Returns:
        P - k k^T / (a + r k) with k = P r^T, divided by its Frobenius norm.

    Example:
        >>> next_projector(torch.eye(2), torch.tensor([1.0, 0.0]), alpha=1.0)
        tensor([[0.4472, 0.0000],
                [0.0000, 0.8944]])
    """
    k = projector @ row
    updated = projector - torch.outer(k, k) / (alpha + row @ k)
    return updated / updated.norm()


def certainty_weights(
    logits: Float[Tensor, "batch modality output"], present: Bool[Tensor, "batch modality"], task: str
) -> Float[Tensor, "batch modality"]:
    """Returns each modality's weight: exp(max_n H_n - H_m), normalized, with H the entropy of its prediction.

    Multilabel entropies are averaged over labels; in a regression all weights are equal. A modality that a sample lacks
    has weight 0.

    Example:
        >>> logits = torch.tensor([[[9.0, -9.0], [0.0, 0.0]]])
        >>> certainty_weights(logits, torch.tensor([[True, True]]), "classification")
        tensor([[0.6667, 0.3333]])
    """
    entropy = prediction_entropy(logits, task)
    # The largest entropy cancels out. The finite fill value avoids NaN for samples without any modality.
    return (-entropy).masked_fill(~present, torch.finfo(entropy.dtype).min).softmax(dim=-1)


class MLA(Balancer):
    """Trains one modality per optimizer step, alternately, through a shared linear head.

    In a step of modality m the loss is that of head(f_m). Before the step, with r the mean feature of the step, b the
    index of its batch and B the number of batches of an epoch::

        k = P r^T,  P <- P - k k^T / (a + r k),  P <- P / |P|_F,  a = 0.1^(1 + b / B);   G <- G P

    with G the gradient of the head's weight. At test time predictions are averaged by certainty::

        y = sum_m lambda_m head(f_m),  lambda_m ~ exp(max_n H_n - H_m),  H = entropy of softmax(head(f_m))

    Args:
        model: with a fusion that concatenates pooled vectors (``Concat``, ``Sum``). Its ``head`` is replaced and saved
            in checkpoints: create the optimizer afterward. Unimodal heads are detached.
        projected: False does not project the head's gradient: only alternation and certainty weights.

    Raises:
        ConfigError: one modality, a fusion of another kind.

    It helps if joint training undertrains a modality, and if samples lack modalities. Nothing is learned across
    modalities, so interactions between them are lost. Each batch is used once per modality, by all encoders: an epoch
    of N modalities costs N forward passes, and about one backward pass in total. P reduces gradients by about the
    square root of d, which affects SGD and is canceled by Adam.

    Encoders of the other modalities get no gradient: with ``DistributedDataParallel`` in a custom loop, wrap a module
    that returns the loss, as Lightning does, and set ``find_unused_parameters=True``.

    Reference: Zhang, Yoon, Bansal and Yao, "Multimodal Representation Learning by Alternating Unimodal Adaptation"
    (CVPR 2024).
    Differs from the released code in: G P replaces G, where the code adds it to G, and r k is the inner product of the
    formula, where the code divides by an outer product; B is counted, so in the first epoch a = 0.1.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.MLA(model)])
        >>> balancing.steps_per_batch, model.head.classifier
        (2, Linear(in_features=8, out_features=2, bias=True))
    """

    replaces = ("task",)
    partial_graph = True
    excludes: ClassVar[Mapping[str, str]] = {
        "MBSD": "it needs unimodal heads that train the encoders, and here they are detached",
        "MMPareto": "it needs unimodal heads that train the encoders, and here they are detached",
    }

    def __init__(self, model: Multimodal, *, projected: bool = True) -> None:
        super().__init__()
        check_modalities(model, "MLA")
        check_concatenated(model, "MLA")
        self._model, self.projected, self.steps_per_batch = [model], projected, len(model.names)
        like, dim = next(model.head.parameters()), model.fusion.dim
        model.head = SharedLinearHead(dim, model.num_outputs, self.steps_per_batch, model.task).to(
            like.device, like.dtype
        )
        detach_unimodal_heads(model)
        # Keep counters on the CPU: reading the current modality must not sync the GPU.
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("epoch_steps", torch.tensor(0))
        self.register_buffer("epoch_length", torch.tensor(0))
        precise = torch.promote_types(like.dtype, torch.float32)
        self.register_buffer("projector", torch.eye(dim, device=like.device, dtype=precise))

    steps: Tensor
    epoch_steps: Tensor
    epoch_length: Tensor
    projector: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the loss of the modality of this step."""
        model, head = self._model[0], self._head
        name = model.names[int(self.steps) % self.steps_per_batch]
        present = has_modality(output, name)
        # Not a slice of the features: the other encoders would get zero gradients, with which Adam still updates.
        vectors = output.tokens[name].pooled()
        features = at_least_single(vectors.detach()).masked_fill(~present[:, None], 0.0)
        self.note("features", torch.cat([features.sum(dim=0), present.sum()[None]]))
        return masked_mean(model.sample_losses(at_least_single(head.classifier(vectors)), target), present)

    @property
    def _head(self) -> SharedLinearHead:
        return cast(SharedLinearHead, self._model[0].head)

    @torch.no_grad()
    def before_step(self) -> None:
        """Projects the head's gradient, and advances to the next modality."""
        sums = self.noted_sum("features")
        if sums is None:
            return
        if self.projected:
            total = all_reduce_sum(sums)
            length, per_batch = int(self.epoch_length), self.steps_per_batch
            progress = int(self.epoch_steps) // per_batch * per_batch / length if length else 0.0
            weight = self._head.classifier.weight
            row = total[:-1] / total[-1].clamp(min=1)
            self.projector = next_projector(self.projector.to(row), row, alpha=0.1 ** (1 + progress))
            if weight.grad is not None:
                weight.grad.copy_(weight.grad @ self.projector.to(weight))
        self.steps += 1
        self.epoch_steps += 1

    def end_epoch(self) -> dict[str, float]:
        """Stores the number of steps of the epoch; logs nothing."""
        self.epoch_length.copy_(self.epoch_steps)
        self.epoch_steps.zero_()
        return {}


class SharedLinearHead(nn.Module):
    """One linear layer for the pooled vector of each modality; predictions are averaged by certainty.

    Args:
        dim: width of one vector.
        num_outputs: number of classes, labels or targets.
        count: number of modalities.
        task: see ``certainty_weights``.
    """

    def __init__(self, dim: int, num_outputs: int, count: int, task: str) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_outputs)
        self.count, self.task = count, task

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        vectors, present = split_concatenated(features, self.count)
        logits = at_least_single(self.classifier(vectors))
        return (certainty_weights(logits, present, self.task)[..., None] * logits).sum(dim=1)
