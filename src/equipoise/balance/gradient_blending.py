"""Gradient blending: every loss weighs as much as it generalizes, against how it overfits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..tokens.token_batch import Output
from .balancer import Balancer, Batch, Multimodal
from .common.probe_training import blended_losses, evaluate_losses, trained_copy
from .common.unimodal_scores import summed
from .common.unimodal_terms import check_modalities


def blending_weights(
    start: Float[Tensor, "2 loss"], end: Float[Tensor, "2 loss"], *, floor: float = 1e-3
) -> Float[Tensor, " loss"]:
    """Weights of several losses, of sum 1, from what each was before and after some training.

    Args:
        start: (2, loss) mean training losses, and mean validation losses, before.
        end: (2, loss) the same afterward.
        floor: what the growth of overfitting counts at least.

    Returns:
        (loss,) |G| / max(|dO|, floor)^2, normalized, with G the fall of the validation loss and dO the growth of the
        gap between validation and training. Equal weights where nothing moved.

    Example:
        >>> start, end = torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.5], [1.5, 1.7]])
        >>> blending_weights(start, end)  # gained 0.5 and 0.3, overfitted by 0.5 and 0.2
        tensor([0.2105, 0.7895])
    """
    gained = start[1] - end[1]
    overfitted = (end[1] - end[0]) - (start[1] - start[0])
    raw = gained.abs() / overfitted.abs().clamp(min=floor).square()
    total = raw.sum()
    return torch.where(total > 0, raw / total.clamp(min=torch.finfo(raw.dtype).tiny), 1 / len(raw))


class GradientBlending(Balancer):
    """Weighs the multimodal loss and every modality's own by how well each of them generalizes::

        L = sum_k w_k L_k,   k = each modality alone, and all jointly
        w_k ~ |G_k| / dO_k^2 over the last ``every`` epochs; see ``blending_weights``

    All weights are equal at first. They are estimated after epochs 1, 1 + every, 1 + 2 every, ...

    Args:
        model: with unimodal heads that teach, or logits that are a sum over modalities.
        epochs: of the whole training; no estimate is made for epochs that never come. None: unknown.
        every: epochs from one estimate to the next.
        floor: of dO, > 0.
        copies: True trains a copy of the model for each loss alone, ``every`` epochs long, as the paper does. False
            takes the losses of the running model, and so has its first weights after 1 + every epochs.
        learning_rate: of the copies' own AdamW.
        seed: of the copies' dropout.

    Raises:
        ConfigError: one modality, an option out of range; an empty split; heads that only watch, and no other way.

    It helps where modalities overfit at different speeds. Without copies the losses are entangled (all of them train
    one model), and the training losses are those of the epoch as it ran, so the estimate is cheap and rough: one
    validation pass an epoch. Copies cost ``modalities + 1`` more trainings of the same length, each modality's without
    the encoders of the others.

    Reference: Wang, Tran and Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?" (CVPR 2020);
    spec 3.3.
    Differs from the released code in: mean losses on a real validation split, and a floor under |dO|, without which a
    loss that has not begun to overfit takes all the weight; the first epoch is trained with equal weights; by default
    estimates come from the running model, and from copies, as in the paper, with ``copies``.

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
        # Losses times samples, and samples, of the epoch so far.
        self.register_buffer("running", torch.zeros(2, count, dtype=torch.float64))

    weights: Tensor
    epochs: Tensor
    start: Tensor
    running: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """The blended loss; heads that only watch learn beside it."""
        means, counts = blended_losses(self._model[0], output, target)
        self.note("losses", torch.stack([means.detach() * counts, counts]))
        blended = (self.weights.to(means) * means).sum()
        watching = getattr(self._model[0], "unimodal", "none") == "probe"
        return blended + self._model[0].unimodal_loss(output, target) if watching else blended

    def before_step(self) -> None:
        """Adds the step's losses to those of the epoch."""
        losses = self.noted_sum("losses")
        if losses is not None:
            self.running = self.running.to(losses.device) + losses

    def review(self, train: Iterable[Batch], val: Iterable[Batch]) -> None:
        """Estimates the weights, in the epochs after which it is time."""
        done = int(self.epochs) + 1
        if (done - 1) % self.every or (self.last_epoch is not None and done >= self.last_epoch):
            return
        model = self._model[0]
        if self.copies:
            start = torch.stack([evaluate_losses(model, train), evaluate_losses(model, val)])
            self.weights.copy_(blending_weights(start, self._ends(train, val), floor=self.floor))
            return
        trained = summed(self.running)
        now = torch.stack([trained[0] / trained[1].clamp(min=1), evaluate_losses(model, val).to(trained)])
        if done > 1:
            self.weights.copy_(blending_weights(self.start, now, floor=self.floor))
        self.start.copy_(now)

    def end_epoch(self) -> dict[str, float]:
        """The weights in use: ``weight/<name>`` of the modalities' own losses, ``weight`` of the multimodal one."""
        self.epochs += 1
        self.running.zero_()
        keys = (*(f"weight/{name}" for name in self._model[0].names), "weight")
        return dict(zip(keys, self.weights.tolist(), strict=True))

    def _ends(self, train: Iterable[Batch], val: Iterable[Batch]) -> Tensor:
        """(2, loss) of copies that were trained for each loss alone."""
        columns = []
        for place in range(len(self.weights)):
            twin = trained_copy(
                self._model[0], place, train, epochs=self.every, learning_rate=self.learning_rate,
                seed=(self.seed * 1_000_003 + int(self.epochs)) * 101 + place,
            )  # fmt: skip
            columns.append(torch.stack([evaluate_losses(twin, train)[place], evaluate_losses(twin, val)[place]]))
        return torch.stack(columns, dim=1)
