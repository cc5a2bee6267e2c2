"""MLA: modalities learn one after the other through one shared head, which forgets none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import has_modality, summed
from .common.unimodal_terms import (
    at_least_single,
    check_concatenated,
    check_modalities,
    detach_unimodal_heads,
    masked_mean,
    split_concatenated,
)


def next_projector(projector: Float[Tensor, "d d"], row: Float[Tensor, " d"], *, alpha: float) -> Float[Tensor, "d d"]:
    """The recursive projector after one more mean feature.

    Args:
        projector: (d, d) P so far.
        row: (d,) mean feature r.
        alpha: a > 0; small values take all of r out.

    Returns:
        P - k k^T / (a + r k) with k = P r^T, divided by its Frobenius norm.

    Example:
        >>> next_projector(torch.eye(2), torch.tensor([1.0, 0.0]), alpha=1.0)
        tensor([[0.4472, 0.0000],
                [0.0000, 0.8944]])
    """
    k = projector @ row
    changed = projector - torch.outer(k, k) / (alpha + row @ k)
    return changed / changed.norm()


def certainty_weights(
    logits: Float[Tensor, "batch modality output"], present: Bool[Tensor, "batch modality"], task: str
) -> Float[Tensor, "batch modality"]:
    """How much each modality's answer counts: exp(max_n H_n - H_m), normalized, with H the entropy of an answer.

    Labels' entropies are averaged; regression has none, so its answers count alike. A modality that a sample lacks
    counts nothing.

    Example:
        >>> logits = torch.tensor([[[9.0, -9.0], [0.0, 0.0]]])
        >>> certainty_weights(logits, torch.tensor([[True, True]]), "classification")
        tensor([[0.6667, 0.3333]])
    """
    if task == "classification":
        entropy = -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
    elif task == "multilabel":
        entropy = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").mean(dim=-1)
    else:
        entropy = torch.zeros_like(logits[..., 0])
    # The largest entropy cancels in the quotient. A sample without any modality keeps finite weights.
    return (-entropy).masked_fill(~present, torch.finfo(entropy.dtype).min).softmax(dim=-1)


class MLA(Balancer):
    """Trains one modality at each optimizer step, in turn, through a linear head that all of them share.

    In the turn of modality m the loss is that of head(f_m) alone. Before the step, with r the mean feature of the
    step, b its batch and B the batches of an epoch::

        k = P r^T,  P <- P - k k^T / (a + r k),  P <- P / |P|_F,  a = 0.1^(1 + b / B);   G <- G P

    on the gradient G of the head's weight. At test time answers are averaged by their certainty::

        y = sum_m lambda_m head(f_m),  lambda_m ~ exp(max_n H_n - H_m),  H = entropy of softmax(head(f_m))

    Args:
        model: of a fusion that puts pooled vectors side by side (``Concat``, ``Sum``). Its ``head`` is replaced, which
            a checkpoint holds: make the optimizer afterward. Unimodal heads only watch from now on.
        projected: False leaves the head's gradient as it is: alternation and certainty alone.

    Raises:
        ConfigError: one modality, a fusion of another kind.

    It helps where joint training starves a modality, and where samples lack one. Nothing is learned across modalities,
    so what shows only in both together is lost. Every batch is served once for each modality, and all encoders see it:
    an epoch of N modalities costs N forward passes, and about one backward pass in all. P shrinks gradients by about
    the root of d, which SGD feels and Adam divides out.

    Encoders whose turn it is not get no gradient: under ``DistributedDataParallel`` in a loop of your own wrap a module
    that returns the loss, as Lightning does, and set ``find_unused_parameters=True``.

    Reference: Zhang, Yoon, Bansal and Yao, "Multimodal Representation Learning by Alternating Unimodal Adaptation"
    (CVPR 2024); spec 3.3.
    Differs from the released code in: G P takes the place of G, where code adds it to G, and r k is the number of the
    formula, where code divides by an outer product; B is counted, so in the first epoch a = 0.1.

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
        "MBSD": "it needs unimodal heads that teach, and here they only watch",
        "MMPareto": "it needs unimodal heads that teach, and here they only watch",
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
        # Counters stay where they are made: whose turn it is should not be asked of an accelerator.
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
        """The loss of the modality whose turn it is."""
        model, head = self._model[0], self._head
        name = model.names[int(self.steps) % self.steps_per_batch]
        has = has_modality(output, name)
        # Not a slice of the features: that would give the other encoders a gradient of zeros, and Adam moves on those.
        vectors = output.tokens[name].pooled()
        kept = at_least_single(vectors.detach()).masked_fill(~has[:, None], 0.0)
        self.note("features", torch.cat([kept.sum(dim=0), has.sum()[None]]))
        return masked_mean(model.sample_losses(at_least_single(head.classifier(vectors)), target), has)

    @property
    def _head(self) -> SharedLinearHead:
        return cast(SharedLinearHead, self._model[0].head)

    @torch.no_grad()
    def before_step(self) -> None:
        """Projects the head's gradient, and passes the turn on."""
        sums = self.noted_sum("features")
        if sums is None:
            return
        if self.projected:
            total = summed(sums)
            whole = int(self.epoch_length)
            done = int(self.epoch_steps) // self.steps_per_batch * self.steps_per_batch / whole if whole else 0.0
            weight = self._head.classifier.weight
            row = total[:-1] / total[-1].clamp(min=1)
            self.projector = next_projector(self.projector.to(row), row, alpha=0.1 ** (1 + done))
            if weight.grad is not None:
                weight.grad.copy_(weight.grad @ self.projector.to(weight))
        self.steps += 1
        self.epoch_steps += 1

    def end_epoch(self) -> dict[str, float]:
        """Counts the epoch's steps; nothing to log."""
        self.epoch_length.copy_(self.epoch_steps)
        self.epoch_steps.zero_()
        return {}


class SharedLinearHead(nn.Module):
    """One linear layer for every modality's pooled vector, and their answers averaged by certainty.

    Args:
        dim: width of one vector.
        num_outputs: classes, labels or targets.
        count: modalities.
        task: see ``certainty_weights``.
    """

    def __init__(self, dim: int, num_outputs: int, count: int, task: str) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_outputs)
        self.count, self.task = count, task

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        vectors, has = split_concatenated(features, self.count)
        answers = at_least_single(self.classifier(vectors))
        return (certainty_weights(answers, has, self.task)[..., None] * answers).sum(dim=1)
