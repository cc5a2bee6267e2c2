"""CGGM: scales and directs the encoders' gradients by the progress of unimodal classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum, rank_and_world
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import correctness, has_modality
from .common.unimodal_terms import at_least_single, check_encoders_apart, check_modalities


def balance_terms(progress: Float[Tensor, " modality"]) -> Float[Tensor, " modality"]:
    """Returns B_m = (sum_n d_n - d_m) / sum_n d_n, the part of the progress made by the others, clamped to [0, 1].

    Without total progress every term is (N - 1) / N.

    Args:
        progress: (modality,) change d of each unimodal classifier's score.

    Example:
        >>> balance_terms(torch.tensor([0.3, 0.1]))
        tensor([0.2500, 0.7500])
        >>> balance_terms(torch.tensor([0.1, -0.1]))
        tensor([0.5000, 0.5000])
    """
    total, count = progress.sum(), len(progress)
    moves = total.abs() > torch.finfo(torch.float32).eps
    terms = ((total - progress) / torch.where(moves, total, 1.0)).clamp(0.0, 1.0)
    return torch.where(moves, terms, (count - 1) / count)


def head_gradient(
    features: Float[Tensor, "batch feature"], logits: Float[Tensor, "batch output"], target: Tensor, task: str,
    present: Bool[Tensor, " batch"],
) -> Float[Tensor, "output feature"]:  # fmt: skip
    """Returns the gradient of the mean loss with respect to the weight of a linear head, differentiable.

    The gradient of sample i is r_i f_i^T with r the derivative of its loss with respect to its logits: p - onehot(y),
    for labels (p - y) / L, for a regression 2 (y' - y) / L.

    Example:
        >>> ones = torch.ones(1, 1)
        >>> head_gradient(3 * ones, 2 * ones, ones[0], "regression", torch.tensor([True]))
        tensor([[6.]])
    """
    features, logits = at_least_single(features), at_least_single(logits)
    if task == "classification":
        residual = logits.softmax(dim=-1) - F.one_hot(target.long(), logits.shape[1])
    else:
        target = target.to(logits).reshape(logits.shape)
        difference = logits.sigmoid() - target if task == "multilabel" else 2 * (logits - target)
        residual = difference / logits.shape[1]
    return residual.masked_fill(~present[:, None], 0.0).T.to(features) @ features / present.sum().clamp(min=1)


class CGGM(Balancer):
    """Scales encoder gradients by the progress of unimodal classifiers, and adds a term for the direction.

    The unimodal heads, trained on detached features, are the classifiers. With e_m the fraction of correct predictions
    of head m in a step and d_m its change since the previous step::

        B_m = (sum_n d_n - d_m) / sum_n d_n, in [0, 1];   g_m <- rho B_m g_m
        loss = task + strength mean_m (|B_m| - B_m cos(G_m, G))

    with G_m and G the gradients of the unimodal and the multimodal loss with respect to the weights of the heads; G is
    the block of modality m if the features are concatenated. B of the previous step is used in the loss.

    Args:
        model: with unimodal heads; other than for ``strength=0`` the features have the width of one pooled vector, or
            of all together.
        rho: factor of the gradients of the encoders' matrices and kernels, > 0.
        strength: lambda >= 0; 0 leaves directions as they are.

    Raises:
        ConfigError: one modality, an option out of range, no unimodal heads; in training, features of another width.

    It covers classification, labels and regressions (the score is then exp(-squared error)), and any number of
    modalities. Differences of scores of single batches are noisy, so that factors jump between 0 and rho. Adam cancels
    part of the factors, and all of a constant one.

    Reference: Guo, Jin, Chen and Zhao, "Classifier-guided Gradient Modulation for Enhanced Multimodal Learning"
    (NeurIPS 2024), CGGM.
    Differs from the released code in: cosines of gradients, as in the paper's description, where the code compares the
    weights of the heads; terms clamped to [0, 1], where a negative total turns gradients around in the code, and a
    small one makes them explode; linear heads in the same optimizer instead of transformers in their own; whole
    optimizer steps over all processes. The text of the paper was not available beyond its introduction.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.CGGM(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> round(sum(balancing.end_epoch().values()), 4)
        1.3
    """

    excludes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("AGM", "ARL", "OGM", "OGM_GE"), "both scale the encoders' gradients"),
        "MMPareto": "it overwrites the encoders' gradients after they are scaled",
    }

    def __init__(self, model: Multimodal, *, rho: float = 1.3, strength: float = 0.2) -> None:
        super().__init__()
        check_modalities(model, "CGGM")
        check_encoders_apart(model, "CGGM")
        if not 0 < rho < float("inf") or not strength >= 0:
            raise ConfigError(
                "CGGM", expected="a finite rho > 0 and strength >= 0", got=f"rho = {rho}, strength = {strength}"
            )
        if getattr(model, "unimodal", "none") == "none":
            raise ConfigError(
                "CGGM", expected="unimodal heads, which guide the gradients", got="a model with unimodal='none'",
                fix="Use unimodal='probe'.",
            )  # fmt: skip
        self._model, self.rho, self.strength = [model], rho, strength
        count = len(model.names)
        self.register_buffer("scores", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("terms", torch.full((count,), (count - 1) / count, dtype=torch.float64))
        # In this epoch: sum of each modality's factors, and their number.
        self.register_buffer("used", torch.zeros(count + 1, dtype=torch.float64))

    scores: Tensor
    terms: Tensor
    used: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Returns the term for the direction of the gradients."""
        if self.strength == 0:
            return None
        model = self._model[0]
        if output.logits is None:
            raise ConfigError("CGGM", expected="an output with logits", got="logits = None")
        every = torch.ones(len(target), dtype=torch.bool, device=output.logits.device)
        joint = self._shared(head_gradient(output.features, output.logits, target, model.task, every))
        terms, parts = self.terms.to(joint), []
        for m, name in enumerate(model.names):
            vectors, logits = output.tokens[name].pooled().detach(), output.unimodal_logits[name].detach()
            own = self._shared(head_gradient(vectors, logits, target, model.task, has_modality(output, name)))
            cosine = F.cosine_similarity(own.flatten(), self._block(joint, m, own).flatten(), dim=0)
            parts.append(terms[m] - terms[m] * cosine)
        return self.strength * torch.stack(parts).mean()

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float]:
        """Returns rho B_m from the scores of all samples of the step on all processes."""
        model, columns = self._model[0], []
        for name in model.names:
            present = has_modality(output, name)
            right = correctness(at_least_single(output.unimodal_logits[name]), target, model.task)
            columns.append(torch.stack([right.masked_fill(~present, 0.0).sum(), present.sum().to(right)]))
        total, count = all_reduce_sum(torch.stack(columns, dim=1).double())
        before = self.scores.to(total.device)
        # A modality that no sample has made no progress.
        self.scores = torch.where(count > 0, total / count.clamp(min=1), before)
        self.terms = balance_terms(self.scores - before)
        factors = self.rho * self.terms
        self.used = self.used.to(factors.device) + torch.cat([factors, factors.new_ones(1)])
        return dict(zip(model.names, factors, strict=True))

    def end_epoch(self) -> dict[str, float]:
        """Returns ``scale/<name>``, the mean factor of each encoder's gradient in this epoch; 1 if there was none."""
        *sums, count = self.used.tolist()
        self.used = torch.zeros_like(self.used)
        names = self._model[0].names
        return {f"scale/{name}": s / count if count else 1.0 for name, s in zip(names, sums, strict=True)}

    def _shared(self, gradient: Tensor) -> Tensor:
        """Returns the mean over processes, through which only the own part is differentiated.

        Data-parallel training averages the gradients of all processes, which makes the whole derivative.
        """
        if not self._pending.noting():
            return gradient
        return all_reduce_sum(gradient.detach()) / rank_and_world()[1] + gradient - gradient.detach()

    def _block(self, joint: Tensor, index: int, own: Tensor) -> Tensor:
        """Returns the columns of the multimodal head that belong to one modality's features."""
        width, count = own.shape[1], len(self._model[0].names)
        if joint.shape[1] == width:
            return joint
        if joint.shape[1] == width * count:
            return joint[:, index * width : (index + 1) * width]
        raise ConfigError(
            "CGGM", expected=f"features of width {width}, as one pooled vector, or {width * count}, as all of them",
            got=f"width {joint.shape[1]}", fix="Use CGGM(model, strength=0), or another fusion.",
        )  # fmt: skip
