"""MMPareto: multimodal and unimodal gradients of an encoder, joined so that neither is hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.gradients_by_term import term_gradients
from .common.unimodal_scores import heads_train_encoders, summed
from .common.unimodal_terms import check_encoders_apart, check_modalities, unimodal_losses


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

    g_2 is what the loop's backward passes bring of the modalities' losses, and g_1 all the rest of an encoder's
    gradient, penalties of other balancers included; so both are scaled as the loop scales the loss. The heads and the
    fusion learn from the plain sum of all losses.

    Args:
        model: with unimodal heads that teach, or logits that are a sum over modalities.
        gamma: factor on the gradient, > 0.

    Raises:
        ConfigError: one modality, a gamma out of range; in training, nothing that tells the modalities' own losses.

    It helps where unimodal losses are wanted and pull against the multimodal one. ``gamma`` alone is a larger learning
    rate, and Adam divides it out: compare with a tuned learning rate. The modalities' gradient is computed by one
    more backward pass.

    Reference: Wei and Hu, "MMPareto" (ICML 2024); spec 3.3.
    Differs from the released code in: gradients are of whole optimizer steps, over accumulated batches and processes;
    the benchmark's bug of weights (0, 0) on conflict, and of losses that mix because gradients are not cleared, is not
    here.

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
    excludes: ClassVar[Mapping[str, str]] = {"GradientBlending": "both decide what the modalities' losses weigh"}

    def __init__(self, model: Multimodal, *, gamma: float = 1.5) -> None:
        super().__init__()
        check_modalities(model, "MMPareto")
        check_encoders_apart(model, "MMPareto")
        if not gamma > 0:
            raise ConfigError("MMPareto", expected="gamma > 0", got=f"gamma = {gamma}")
        self._model, self.gamma = [model], gamma

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Takes the gradients of the encoders apart; the modalities' losses where the loop does not count them."""
        model = self._model[0]
        if output.logits is None:
            raise ConfigError("MMPareto", expected="an output with logits", got="logits = None")
        alone = unimodal_losses(model, output, target, "MMPareto")
        total = torch.stack([loss.mean for loss in alone.values()]).sum()
        self.when_reached(partial(self._take_apart, total))
        counted = heads_train_encoders(model) and output.unimodal_logits
        return None if counted else total

    def before_step(self) -> None:
        """Joins the gradient that backward brought for the modalities' losses with the rest of it."""
        ratio = self._pending.ratio()
        for name, parameters in self._learning().items():
            sums = self.noted_sum(name)
            if sums is None:
                continue
            whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            alone = _shaped(summed(sums) * ratio, parameters)
            joint = [total - own for total, own in zip(whole, alone, strict=True)]
            found = pareto_gradient(joint, alone, gamma=self.gamma)
            for parameter, gradient in zip(parameters, found, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(gradient)

    def _take_apart(self, total: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """What this backward pass brings to the encoders of the modalities' own losses."""
        learning = self._learning()
        every = [p for group in learning.values() for p in group]
        found = term_gradients(total, every, gradient, "MMPareto") if every else ()
        whole = iter(torch.zeros_like(p) if g is None else g for p, g in zip(every, found, strict=True))
        return {name: _flat([next(whole) for _ in group]) for name, group in learning.items()}

    def _learning(self) -> dict[str, list[nn.Parameter]]:
        """name -> what the encoder learns; encoders that learn nothing are left out."""
        learning = {name: list(self._model[0].encoders[name].parameters()) for name in self._model[0].names}
        learning = {name: [p for p in group if p.requires_grad] for name, group in learning.items()}
        return {name: group for name, group in learning.items() if group}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _shaped(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
