"""Data remixing: trains each sample on its hardest modality only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError
from ..fusion.subset_tokens import derived
from ..nn.distributed import all_reduce_sum
from ..nn.eval_mode import eval_mode_no_grad
from ..tokens.token_batch import Output, Tokens
from .balancer import Balancer, Multimodal
from .common.subset_predictions import subset_logits
from .common.unimodal_scores import has_modality, prediction_entropy
from .common.unimodal_terms import at_least_single, check_modalities
from .modality_dropout import mask_tokens, presence_mask


def hardest_modality(
    difficulty: Float[Tensor, "batch modality"], present: Bool[Tensor, "batch modality"]
) -> Int[Tensor, " batch"]:
    """Returns the index of the most difficult modality that each sample has; the first of equal ones.

    Example:
        >>> hardest_modality(torch.tensor([[0.1, 0.7], [0.1, 0.7]]), torch.tensor([[True, True], [True, False]]))
        tensor([1, 0])
    """
    return difficulty.masked_fill(~present, -torch.inf).argmax(dim=1)


class DataRemixing(Balancer):
    """Assigns each sample to the modality whose prediction is least certain, and hides its other modalities.

    With p_m the prediction of the model for sample i from modality m alone, y_i and u_i the logits of the model and of
    the unimodal head, both from modality m_i only, after the warm-up::

        m_i = argmin_m KL(p_m || uniform) = argmax_m H(p_m)
        loss = mean_i (l(y_i) + gamma l(u_i))

    During the warm-up no modality is hidden, and gamma weights the losses of all unimodal heads. A regression has no
    entropy: m_i is the modality with the largest squared error.

    Args:
        model: any fusion; modalities are removed between encoders and fusion.
        warmup: number of epochs with all modalities, >= 0.
        gamma: weight of the unimodal heads' losses, >= 0.

    Raises:
        ConfigError: one modality, an option out of range; in training, a regression without ``"target"`` in the batch.

    It helps if modalities disturb each other's training (modality clash), and if samples lack modalities. After the
    warm-up nothing is learned across modalities: a prediction that needs two of them (XOR) is forgotten. Certain and
    wrong predictions count as easy. The fusion runs once more per modality, without gradient.

    Reference: Ma, Chen and Deng, "Improving Multimodal Learning Balance and Sufficiency through Data Remixing" (ICML
    2025).
    Differs from the released code in: a batch contains samples of all modalities, where the code forms batches of one
    modality; no encoder sees a sample of another modality in either case, but fusion and head get the sum of all
    gradients; assignments by the current model in each batch instead of before each epoch; predictions of the fusion
    with one modality, where the code has unimodal heads; any number of modalities and tasks. The text of the paper was
    not available: the formulas are those of the code.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.DataRemixing(model, warmup=0)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> sum(int(part.present().sum()) for part in model(batch).tokens.values())
        4
    """

    name = "data_remixing"
    needs_heads = True
    replaces = ("unimodal",)
    changes_gradients = False

    def __init__(self, model: Multimodal, *, warmup: int = 5, gamma: float = 1.0) -> None:
        super().__init__()
        check_modalities(model, "DataRemixing")
        if warmup < 0 or not gamma >= 0:
            raise ConfigError(
                "DataRemixing", expected="warmup >= 0 and gamma >= 0", got=f"warmup = {warmup}, gamma = {gamma}"
            )
        self._model, self.warmup, self.gamma = [model], warmup, gamma
        # Keep this buffer on the CPU: reading it must not sync the GPU.
        self.register_buffer("epochs", torch.tensor(0))
        # In this epoch: number of samples assigned to each modality.
        self.register_buffer("assigned", torch.zeros(len(model.names), dtype=torch.float64))

    epochs: Tensor
    assigned: Tensor

    def transform(self, tokens: Mapping[str, Tokens], target: Tensor | None = None) -> Mapping[str, Tokens]:
        """Hides all modalities of a sample but its hardest one, after the warm-up."""
        if int(self.epochs) < self.warmup:
            return tokens
        present = presence_mask(tokens)
        chosen = hardest_modality(self._difficulty(tokens, target), present)
        kept = present & (torch.arange(present.shape[1], device=chosen.device) == chosen[:, None])
        self.keep("assigned", kept.sum(dim=0))
        return derived(tokens, mask_tokens(tokens, kept))

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Returns the losses of the unimodal heads, mean over all samples of the batch."""
        assigned = self.kept("assigned", output)
        if assigned is not None:
            self.note("assigned", assigned)
        model, terms = self._model[0], []
        for name, logits in output.unimodal_logits.items():
            losses = model.sample_losses(at_least_single(logits), target)
            terms.append(losses.masked_fill(~has_modality(output, name), 0.0).mean())
        return self.gamma * torch.stack(terms).sum() if terms else None

    def before_step(self) -> None:
        """Adds the assignments of the step to those of the epoch."""
        assigned = self.noted_sum("assigned")
        if assigned is not None:
            self.assigned = self.assigned.to(assigned.device) + assigned

    def end_epoch(self) -> dict[str, float]:
        """Returns ``assigned/<name>``, the fraction of samples assigned to each modality; 0 in the warm-up."""
        counts = all_reduce_sum(self.assigned)
        self.assigned = torch.zeros_like(self.assigned)
        self.epochs += 1
        fractions = (counts / counts.sum().clamp(min=1)).tolist()
        return {f"assigned/{name}": part for name, part in zip(self._model[0].names, fractions, strict=True)}

    @torch.no_grad()
    def _difficulty(self, tokens: Mapping[str, Tokens], target: Tensor | None) -> Float[Tensor, "batch modality"]:
        """Returns the entropy, or squared error, of the prediction from each modality alone."""
        model, columns = self._model[0], []
        if model.task == "regression" and target is None:
            raise ConfigError("DataRemixing", expected="batch['target'] for a regression", got="none")
        with eval_mode_no_grad(model):  # type: ignore[arg-type]
            for name in model.names:
                logits = subset_logits(model, tokens, [name])
                if model.task == "regression" and target is not None:
                    columns.append(model.sample_losses(logits, target))
                else:
                    columns.append(prediction_entropy(logits, model.task))
        return torch.stack(columns, dim=1)
