"""MMPareto: combines multimodal and unimodal gradients of an encoder without conflict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.gradients_by_term import term_gradients
from .common.unimodal_scores import heads_train_encoders
from .common.unimodal_terms import check_encoders_apart, check_modalities, unimodal_losses


def pareto_weights(joint: Float[Tensor, " n"], alone: Float[Tensor, " n"]) -> Float[Tensor, " 2"]:
    """Returns weights of the two gradients: halves if they agree, else those of the shortest combination.

    Args:
        joint: (n,) gradient of the multimodal loss.
        alone: (n,) gradient of the unimodal loss.

    Returns:
        (2,) weights of sum 1. If the gradients conflict, ``w_1 joint + w_2 alone`` has the same inner product with
        both, so a step along it lowers both losses.

    Example:
        >>> pareto_weights(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
        tensor([0.6000, 0.4000])
    """
    apart = alone - joint
    first = (apart @ alone / apart.square().sum().clamp(min=torch.finfo(apart.dtype).tiny)).clamp(0.0, 1.0)
    first = torch.where(joint @ alone >= 0, 0.5, first)
    return torch.stack([first, 1 - first])


def pareto_gradient(joint: Sequence[Tensor], alone: Sequence[Tensor], *, gamma: float) -> list[Tensor]:
    """Returns one encoder's combined gradient, one tensor per parameter; see ``MMPareto``.

    Example:
        >>> pareto_gradient([torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])], gamma=1.0)
        [tensor([0.4472, 0.8944])]
    """
    first, second = pareto_weights(_flat(joint), _flat(alone))
    result = []
    for a, b in zip(joint, alone, strict=True):
        mixed = 2 * (first * a + second * b)
        length = mixed.norm()
        # Opposite gradients cancel to rounding errors, which must not be rescaled.
        significant = length > torch.finfo(mixed.dtype).eps * (a.norm() + b.norm())
        restored = (a + b).norm() / torch.where(significant, length, 1.0)
        result.append(gamma * mixed * torch.where(significant, restored.clamp(min=1.0), 0.0))
    return result


class MMPareto(Balancer):
    """Combines the gradients of the multimodal and the unimodal loss of each encoder.

    With g_1 the gradient of the multimodal loss and g_2 that of the modality's own loss, over an encoder::

        w = (1/2, 1/2) if g_1 . g_2 >= 0, else the weights of the shortest w_1 g_1 + w_2 g_2
        g = 2 (w_1 g_1 + w_2 g_2)
        g <- gamma g max(1, |g_1 + g_2| / |g|)          for each parameter tensor

    g_2 is the contribution of the unimodal losses in the loop's backward passes, and g_1 the rest of an encoder's
    gradient, including penalties of other balancers; both are scaled as the loop scales the loss. Heads and fusion are
    trained with the plain sum of all losses.

    Args:
        model: with unimodal heads that train the encoders, or logits that are a sum over modalities.
        gamma: factor on the gradient, > 0.

    Raises:
        ConfigError: one modality, a gamma out of range; in training, no trainable unimodal losses.

    It helps if unimodal losses conflict with the multimodal loss. ``gamma`` acts as a larger learning rate, and Adam
    cancels it: compare with a tuned learning rate. The unimodal gradients need one more backward pass.

    Reference: Wei and Hu, "MMPareto" (ICML 2024).
    Differs from the released code in: gradients of whole optimizer steps, over accumulated batches and processes; the
    benchmark, by bugs, uses weights (0, 0) on conflict, and mixes losses because gradients are not cleared.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2, unimodal="train")
        >>> balancing = eq.BalancerList(model, [eq.balance.MMPareto(model, gamma=1.5)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
    """

    needs_heads = True
    excludes: ClassVar[Mapping[str, str]] = {"GradientBlending": "both set the weights of the unimodal losses"}

    def __init__(self, model: Multimodal, *, gamma: float = 1.5) -> None:
        super().__init__()
        check_modalities(model, "MMPareto")
        check_encoders_apart(model, "MMPareto")
        if not gamma > 0:
            raise ConfigError("MMPareto", expected="gamma > 0", got=f"gamma = {gamma}")
        self._model, self.gamma = [model], gamma

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Registers the unimodal gradients; returns the unimodal losses if they are not part of the loss yet."""
        model = self._model[0]
        if output.logits is None:
            raise ConfigError("MMPareto", expected="an output with logits", got="logits = None")
        alone = unimodal_losses(model, output, target, "MMPareto")
        total = torch.stack([loss.mean for loss in alone.values()]).sum()
        self.when_reached(partial(self._unimodal_gradients, total))
        counted = heads_train_encoders(model) and output.unimodal_logits
        return None if counted else total

    def before_step(self) -> None:
        """Replaces the encoders' gradients by the combination of unimodal gradient and the rest."""
        ratio = self._pending.ratio()
        for name, parameters in self._trainable().items():
            sums = self.noted_sum(name)
            if sums is None:
                continue
            totals = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            alone = _shaped(all_reduce_sum(sums) * ratio, parameters)
            joint = [total - unimodal for total, unimodal in zip(totals, alone, strict=True)]
            combined = pareto_gradient(joint, alone, gamma=self.gamma)
            for parameter, gradient in zip(parameters, combined, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(gradient)

    def _unimodal_gradients(self, total: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Returns the encoders' gradients of the unimodal losses in this backward pass."""
        learning = self._trainable()
        every = [p for group in learning.values() for p in group]
        gradients = term_gradients(total, every, gradient, "MMPareto") if every else ()
        gradient_iter = iter(torch.zeros_like(p) if g is None else g for p, g in zip(every, gradients, strict=True))
        return {name: _flat([next(gradient_iter) for _ in group]) for name, group in learning.items()}

    def _trainable(self) -> dict[str, list[nn.Parameter]]:
        """Returns name -> trainable parameters of the encoder; frozen encoders are left out."""
        learning = {name: list(self._model[0].encoders[name].parameters()) for name in self._model[0].names}
        learning = {name: [p for p in group if p.requires_grad] for name, group in learning.items()}
        return {name: group for name, group in learning.items() if group}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _shaped(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
