"""PMR: prototype losses for lagging modalities and an entropy term for leading ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..nn.eval_mode import eval_mode_no_grad
from ..tokens.token_batch import Output, as_output
from .balancer import Balancer, Batch, Multimodal
from .common.class_prototypes import class_means, prototype_log_probabilities
from .common.target_categories import bin_edges, categories, category_counts
from .common.unimodal_scores import has_modality
from .common.unimodal_terms import at_least_single, check_modalities


def prototype_weights(
    scores: Float[Tensor, " modality"],
) -> tuple[Float[Tensor, " modality"], Float[Tensor, " modality"]]:
    """Returns how far each modality lags behind the best, and how far it is ahead of the worst, clipped to [0, 1].

    Args:
        scores: (modality,) mean probability of the true class, >= 0; NaN if no sample has the modality, which then gets
            0 and is left out of the comparison.

    Returns:
        clip(max s / s_m - 1, 0, 1) and clip(s_m / min s - 1, 0, 1). For two modalities of ratio rho these are the
        paper's (beta, gamma) and (gamma, beta).

    Example:
        >>> prototype_weights(torch.tensor([0.6, 0.4]))
        (tensor([0.0000, 0.5000]), tensor([0.5000, 0.0000]))
    """
    valid, tiny = ~scores.isnan(), torch.finfo(scores.dtype).tiny
    best, worst = scores.nan_to_num(0.0).max(), scores.nan_to_num(math.inf).min()
    lags = (best / scores.clamp(min=tiny) - 1).clamp(0.0, 1.0)
    leads = (scores / worst.clamp(min=tiny) - 1).clamp(0.0, 1.0)
    return torch.where(valid, lags, 0.0), torch.where(valid, leads, 0.0)


class PMR(Balancer):
    """Pulls the features of lagging modalities to their class prototypes, and regularizes leading ones by entropy.

    With c_k^m the mean feature of modality m over class k, p^m = softmax_k(-|f^m - c_k^m|) and s_m the mean of p^m for
    the true class::

        loss = task + alpha sum_m clip(max_n s_n / s_m - 1, 0, 1) mean(-log p^m[y])
        in the first epochs also  - mu sum_m clip(s_m / min_n s_n - 1, 0, 1) H(p^m)
        after each epoch  c <- momentum c + (1 - momentum) c_new

    c_new is computed from a part of the training batches, in evaluation mode. The first epoch therefore has only the
    task loss, and "first epochs" are the first ones with prototypes.

    Args:
        model: any fusion; features are the encoders' pooled tokens.
        alpha: weight of the prototype losses, >= 0.
        mu: weight of the entropies, >= 0.
        entropy_epochs: number of epochs with the entropy term.
        momentum: weight of the old prototypes, in [0, 1).
        fraction: fraction of the training batches used for new prototypes, in (0, 1].
        hard: weights as in the released code: 1 for every lagging modality, and no entropy.
        bins: number of bins of a regression's targets, which are treated as classes; >= 2.

    Raises:
        ConfigError: one modality, an option out of range.

    It helps if one encoder converges long before another. It needs features that cluster by class: with many classes
    and few samples the prototypes are noise. Weights are computed per batch, so accumulated batches are not exactly
    equivalent to one large batch.

    Reference: Fan et al., "PMR: Prototypical Modal Rebalance for Multimodal Learning" (CVPR 2023).
    Differs from the released code in: the paper's soft weights and entropy term, which the code lacks; a class without
    samples in a review keeps its prototype, where the code divides by 0; any number of modalities; multilabel targets
    (two classes per label) and regressions (binned targets).

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.PMR(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.review([batch], [])
        >>> bool(balancing.loss(model(batch), batch["target"]).isfinite())
        True
    """

    reviews = True
    changes_gradients = False

    def __init__(
        self, model: Multimodal, *, alpha: float = 1.0, mu: float = 0.01, entropy_epochs: int = 5,
        momentum: float = 0.2, fraction: float = 0.1, hard: bool = False, bins: int = 5,
    ) -> None:  # fmt: skip
        super().__init__()
        check_modalities(model, "PMR")
        limits = {
            "alpha >= 0": alpha >= 0, "mu >= 0": mu >= 0, "entropy_epochs >= 0": entropy_epochs >= 0,
            "0 <= momentum < 1": 0 <= momentum < 1, "0 < fraction <= 1": 0 < fraction <= 1, "bins >= 2": bins >= 2,
        }  # fmt: skip
        if wrong := [limit for limit, holds in limits.items() if not holds]:
            got = f"{alpha = }, {mu = }, {entropy_epochs = }, {momentum = }, {fraction = }, {bins = }"
            raise ConfigError("PMR", expected=" and ".join(wrong), got=got)
        self._model, self.alpha, self.mu, self.entropy_epochs = [model], alpha, mu, entropy_epochs
        self.momentum, self.fraction, self.hard, self.bins = momentum, fraction, hard, bins
        shape = (len(model.names), *category_counts(model, bins))
        self.register_buffer("prototypes", torch.zeros(*shape, model.fusion.dim, dtype=torch.float64))
        # Not bool: torch.optim.swa_utils.AveragedModel cannot subtract it, and an average of integers is rounded to 0.
        self.register_buffer("seen", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("edges", torch.zeros(shape[1], max(bins - 1, 0), dtype=torch.float64))
        # Training batches of this epoch, reviews so far; sums of the weights, and their number.
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("reviewed", torch.tensor(0))
        self.register_buffer("used", torch.zeros(len(model.names) + 1, dtype=torch.float64))

    prototypes: Tensor
    seen: Tensor
    edges: Tensor
    batches: Tensor
    reviewed: Tensor
    used: Tensor

    def observe(self, output: Output, target: Tensor) -> None:
        self.note("batches", torch.ones((), dtype=torch.long))

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Returns the weighted prototype losses; None before the first review."""
        if int(self.reviewed) == 0:
            return None
        features, present = self._features(output)
        has_prototype = self._seen(features.device)
        log_p = prototype_log_probabilities(features, self.prototypes.to(features), has_prototype)
        index = categories(target, self._model[0].task, self.edges).expand(len(features), -1, -1)[..., None]
        true = log_p.gather(-1, index)[..., 0]
        # Use samples that have the modality, of classes that have a prototype.
        counts = present[..., None] & has_prototype[:, None].expand(log_p.shape).gather(-1, index)[..., 0]
        hits, trials = all_reduce_sum(
            torch.stack([_sums(true.detach().exp(), counts), counts.sum(dim=(1, 2)).to(true)])
        )
        lags, leads = prototype_weights(hits / trials)
        size = counts.sum(dim=(1, 2)).clamp(min=1)
        if self.hard:
            lags, leads = (lags > 0).to(lags), torch.zeros_like(leads)
        total = self.alpha * (lags * _sums(-true, counts) / size).sum()
        if int(self.reviewed) <= self.entropy_epochs:
            entropies = -(log_p.exp() * log_p).sum(dim=-1)
            total = total - self.mu * (leads * _sums(entropies, counts) / size).sum()
        self.note("weights", torch.cat([lags, lags.new_ones(1)]))
        return total

    def before_step(self) -> None:
        """Accumulates the number of batches and the weights of the step."""
        batches, weights = self.noted_sum("batches"), self.noted_sum("weights")
        if batches is not None:
            self.batches += batches
        if weights is not None:
            self.used = self.used.to(weights.device) + weights

    def review(self, train: Iterable[Batch], val: Iterable[Batch]) -> None:
        """Updates the prototypes from the first batches of another pass over the training data.

        Features that are not finite are left out.
        """
        model, parts = self._model[0], []
        with eval_mode_no_grad(model):  # type: ignore[arg-type]
            for batch in islice(train, max(1, math.ceil(self.fraction * int(self.batches)))):
                batch_features, there = self._features(as_output(model, model(batch), "PMR"))
                parts.append((batch_features, there & batch_features.isfinite().all(dim=-1), batch["target"]))
        if not parts:
            raise ConfigError("PMR", expected="one or more training batches in review", got="none")
        features, present, targets = zip(*parts, strict=True)
        target = torch.cat(targets)
        if int(self.reviewed) == 0 and model.task == "regression":
            self.edges = bin_edges(target, self.bins)
        classes = categories(target, model.task, self.edges)
        new, updated = class_means(torch.cat(features, 1).double(), torch.cat(present, 1), classes, self.seen.shape[-1])
        old, has_prototype = self.prototypes.to(new), self._seen(updated.device)
        # A class seen for the first time has no previous prototype to blend with.
        decay = torch.where(updated, self.momentum * has_prototype.to(new), 1.0)[..., None]
        self.prototypes = decay * old + (1 - decay) * new
        self.seen = (has_prototype | updated).to(self.seen.dtype)
        self.reviewed += 1
        self.batches.zero_()

    def end_epoch(self) -> dict[str, float]:
        """Returns ``weight/<name>``, the mean weight of each prototype loss in this epoch."""
        *sums, count = self.used.tolist()
        self.used.zero_()
        return {f"weight/{name}": s / max(count, 1.0) for name, s in zip(self._model[0].names, sums, strict=True)}

    def _seen(self, device: torch.device) -> Tensor:
        """Returns (modality, question, class), True for classes with a prototype."""
        return self.seen.to(device) > 0

    def _features(self, output: Output) -> tuple[Tensor, Tensor]:
        """Returns (modality, batch, dim) pooled tokens, and (modality, batch) presence."""
        names = self._model[0].names
        features = torch.stack([output.tokens[name].pooled() for name in names])
        return at_least_single(features), torch.stack([has_modality(output, name) for name in names])


def _sums(values: Tensor, counts: Tensor) -> Tensor:
    """Returns (modality,) sums of (modality, batch, question) values over the masked entries."""
    return values.masked_fill(~counts, 0.0).sum(dim=(1, 2))
