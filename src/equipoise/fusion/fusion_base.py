"""What every fusion is: encoder tokens by name in, one Output out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..tokens.token_batch import Output, Tokens


class Fusion(nn.Module, ABC):
    """Base of the fusions.

    A fusion is made with its own options and learns from ``build`` which modalities it joins. ``FusionModel`` calls it;
    alone, call ``build(names)`` before you make an optimizer, or the first forward pass does. Parameters that depend on
    the modalities are made there.

    Args:
        dim: width of the encoders' tokens.
    """

    dim: int
    names: tuple[str, ...]

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ConfigError(type(self).__name__, expected="dim >= 1", got=f"dim = {dim}")
        self.dim, self.names = dim, ()

    def build(self, names: Sequence[str]) -> Self:
        """Makes the parts that depend on the modalities, once."""
        names = tuple(names)
        if self.names and self.names != names:
            raise ConfigError(
                type(self).__name__,
                expected=f"the modalities it was built for, {self.names}",
                got=str(names),
                fix="Make a new fusion for another set of modalities.",
            )
        if not names or len(set(names)) != len(names):
            raise ConfigError(type(self).__name__, expected="one or more different modality names", got=str(names))
        if not self.names:
            self.names = names
            self._build()
        return self

    @abstractmethod
    def _build(self) -> None:
        """Makes the parameters that depend on ``self.names``."""

    @property
    @abstractmethod
    def out_dim(self) -> int:
        """Width of ``Output.features``."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The modalities on which the features depend: all of ``names``, unless the fusion is made to read fewer."""
        return self.names

    @abstractmethod
    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        """The fusion itself, on checked tokens in the order of ``names``."""

    def head(self, num_outputs: int) -> nn.Module:
        """The module that turns ``Output.features`` into logits."""
        return nn.Linear(self.out_dim, num_outputs)

    def contributions(self, output: Output, head: nn.Module) -> dict[str, Tensor] | None:
        """name -> (batch, output): each modality's part of the logits, which add up to them; None where they do not.

        Cheap and differentiable. Joint attention can be taken apart too, at the price of another pass:
        ``modality_contributions``.
        """
        return None

    def forward(self, tokens: Mapping[str, Tokens]) -> Output:
        """name -> Tokens (batch, token, dim) in, Output with ``features`` (and ``share`` where there is attention) out.

        A modality that a sample lacks is a mask row of False; one that the whole batch lacks has no tokens at all.
        Masked values are set to zero first, so that none reaches an output or a gradient, NaN and infinity included.
        Tokens of modalities outside of ``reads`` are passed on as they are, whatever their size.
        """
        who = type(self).__name__
        if not self.names:
            self.build(tuple(tokens))
        if set(tokens) != set(self.names):
            raise ShapeError(
                who,
                expected=f"tokens for {', '.join(self.names)}",
                got=f"tokens for {', '.join(tokens) or 'none'}",
                fix="A modality that is missing from the whole batch is Tokens(torch.zeros(batch, 0, dim)).",
            )
        ordered = {name: tokens[name].zero_masked() for name in self.names}
        first = self.reads[0]
        batch = len(ordered[first].values)
        for name in self.reads:
            part = ordered[name]
            if len(part.values) != batch:
                raise ShapeError(
                    f"{who} '{name}'",
                    expected=f"batch = {batch} as '{first}' has",
                    got=f"{len(part.values)}",
                    fix="All modalities of a batch hold the same samples; mask those that lack one.",
                )
            if part.dim != self.dim:
                raise ShapeError(
                    f"{who} '{name}'",
                    expected=f"tokens of width dim = {self.dim}",
                    got=f"width {part.dim}",
                    fix=f"Build the fusion with dim={part.dim}, or end the encoder with "
                    f"torch.nn.Linear({part.dim}, {self.dim}).",
                )
        return self._fuse(ordered)
