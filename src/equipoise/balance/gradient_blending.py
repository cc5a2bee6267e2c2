"""Gradient blending: weights losses by generalization relative to overfitting."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Batch, Multimodal
from .common.probe_training import blended_losses, evaluate_losses, trained_copy
from .common.unimodal_terms import check_modalities


def blending_weights(
    start: Float[Tensor, "2 loss"], end: Float[Tensor, "2 loss"], *, floor: float = 1e-3
) -> Float[Tensor, " loss"]:
    """Returns weights of sum 1 for several losses, from their values before and after some training.

    Args:
        start: (2, loss) mean training losses and mean validation losses before.
        end: (2, loss) the same afterward.
        floor: minimum growth of overfitting.

    Returns:
        (loss,) |G| / max(|dO|, floor)^2, normalized, with G the decrease of the validation loss and dO the growth of
        the gap between validation and training. Equal weights if no loss changed.

    Example:
        >>> start, end = torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.5], [1.5, 1.7]])
        >>> blending_weights(start, end)  # G = 0.5 and 0.3, dO = 0.5 and 0.2
        tensor([0.2105, 0.7895])
    """
    generalization = start[1] - end[1]
    overfitting = (end[1] - end[0]) - (start[1] - start[0])
    raw = generalization.abs() / overfitting.abs().clamp(min=floor).square()
    total = raw.sum()
    return torch.where(total > 0, raw / total.clamp(min=torch.finfo(raw.dtype).tiny), 1 / len(raw))


class GradientBlending(Balancer):
    """Weights the multimodal loss and the unimodal losses by how well each generalizes::

        L = sum_k w_k L_k,   k = each modality alone, and all together
        w_k ~ |G_k| / dO_k^2 over the last ``every`` epochs; see ``blending_weights``

    All weights are equal at first. They are estimated after epochs 1, 1 + every, 1 + 2 every, ...

    Args:
        model: with unimodal heads that train the encoders, or logits that are a sum over modalities.
        epochs: number of epochs of the whole training, to skip the estimate after the last one; None: unknown.
        every: epochs from one estimate to the next.
        floor: minimum of |dO|, > 0.
        copies: True trains a copy of the model for each loss alone for ``every`` epochs, as in the paper. False uses
            the losses of the running model, and has its first weights after 1 + every epochs.
        learning_rate: learning rate of AdamW for the copies.
        seed: seed of the copies' dropout.

    Raises:
        ConfigError: one modality, an option out of range; an empty split; no trainable unimodal losses.

    It helps if modalities overfit at different speeds. Without copies the losses are entangled (all of them train one
    model), and the training losses are those recorded during the epoch, so the estimate is rough but needs only one
    validation pass per epoch. Copies cost ``modalities + 1`` more trainings of the same length; those of a single
    modality do not run the other encoders.

    Reference: Wang, Tran and Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?" (CVPR 2020).
    Differs from the released code in: mean losses on a separate validation split, and a floor for |dO|, without which
    a loss that does not overfit yet gets all the weight; equal weights in the first epoch; estimates from the running
    model by default, and from copies, as in the paper, with ``copies``.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2, unimodal="train")
        >>> balancer = eq.balance.GradientBlending(model, every=5)
        >>> {name: round(weight, 2) for name, weight in balancer.end_epoch().items()}
        {'weight/audio': 0.33, 'weight/image': 0.33, 'weight': 0.33}
    """

    name = "blending"
    replaces = ("task", "unimodal")
    needs_heads = True
    reviews = True
    changes_gradients = False

    def __init__(
        self, model: Multimodal, *, epochs: int | None = None, every: int = 10, floor: float = 1e-3,
        copies: bool = False, learning_rate: float = 1e-3, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_modalities(model, "GradientBlending")
        if every < 1 or not floor > 0 or not learning_rate > 0:
            raise ConfigError(
                "GradientBlending", expected="every >= 1, floor > 0 and learning_rate > 0",
                got=f"every = {every}, floor = {floor}, learning_rate = {learning_rate}",
            )  # fmt: skip
        self._model, self.last_epoch = [model], epochs
        self.every, self.floor, self.copies, self.learning_rate, self.seed = every, floor, copies, learning_rate, seed
        count = len(model.names) + 1
        self.register_buffer("weights", torch.full((count,), 1 / count, dtype=torch.float64))
        self.register_buffer("epochs", torch.tensor(0))
        self.register_buffer("start", torch.zeros(2, count, dtype=torch.float64))
        # In this epoch: sums of losses times samples, and numbers of samples.
        self.register_buffer("running", torch.zeros(2, count, dtype=torch.float64))

    weights: Tensor
    epochs: Tensor
    start: Tensor
    running: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the blended loss, plus the loss of detached heads if the model has them."""
        means, counts = blended_losses(self._model[0], output, target)
        self.note("losses", torch.stack([means.detach() * counts, counts]))
        blended = (self.weights.to(means) * means).sum()
        has_probes = getattr(self._model[0], "unimodal", "none") == "probe"
        return blended + self._model[0].unimodal_loss(output, target) if has_probes else blended

    def before_step(self) -> None:
        """Adds the losses of the step to the sums of the epoch."""
        losses = self.noted_sum("losses")
        if losses is not None:
            self.running = self.running.to(losses.device) + losses

    def review(self, train: Iterable[Batch], val: Iterable[Batch]) -> None:
        """Estimates the weights, if an estimate is due after this epoch."""
        epoch = int(self.epochs) + 1
        if (epoch - 1) % self.every or (self.last_epoch is not None and epoch >= self.last_epoch):
            return
        model = self._model[0]
        if self.copies:
            start = torch.stack([evaluate_losses(model, train), evaluate_losses(model, val)])
            self.weights.copy_(blending_weights(start, self._losses_of_copies(train, val), floor=self.floor))
            return
        trained = all_reduce_sum(self.running)
        now = torch.stack([trained[0] / trained[1].clamp(min=1), evaluate_losses(model, val).to(trained)])
        if epoch > 1:
            self.weights.copy_(blending_weights(self.start, now, floor=self.floor))
        self.start.copy_(now)

    def end_epoch(self) -> dict[str, float]:
        """Returns the weights: ``weight/<name>`` of the unimodal losses, ``weight`` of the multimodal loss."""
        self.epochs += 1
        self.running.zero_()
        keys = (*(f"weight/{name}" for name in self._model[0].names), "weight")
        return dict(zip(keys, self.weights.tolist(), strict=True))

    def _losses_of_copies(self, train: Iterable[Batch], val: Iterable[Batch]) -> Tensor:
        """Returns (2, loss) training and validation losses of copies trained for each loss alone."""
        columns = []
        for index in range(len(self.weights)):
            model = trained_copy(
                self._model[0], index, train, epochs=self.every, learning_rate=self.learning_rate,
                seed=(self.seed * 1_000_003 + int(self.epochs)) * 101 + index,
            )  # fmt: skip
            columns.append(torch.stack([evaluate_losses(model, train)[index], evaluate_losses(model, val)[index]]))
        return torch.stack(columns, dim=1)
