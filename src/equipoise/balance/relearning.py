"""Diagnosing and re-learning: moves overfitted encoders back toward their initial weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, require_extra
from ..nn.distributed import all_reduce_sum
from ..nn.eval_mode import eval_mode_no_grad
from ..tokens.token_batch import as_output
from .balancer import Balancer, Batch, Multimodal
from .common.target_categories import bin_edges, categories, category_counts
from .common.unimodal_scores import has_modality
from .common.unimodal_terms import at_least_single, check_encoders_apart, check_modalities


def purity(clusters: Int[Tensor, " batch"], classes: Int[Tensor, "batch question"]) -> float:
    """Returns the fraction of samples in the most frequent class of their cluster; mean over questions.

    Example:
        >>> purity(torch.tensor([0, 0, 0, 1]), torch.tensor([[5], [5], [2], [2]]))
        0.75
    """
    purities = []
    for column in classes.T:
        counts = torch.zeros(int(clusters.max()) + 1, int(column.max()) + 1, dtype=torch.long)
        counts.index_put_((clusters, column), torch.ones_like(column), accumulate=True)
        purities.append(int(counts.amax(dim=1).sum()) / len(column))
    return sum(purities) / len(purities)


def kmeans_labels(features: Float[Tensor, "batch dim"], count: int, *, seed: int) -> Int[Tensor, " batch"]:
    """Returns the k-means cluster of each sample, after scaling each dimension to [-1, 1].

    Example:
        >>> labels = kmeans_labels(torch.tensor([[0.0, 5.0], [0.1, 5.0], [9.0, 5.0]]), 2, seed=0)
        >>> bool(labels[0] == labels[1]), bool(labels[0] == labels[2])
        (True, False)
    """
    with require_extra("DiagnoseRelearn"):
        from sklearn.cluster import KMeans

    low, high = features.amin(dim=0), features.amax(dim=0)
    scaled = 2 * (features - low) / (high - low).clamp(min=torch.finfo(features.dtype).tiny) - 1
    count = min(count, len(torch.unique(scaled, dim=0)))
    means = KMeans(count, n_init=10, random_state=seed)  # type: ignore[arg-type]
    return torch.from_numpy(means.fit_predict(scaled.numpy())).long()


class DiagnoseRelearn(Balancer):
    """Periodically moves each encoder toward its initial weights, in proportion to its overfitting::

        gap_m = |purity(k-means of f_m on training data) - purity(the same on validation data)|
        w_m = tanh(strength gap_m);   theta_m <- w_m theta_m^initial + (1 - w_m) theta_m

    f_m are the encoder's pooled tokens, with as many clusters as there are classes (outputs of a multilabel task, bins
    of a regression). The optimizer state of the encoder is cleared. Nothing is reset after the last epoch.

    Args:
        model: any fusion. The current weights of its encoders are the initial weights: create it before training.
        epochs: number of epochs of the whole training; None: unknown.
        every: epochs from one reset to the next.
        times: maximum number of resets.
        strength: the paper's lambda, > 0.
        bins: number of bins of a regression's targets, which are treated as classes; >= 2.
        seed: seed of k-means.

    Raises:
        ConfigError: one modality, an option out of range; at the end of the first epoch, no optimizer
            (``BalancerList.attach_optimizer``; the Lightning callback calls it); later, an empty split.

    It helps if the encoder of the dominant modality memorizes. Pretrained encoders are reset to their pretrained
    weights. Purity is imprecise on a small validation split, where small clusters are pure by chance. The initial
    weights are part of the state, so checkpoints contain the encoders twice. Each reset takes one more pass over the
    data. In distributed training each process clusters its own samples, and gaps are averaged.

    Reference: Wei et al., "Diagnosing and Re-learning for Balanced Multimodal Learning" (ECCV 2024).
    Differs from the released code in: the optimizer state of the encoder is reset too, where the code, by a bug, keeps
    it; the initial weights are saved in checkpoints; multilabel targets and regressions.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.DiagnoseRelearn(model, every=1)])
        >>> balancing.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.review([batch], [batch])
        >>> balancing.end_epoch()  # the same data twice: no gap
        {'reset/audio': 0.0, 'reset/image': 0.0}
    """

    name = "diagnose_relearn"

    reviews = True

    def __init__(
        self, model: Multimodal, *, epochs: int | None = None, every: int = 15, times: int = 2, strength: float = 3.0,
        bins: int = 5, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_modalities(model, "DiagnoseRelearn")
        check_encoders_apart(model, "DiagnoseRelearn")
        if every < 1 or times < 0 or not strength > 0 or bins < 2:
            raise ConfigError(
                "DiagnoseRelearn", expected="every >= 1, times >= 0, strength > 0 and bins >= 2",
                got=f"{every = }, {times = }, {strength = }, {bins = }",
            )  # fmt: skip
        self._model, self.last_epoch = [model], epochs
        self.every, self.times, self.strength, self.bins, self.seed = every, times, strength, bins, seed
        self._optimizers: list[torch.optim.Optimizer] = []
        self.register_buffer("epochs", torch.tensor(0))
        self.register_buffer("done", torch.tensor(0))
        self.register_buffer("reset", torch.zeros(len(model.names), dtype=torch.float64))
        for index, name in enumerate(model.names):
            weights = [p.detach().reshape(-1) for p in model.encoders[name].parameters()]
            self.register_buffer(f"initial_{index}", torch.cat(weights) if weights else torch.zeros(0))

    epochs: Tensor
    done: Tensor
    reset: Tensor

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizers.append(optimizer)

    def review(self, train: Iterable[Batch], val: Iterable[Batch]) -> None:
        """Measures the gaps and resets the encoders, if a reset is due after this epoch."""
        if not self._optimizers:
            raise ConfigError(
                "DiagnoseRelearn", expected="the optimizer, to reset its state", got="none",
                fix="Call balancing.attach_optimizer(optimizer) before training.",
            )  # fmt: skip
        passed = int(self.epochs) + 1
        last = self.last_epoch is not None and passed >= self.last_epoch
        if passed % self.every or int(self.done) >= self.times or last:
            return
        self.reset.copy_(torch.tanh(self.strength * self.gaps(train, val)))
        for index, (name, weight) in enumerate(zip(self._model[0].names, self.reset.tolist(), strict=True)):
            if weight > 0:
                self._reset_encoder(self._model[0].encoders[name], self.get_buffer(f"initial_{index}"), weight)
        self.done += 1

    def end_epoch(self) -> dict[str, float]:
        """Returns ``reset/<name>``, the weight of the initial weights at the end of this epoch, from 0 to 1."""
        self.epochs += 1
        log = {f"reset/{name}": w for name, w in zip(self._model[0].names, self.reset.tolist(), strict=True)}
        self.reset.zero_()
        return log

    def gaps(self, train: Iterable[Batch], val: Iterable[Batch]) -> Float[Tensor, " modality"]:
        """Returns the difference of purity between the splits for each modality; 0 if no sample has it."""
        model, edges = self._model[0], torch.zeros(1, 1)
        questions, classes = category_counts(model, self.bins)
        count = max(classes, questions) if model.task == "multilabel" else classes
        purities = []
        for batches in (train, val):
            features, present, target = self._collect(batches)
            if not purities and model.task == "regression":
                edges = bin_edges(target, self.bins)
            labels = categories(target, model.task, edges).cpu()
            purities.append([
                purity(kmeans_labels(f[mask], count, seed=self.seed), labels[mask]) if bool(mask.any()) else None
                for f, mask in zip(features.cpu(), present.cpu(), strict=True)
            ])  # fmt: skip
        pairs = zip(*purities, strict=True)
        gaps = [0.0 if one is None or other is None else abs(one - other) for one, other in pairs]
        total = all_reduce_sum(torch.tensor([*gaps, 1.0], dtype=torch.float64, device=features.device)).cpu()
        return total[:-1] / total[-1]

    def _collect(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (modality, batch, dim) pooled tokens, (modality, batch) presence, and the targets.

        Samples whose tokens are not finite count as missing.
        """
        model, features, present, targets = self._model[0], [], [], []
        with eval_mode_no_grad(model):  # type: ignore[arg-type]
            for batch in batches:
                output = as_output(model, model(batch), "DiagnoseRelearn")
                features.append(torch.stack([at_least_single(output.tokens[n].pooled()) for n in model.names]))
                there = torch.stack([has_modality(output, n) for n in model.names])
                present.append(there & features[-1].isfinite().all(dim=-1))
                targets.append(batch["target"])
        if not features:
            raise ConfigError(
                "DiagnoseRelearn", expected="training and validation batches to review", got="none",
                fix="Overfitting is measured on a validation split: pass one.",
            )  # fmt: skip
        return torch.cat(features, dim=1), torch.cat(present, dim=1), torch.cat(targets)

    @torch.no_grad()
    def _reset_encoder(self, encoder: nn.Module, initial: Tensor, weight: float) -> None:
        parameters = list(encoder.parameters())
        pieces = initial.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.lerp_(piece.to(parameter).view_as(parameter), weight)
            for optimizer in self._optimizers:
                optimizer.state.pop(parameter, None)
