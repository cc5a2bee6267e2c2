"""MMPareto: multimodal and unimodal gradients of an encoder, joined so that neither is hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens import Output
from .base import Balancer, Multimodal
from .modalities import check_modalities, unimodal_losses
from .scores import heads_teach, summed


def pareto_weights(joint: Float[Tensor, " n"], alone: Float[Tensor, " n"]) -> Float[Tensor, " 2"]:
    """Weights of the two gradients: halves where they agree, else the shortest vector between them.

    Args:
        joint: (n,) gradient of the multimodal loss.
        alone: (n,) gradient of the unimodal loss.

    Returns:
        (2,) weights of sum 1. Where the gradients conflict, ``w_1 joint + w_2 alone`` has the same inner product with
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
    """One encoder's gradient, a tensor for each parameter; see ``MMPareto``.

    Example:
        >>> pareto_gradient([torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])], gamma=1.0)
        [tensor([0.4472, 0.8944])]
    """
    first, second = pareto_weights(_flat(joint), _flat(alone))
    found = []
    for a, b in zip(joint, alone, strict=True):
        mixed = 2 * (first * a + second * b)
        length = mixed.norm()
        # Of opposite gradients nothing is left but rounding, which must not be blown up to their size.
        whole = length > torch.finfo(mixed.dtype).eps * (a.norm() + b.norm())
        restored = (a + b).norm() / torch.where(whole, length, 1.0)
        found.append(gamma * mixed * torch.where(whole, restored.clamp(min=1.0), 0.0))
    return found


class MMPareto(Balancer):
    """Gives every encoder a gradient that serves the multimodal and its unimodal loss alike.

    With g_1 the gradient of the multimodal loss and g_2 that of the modality's own loss, over all of an encoder::

        w = (1/2, 1/2) where g_1 . g_2 >= 0, else the weights of the shortest w_1 g_1 + w_2 g_2
        g = 2 (w_1 g_1 + w_2 g_2)
        g <- gamma g max(1, |g_1 + g_2| / |g|)          for each parameter tensor

    The heads and the fusion learn from the plain sum of all losses. The gradients of the encoders are this method's
    alone: penalties of other balancers do not reach them.

    Args:
        model: with unimodal heads that teach, or logits that are a sum over modalities.
        gamma: factor on the gradient, > 0.

    Raises:
        ConfigError: one modality, a gamma out of range; in training, nothing that tells the modalities' own losses.

    It helps where unimodal losses are wanted and pull against the multimodal one. ``gamma`` alone is a larger learning
    rate, and Adam divides it out: compare with a tuned learning rate. Both gradients are computed apart, by two more
    backward passes: an epoch takes 2 to 2.5 times as long. Under ``16-mixed`` they are not scaled; prefer bf16.

    Reference: Wei and Hu, "MMPareto" (ICML 2024); spec 3.3.
    Differs from the released code in: gradients are of whole optimiser steps, over accumulated batches and processes;
    the benchmark's bug of weights (0, 0) on conflict, and of losses that mix because gradients are not cleared, is not
    here.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.JointAttention(8), 2, unimodal="train")
        >>> balancing = eq.Balancing(model, [eq.MMPareto(model, gamma=1.5)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
    """

    needs_heads = True
    excludes: ClassVar[Mapping[str, str]] = {"GradientBlending": "both decide what the modalities' losses weigh"}

    def __init__(self, model: Multimodal, *, gamma: float = 1.5) -> None:
        super().__init__()
        check_modalities(model, "MMPareto")
        if not gamma > 0:
            raise ConfigError("MMPareto", expected="gamma > 0", got=f"gamma = {gamma}")
        self._model, self.gamma = [model], gamma
        # Sums over the batches of one optimiser step, name -> [joint..., samples, alone..., samples]; no state, since
        # checkpoints are written between steps.
        self._sums: dict[str, Tensor] = {}

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Takes the gradients of the encoders apart; the modalities' losses where the loop does not count them."""
        model = self._model[0]
        if output.logits is None:
            raise ConfigError("MMPareto", expected="an output with logits", got="logits = None")
        alone = unimodal_losses(model, output, target, "MMPareto")
        total = torch.stack([loss.mean for loss in alone.values()]).sum()
        # Nothing is taken apart where all encoders are frozen, or a loss is only looked at.
        parameters = self._learning() if torch.is_grad_enabled() else {}
        joint_gradients = _gradients(model.loss(output.logits, target), parameters)
        alone_gradients = _gradients(total, parameters)
        for name in parameters:
            count = alone[name].count
            size = torch.full_like(count, len(target))
            sums = torch.cat([joint_gradients[name] * size, size[None], alone_gradients[name] * count, count[None]])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        counted = heads_teach(model) and output.unimodal_logits
        return None if counted else total

    def before_step(self) -> None:
        """Writes the joined gradients."""
        for name, sums in self._sums.items():
            joint, alone = (part[:-1] / part[-1].clamp(min=1) for part in summed(sums).chunk(2))
            parameters = self._learning()[name]
            found = pareto_gradient(_shaped(joint, parameters), _shaped(alone, parameters), gamma=self.gamma)
            for parameter, gradient in zip(parameters, found, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(gradient)
        self._sums = {}

    def _learning(self) -> dict[str, list[nn.Parameter]]:
        """name -> what the encoder learns; encoders that learn nothing are left out."""
        learning = {name: list(self._model[0].encoders[name].parameters()) for name in self._model[0].names}
        learning = {name: [p for p in group if p.requires_grad] for name, group in learning.items()}
        return {name: group for name, group in learning.items() if group}


def _gradients(loss: Tensor, parameters: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """name -> one flat gradient of all the encoder's parameters, zero where the loss does not depend on them."""
    every = [p for group in parameters.values() for p in group]
    found = torch.autograd.grad(loss, every, retain_graph=True, allow_unused=True) if every else ()
    whole = iter(torch.zeros_like(p) if g is None else g for p, g in zip(every, found, strict=True))
    return {name: _flat([next(whole) for _ in group]) for name, group in parameters.items()}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _shaped(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
