"""Base class of fusions: maps the encoder tokens of each modality to one Output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..io.recorded_options import RecordedOptions
from ..tokens.token_batch import Output, Tokens


class Fusion(RecordedOptions, nn.Module, ABC):
    """Base class of fusions.

    ``build(names)`` sets the modalities and creates the parameters that depend on them. ``FusionModel`` calls it. For a
    standalone fusion, call it before creating an optimizer; otherwise the first forward pass does.

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
        """Creates the parts that depend on the modalities; repeated calls have no effect."""
        names = tuple(names)
        if self.names and self.names != names:
            raise ConfigError(
                type(self).__name__,
                expected=f"the modalities it was built for, {self.names}",
                got=str(names),
                fix="Create a new fusion for another set of modalities.",
            )
        if not names or len(set(names)) != len(names):
            raise ConfigError(type(self).__name__, expected="one or more different modality names", got=str(names))
        if not self.names:
            self.names = names
            self._build()
        return self

    @abstractmethod
    def _build(self) -> None:
        """Creates the parameters that depend on ``self.names``."""

    @property
    @abstractmethod
    def out_dim(self) -> int:
        """Width of ``Output.features``."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The modalities on which the features depend: all of ``names`` by default."""
        return self.names

    @abstractmethod
    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        """Fuses validated tokens in the order of ``names``."""

    def head(self, num_outputs: int) -> nn.Module:
        """Creates the module that maps ``Output.features`` to logits."""
        return nn.Linear(self.out_dim, num_outputs)

    def contributions(self, output: Output, head: nn.Module) -> dict[str, Tensor] | None:
        """Computes name -> (batch, output) parts of the logits that add up to them; None if there is no such sum.

        Differentiable. For joint attention, ``modality_contributions`` computes the parts with another forward pass.
        """
        return None

    def forward(self, tokens: Mapping[str, Tokens]) -> Output:
        """Maps name -> Tokens (batch, token, dim) to an Output with ``features`` and, for attention, ``share``.

        A modality missing for a sample is a mask row of False; one missing for the whole batch has zero tokens. Masked
        values are set to zero first, so that they affect no output or gradient, even if they are NaN or infinite.
        Tokens of modalities that are not in ``reads`` are passed through unchecked.
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
                    fix="All modalities of a batch contain the same samples; mask missing ones.",
                )
            if part.dim != self.dim:
                raise ShapeError(
                    f"{who} '{name}'",
                    expected=f"tokens of width dim = {self.dim}",
                    got=f"width {part.dim}",
                    fix=f"Build the fusion with dim={part.dim}, or append "
                    f"torch.nn.Linear({part.dim}, {self.dim}) to the encoder.",
                )
        return self._fuse(ordered)
