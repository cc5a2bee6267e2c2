"""DGL: encoders learn from their unimodal losses alone, fusion and head from the multimodal loss alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..fusion.subset_tokens import derived
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output, Tokens
from .balancer import Balancer, Multimodal
from .common.gradients_by_term import term_gradients
from .common.subset_predictions import subset_logits
from .common.unimodal_scores import has_modality
from .common.unimodal_terms import at_least_single, check_modalities

NOT_REACHED = "its loss would not reach the encoders, which DGL trains by unimodal losses alone"


def gradient_loss(
    value: Float[Tensor, ""], tokens: Float[Tensor, "batch token dim"], gradient: Float[Tensor, "batch token dim"]
) -> Float[Tensor, ""]:
    """Returns a term with a given value and a given gradient with respect to tokens.

    Args:
        value: value of the term.
        tokens: tokens in the graph of an encoder.
        gradient: gradient of the term with respect to the tokens.

    Example:
        >>> tokens = torch.tensor([[[2.0, 3.0]]], requires_grad=True)
        >>> term = gradient_loss(torch.tensor(7.0), tokens, torch.tensor([[[0.5, -1.0]]]))
        >>> float(term.detach()), torch.autograd.grad(term, tokens)[0].tolist()
        (7.0, [[[0.5, -1.0]]])
    """
    product = (at_least_single(tokens) * at_least_single(gradient)).sum()
    return value.detach() + product - product.detach()


class DGL(Balancer):
    """Separates the gradients of encoders and fusion (disentangled gradient learning).

    With f_m the tokens of modality m, g fusion and head, and sg the stopped gradient::

        loss = l(g(sg f_1, ..., sg f_N)) + alpha sum_m l_m,   l_m = l(sg g(f_m alone))

    The multimodal loss trains fusion and head, and the unimodal losses l_m, of the fusion with modality m only, train
    the encoders. The value of a loss is not changed, only where its gradient goes.

    Args:
        model: any fusion; the other modalities are removed between encoders and fusion.
        alpha: weight of the unimodal losses, > 0. It scales the encoders' gradients only, so that Adam cancels it.

    Raises:
        ConfigError: one modality, an alpha out of range; in training, reentrant checkpointing of the fusion.

    It helps if joint training leaves encoders weaker than training them alone. Encoders learn nothing that only the
    combination of modalities predicts: if no modality predicts the target alone (XOR), they stay untrained. The
    fusion runs once more per modality, forward and backward. Penalties of other methods reach the encoders only if they
    are computed from their tokens; methods whose losses would not reach them are refused.

    Reference: Wei, Luo and Luo, "Boosting Multimodal Learning via Disentangled Gradient Learning" (ICCV 2025).
    Differs from the released code in: any fusion and any number of modalities by removing the others, where the code
    has a separate rule for each of four fusions; for ``Concat`` both are the same. The text of the paper was not
    available: the formula is that of its abstract and of the code.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.DGL(model, alpha=4.0)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> sorted(balancing.end_epoch())
        ['loss/audio', 'loss/image']
    """

    changes_gradients = False
    excludes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("AMCo", "ConsistencyBalancer", "GradientBlending", "LFM", "MBSD", "MLA", "MMCosine", "MMPareto", "ReconBoost",
         "SampleValuation"), NOT_REACHED,
    )  # fmt: skip

    def __init__(self, model: Multimodal, *, alpha: float = 4.0) -> None:
        super().__init__()
        check_modalities(model, "DGL")
        if not 0 < alpha < float("inf"):
            raise ConfigError("DGL", expected="a finite alpha > 0", got=f"alpha = {alpha}")
        self._model, self.alpha = [model], alpha
        # In this epoch: sums of the unimodal losses, and numbers of samples.
        self.register_buffer("running", torch.zeros(2, len(model.names), dtype=torch.float64))

    running: Tensor

    def transform(self, tokens: Mapping[str, Tokens], target: Tensor | None = None) -> Mapping[str, Tokens]:
        """Detaches the tokens that the fusion reads."""
        self.keep("tokens", tokens)
        return derived(tokens, {name: replace(part, values=_leaf(part.values)) for name, part in tokens.items()})

    def finish(self, output: Output) -> Output:
        """Returns the output with the tokens of the encoders, through which gradients reach them."""
        return output.with_(tokens=self.record.kept[id(self), "tokens"])

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the unimodal losses, whose gradient reaches the encoders only."""
        total = at_least_single(output.features).new_zeros(())
        columns = []
        for name in self._model[0].names:
            present = has_modality(output, name)
            count = present.sum()
            term, value = self._unimodal_loss(output.tokens, name, target, present)
            total = total + term / count.clamp(min=1)
            columns.append(torch.stack([value, count.to(value)]))
        self.note("losses", torch.stack(columns, dim=1))
        return self.alpha * total

    def before_step(self) -> None:
        """Adds the losses of the step to the sums of the epoch."""
        losses = self.noted_sum("losses")
        if losses is not None:
            self.running = self.running.to(losses.device) + losses

    def end_epoch(self) -> dict[str, float]:
        """Returns ``loss/<name>``, the mean unimodal loss of each modality in this epoch; 0 if no sample has it."""
        total, count = all_reduce_sum(self.running)
        self.running = torch.zeros_like(self.running)
        means = (total / count.clamp(min=1)).tolist()
        return {f"loss/{name}": mean for name, mean in zip(self._model[0].names, means, strict=True)}

    def _unimodal_loss(
        self, tokens: Mapping[str, Tokens], name: str, target: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum of a modality's losses as a term with gradient to its tokens only, and its value."""
        model, own = self._model[0], tokens[name]
        # Tensors of this graph are not left to activation checkpointing around model and loss, which would recompute
        # the whole forward pass for them. Hooks that return a saved output itself would create a reference cycle.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _same):
            leaf = _leaf(own.values)
            alone = derived(tokens, {**tokens, name: replace(own, values=leaf)})
            losses = model.sample_losses(subset_logits(model, alone, [name]), target).masked_fill(~present, 0.0)
            value = losses.sum()
            if not own.values.requires_grad:
                return value.detach(), value.detach()
            (gradient,) = term_gradients(value, [leaf], torch.ones_like(value), "DGL")  # type: ignore[list-item]
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        return gradient_loss(value, own.values, gradient), value.detach()


def _leaf(values: Tensor) -> Tensor:
    """Returns detached values that require a gradient, as reentrant checkpointing of the fusion needs."""
    return values.detach().requires_grad_()


def _same(tensor: Tensor) -> Tensor:
    return tensor
