"""Consistency loss: penalizes the rank of the supermatrix of maps between shared concepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, unknown_name
from ..tokens.masks import at_least_float32 as exact
from ..tokens.masks import full_precision, zero_loss
from ..tokens.token_batch import Output, Tokens
from .block_matrix import SquareMatrix
from .cycle_consistency import cycle_error
from .pairwise_maps import supermatrix_from_tokens
from .spectrum import effective_rank, nuclear_norm

Kind = Literal["rank", "nuclear", "cycle"]
KINDS = ("rank", "nuclear", "cycle")


class ConsistencyLoss(nn.Module):
    """Loss that is small if composed maps i -> j -> k between modalities agree with the direct maps i -> k.

    The tokens of each modality are pooled to ``slots`` concepts by learned queries that all modalities share, so that
    modalities with different numbers of tokens can be compared. The maps between the concepts of two modalities are
    softmaxes of their cosine similarities, and P is the matrix of all maps::

        c_i = softmax(concepts tokens_i^T / sqrt(d)) tokens_i,  minus the mean over the concepts
        P_ij = softmax(cos(c_i, c_j) / temperature)
        rank     log(r*(P) / M)         0 for consistent hard maps, log N for P = I; the default
        nuclear  |P|_* / (N M) - 1      contradictions only
        cycle    cycle_error(P)         without singular values

    Minimizing the nuclear norm alone collapses: with I on the diagonal it is N M for all maps without contradiction,
    including P = I and uniform maps, so nothing prevents uniform maps. ``"rank"`` is minimal for hard maps only; with
    the low temperature, soft maps cannot hide contradictions. The mean over the concepts of a modality is subtracted,
    since a common component makes every map uniform, where the gradient of the loss almost vanishes.

    Args:
        dim: width of the tokens; required with slots.
        slots: number M of concepts; None compares the tokens directly, with equal numbers of tokens in all modalities.
        kind: ``"rank"``, ``"nuclear"`` (collapses, as described above) or ``"cycle"``.
        temperature: softmax temperature of the maps; maps become hard as it approaches 0.
        weight: factor of the loss.
        sinkhorn: number of Sinkhorn iterations, which make maps doubly stochastic; 0 uses a softmax over rows.

    Raises:
        ConfigError: slots are given without dim, slots < 2, or kind is unknown; in ``forward``, fewer than two
            modalities.
        ShapeError: in ``forward``, tokens have another width, or unequal numbers without slots.

    Why r* is used instead of the nuclear norm: see docs/methods/consistency.md.

    Example:
        >>> loss = ConsistencyLoss(8, slots=3)
        >>> loss({"audio": Tokens(torch.randn(2, 5, 8)), "image": Tokens(torch.randn(2, 7, 8))}).shape
        torch.Size([])
    """

    def __init__(
        self, dim: int | None = None, *, slots: int | None = 8, kind: Kind = "rank", temperature: float = 0.1,
        weight: float = 1.0, sinkhorn: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise unknown_name("ConsistencyLoss", "kind", str(kind), KINDS)
        if slots is not None and (dim is None or slots < 2):
            raise ConfigError(
                "ConsistencyLoss", expected="dim, and slots >= 2 (or slots=None)", got=f"dim = {dim}, slots = {slots}"
            )
        if temperature <= 0:
            raise ConfigError("ConsistencyLoss", expected="temperature > 0", got=f"temperature = {temperature}")
        self.dim, self.slots, self.kind = dim, slots, kind
        self.temperature, self.weight, self.sinkhorn = temperature, weight, sinkhorn
        self.concepts = None if slots is None else nn.Parameter(torch.randn(slots, dim) / dim**0.5)  # type: ignore[arg-type, operator]

    def forward(self, tokens: Mapping[str, Tokens | Tensor] | Output) -> Float[Tensor, ""]:
        """Computes the mean loss over the batch from name -> Tokens or (batch, token, dim), or from an Output.

        Samples with a missing modality are excluded; if no sample remains, loss and gradient are 0. Computed in float32
        or higher precision for all input types, also under autocast.
        """
        parts = self._parts(tokens)
        if len(parts) > 1 and any(len(part) == 0 for part in parts):
            return self._zero(parts)
        matrix = self.supermatrix(tokens)
        return self.weight * self._loss(matrix, len(parts)) if len(matrix) else self._zero(parts)

    def _zero(self, parts: list[Tokens]) -> Tensor:
        return zero_loss([*(part.values for part in parts), *self.parameters()])

    def of(self, matrix: SquareMatrix, num_modalities: int) -> Float[Tensor, ""]:
        """Computes the loss of existing maps, such as the attention of a model; ``temperature`` is not applied.

        Args:
            matrix: (batch, N M, N M), as returned by ``eq.consistency.supermatrix``.
            num_modalities: N.

        Samples with a zero matrix (padding only) are excluded.
        """
        return self.weight * self._loss(matrix, num_modalities)

    def supermatrix(self, tokens: Mapping[str, Tokens | Tensor] | Output) -> Float[Tensor, "batch size size"]:
        """Returns P for each sample that has all modalities."""
        parts = self._parts(tokens)
        if len(parts) < 2:
            raise ConfigError("ConsistencyLoss", expected="two or more modalities", got=f"{len(parts)}")
        complete = torch.stack([part.present() for part in parts]).all(dim=0)
        pooled = [self._concepts(part)[complete] for part in parts]
        masks = None
        if self.slots is None:
            if len({part.shape[1] for part in pooled}) != 1:
                raise ShapeError(
                    "ConsistencyLoss", expected="equally many tokens in all modalities",
                    got=f"{[part.shape[1] for part in pooled]}", fix="Pass slots=8 and dim, to pool them.",
                )  # fmt: skip
            masks = [_mask(part, complete) for part in parts]
        # Singular values require single precision or higher.
        units = [nn.functional.normalize(exact(part), dim=-1) for part in pooled]
        return supermatrix_from_tokens(units, temperature=self.temperature, masks=masks, sinkhorn=self.sinkhorn)

    def penalty(self, output: Output, target: Tensor | None = None) -> Float[Tensor, ""]:
        """Computes the loss of a model's output, with the signature that training loops expect."""
        return self(output)

    def _loss(self, matrix: Tensor, count: int) -> Tensor:
        if len(matrix) == 0:
            return zero_loss([matrix])
        size = matrix.shape[-1]
        # Samples without tokens have a zero matrix and are excluded.
        counts = matrix.detach().any(dim=-1).any(dim=-1)
        if self.kind == "cycle":
            losses = cycle_error(matrix, num_modalities=count)
        elif self.kind == "nuclear":
            losses = nuclear_norm(matrix) / size - 1
        else:
            losses = (effective_rank(matrix).masked_fill(~counts, 1.0) * count / size).log()
        return losses.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)

    def _parts(self, tokens: Mapping[str, Tokens | Tensor] | Output) -> list[Tokens]:
        streams = tokens.tokens if isinstance(tokens, Output) else tokens
        parts = [(part if isinstance(part, Tokens) else Tokens(part)).zero_masked() for part in streams.values()]
        for name, part in zip(streams, parts, strict=True):
            if self.dim is not None and part.dim != self.dim:
                raise ShapeError(f"ConsistencyLoss '{name}'", expected=f"width dim = {self.dim}", got=f"{part.dim}")
        return parts

    def _concepts(self, part: Tokens) -> Tensor:
        if self.concepts is None:
            return part.values
        values, concepts = exact(part.values), exact(self.concepts)
        with full_precision(values):
            scores = values @ concepts.t() / part.dim**0.5
            if part.mask is not None:
                scores = scores.masked_fill(~part.mask[..., None], torch.finfo(scores.dtype).min)
            pooled = scores.softmax(dim=1).transpose(1, 2) @ values
        return pooled - pooled.mean(dim=1, keepdim=True)


def _mask(part: Tokens, complete: Bool[Tensor, " batch"]) -> Bool[Tensor, "some token"] | None:
    return None if part.mask is None else part.mask[complete]
