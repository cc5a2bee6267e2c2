"""What every balancing method is: at most five moments around somebody else's training step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..tokens import Output


class Balancer(nn.Module):
    """Base of the balancing methods. Override the moments you need; all of them are optional.

    The training loop calls, in this order: ``transform`` during the forward pass, ``observe`` after it, ``penalty`` for
    a term of the loss, ``gradient_scale`` for a factor on the gradient at each encoder's output, ``end_epoch`` once an
    epoch. A balancer never sees the loop. What it remembers are buffers, so that a checkpoint holds it.
    """

    def transform(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """name -> (batch, dim) pooled features, before fusion; returns them changed."""
        return features

    def observe(self, output: Output, target: Tensor) -> None:
        """Sees the output of a training step."""

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """A scalar that is added to the loss, or None."""
        return None

    def gradient_scale(self, output: Output, target: Tensor) -> Mapping[str, Tensor | float] | None:
        """name -> factor on the gradient that flows back into that modality's encoder, or None."""
        return None

    def end_epoch(self) -> dict[str, float]:
        """What happens once an epoch; returns what is worth logging."""
        return {}
