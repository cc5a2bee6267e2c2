"""Re-learning: encoders that have overfitted go part of the way back to where they began."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.eval_mode import eval_mode_no_grad
from ..optional_packages import require_extra
from .balancer import Balancer, Batch, Multimodal
from .common.target_categories import bin_edges, categories, category_counts
from .common.unimodal_scores import has_modality, summed
from .common.unimodal_terms import at_least_single, check_encoders_apart, check_modalities


def purity(clusters: Int[Tensor, " batch"], classes: Int[Tensor, "batch question"]) -> float:
    """Part of the samples that are of the most frequent class of their cluster; the mean over questions.

    Example:
        >>> purity(torch.tensor([0, 0, 0, 1]), torch.tensor([[5], [5], [2], [2]]))
        0.75
    """
    found = []
    for column in classes.T:
        counts = torch.zeros(int(clusters.max()) + 1, int(column.max()) + 1, dtype=torch.long)
        counts.index_put_((clusters, column), torch.ones_like(column), accumulate=True)
        found.append(int(counts.amax(dim=1).sum()) / len(column))
    return sum(found) / len(found)


def kmeans_labels(features: Float[Tensor, "batch dim"], count: int, *, seed: int) -> Int[Tensor, " batch"]:
    """The k-means cluster of every sample, after each dimension is scaled to [-1, 1].

    Example:
        >>> found = clustered(torch.tensor([[0.0, 5.0], [0.1, 5.0], [9.0, 5.0]]), 2, seed=0)
        >>> bool(found[0] == found[1]), bool(found[0] == found[2])
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
    """Every so often sets each encoder back toward its first weights, the further the more it has overfitted::

        gap_m = |purity(k-means of f_m on training data) - purity(the same on validation data)|
        w_m = tanh(strength gap_m);   theta_m <- w_m theta_m^initial + (1 - w_m) theta_m

    f_m are the encoder's pooled tokens, clustered into as many clusters as there are classes (outputs of a multilabel
    task, bins of a regression). What the optimizer remembers of the encoder is forgotten. The last epoch sets nothing
    back.

    Args:
        model: any fusion. Its encoders as they are now are what they go back to: attach it before training.
        epochs: of the whole training; None: unknown.
        every: epochs from one time to the next.
        times: how often at most.
        strength: > 0; the paper's lambda.
        bins: of a regression's targets, each a class of its own; >= 2.
        seed: of k-means.

    Raises:
        ConfigError: one modality, an option out of range; at the end of the first epoch, an optimizer that it was not
            given (``BalancerList.attach_optimizer``; the Lightning callback does it); later, an empty split.

    It helps where the dominant modality's encoder memorizes. Encoders that were pretrained go back to what they were,
    and need no protection. Purity is rough on a small validation split, where clusters of few samples are pure by
    chance. The first weights are part of the state: checkpoints hold the encoders twice. Each time takes one more pass
    over the data. Of several processes each clusters its own part, and gaps are averaged.

    Reference: Wei et al., "Diagnosing and Re-learning for Balanced Multimodal Learning" (ECCV 2024); spec 3.3.
    Differs from the released code in: the encoder's state in the optimizer is reset too, where the code has the bug of
    keeping it; the first weights survive a checkpoint; multilabel targets and regressions.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.DiagnoseRelearn(model, every=1)])
        >>> balancing.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.review([batch], [batch])
        >>> balancing.end_epoch()  # the same data, so there is no gap
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
        for place, name in enumerate(model.names):
            weights = [p.detach().reshape(-1) for p in model.encoders[name].parameters()]
            self.register_buffer(f"initial_{place}", torch.cat(weights) if weights else torch.zeros(0))

    epochs: Tensor
    done: Tensor
    reset: Tensor

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizers.append(optimizer)

    def review(self, train: Iterable[Batch], val: Iterable[Batch]) -> None:
        """Measures the gaps and sets the encoders back, in the epochs after which it is time."""
        if not self._optimizers:
            raise ConfigError(
                "DiagnoseRelearn", expected="the optimizer, whose state it resets", got="none",
                fix="Call balancing.attach_optimizer(optimizer) before training.",
            )  # fmt: skip
        passed = int(self.epochs) + 1
        last = self.last_epoch is not None and passed >= self.last_epoch
        if passed % self.every or int(self.done) >= self.times or last:
            return
        self.reset.copy_(torch.tanh(self.strength * self.gaps(train, val)))
        for place, (name, weight) in enumerate(zip(self._model[0].names, self.reset.tolist(), strict=True)):
            if weight > 0:
                self._set_back(self._model[0].encoders[name], self.get_buffer(f"initial_{place}"), weight)
        self.done += 1

    def end_epoch(self) -> dict[str, float]:
        """``reset/<name>``: how far each encoder went back at the end of this epoch, from 0 to 1."""
        self.epochs += 1
        said = {f"reset/{name}": w for name, w in zip(self._model[0].names, self.reset.tolist(), strict=True)}
        self.reset.zero_()
        return said

    def gaps(self, train: Iterable[Batch], val: Iterable[Batch]) -> Float[Tensor, " modality"]:
        """How much purer the clusters of each modality are on one split than on the other; 0 where nobody has it."""
        model, edges = self._model[0], torch.zeros(1, 1)
        questions, classes = category_counts(model, self.bins)
        count = max(classes, questions) if model.task == "multilabel" else classes
        found = []
        for batches in (train, val):
            features, here, target = self._read(batches)
            if not found and model.task == "regression":
                edges = bin_edges(target, self.bins)
            labels = categories(target, model.task, edges).cpu()
            found.append([
                purity(kmeans_labels(f[has], count, seed=self.seed), labels[has]) if bool(has.any()) else None
                for f, has in zip(features.cpu(), here.cpu(), strict=True)
            ])  # fmt: skip
        pairs = zip(*found, strict=True)
        gaps = [0.0 if one is None or other is None else abs(one - other) for one, other in pairs]
        total = summed(torch.tensor([*gaps, 1.0], dtype=torch.float64, device=features.device)).cpu()
        return total[:-1] / total[-1]

    def _read(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """(modality, batch, dim) pooled tokens, (modality, batch) who has them, and the targets."""
        model, features, here, targets = self._model[0], [], [], []
        with eval_mode_no_grad(model):  # type: ignore[arg-type]
            for batch in batches:
                output = model(batch)
                features.append(torch.stack([at_least_single(output.tokens[n].pooled()) for n in model.names]))
                here.append(torch.stack([has_modality(output, n) for n in model.names]))
                targets.append(batch["target"])
        if not features:
            raise ConfigError(
                "DiagnoseRelearn", expected="training and validation batches to review", got="none",
                fix="Overfitting is measured on a validation split: give one.",
            )  # fmt: skip
        return torch.cat(features, dim=1), torch.cat(here, dim=1), torch.cat(targets)

    @torch.no_grad()
    def _set_back(self, encoder: nn.Module, initial: Tensor, weight: float) -> None:
        parameters = list(encoder.parameters())
        pieces = initial.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.lerp_(piece.to(parameter).view_as(parameter), weight)
            for optimizer in self._optimizers:
                optimizer.state.pop(parameter, None)
