"""Static fusions of pooled vectors: concatenation, sum, FiLM, gated, unimodal."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import unknown_name
from ..tokens.token_batch import Output, Tokens
from .fusion_base import Fusion


class Concat(Fusion):
    """Concatenation of pooled vectors, y = W [f_1; ...; f_N] + b; the logits are a sum of one part per modality.

    Args:
        dim: width of the encoders' tokens.

    Reference: late fusion by concatenation, as in OGM-GE (CVPR 2022) and RollingQ (ICML 2025).
    Differs from the released code in: any number of modalities, and missing modalities contribute zeros.

    Example:
        >>> Concat(5)({"audio": Tokens(torch.ones(2, 3, 5)), "image": Tokens(torch.ones(2, 7, 5))}).features.shape
        torch.Size([2, 10])
    """

    def _build(self) -> None:
        """No parameters depend on the modalities."""

    @property
    def out_dim(self) -> int:
        return self.dim * len(self.names)

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        features = torch.cat([part.pooled() for part in tokens.values()], dim=-1)
        return Output(features=features, tokens=tokens, names=self.names)

    def contributions(self, output: Output, head: nn.Module) -> dict[str, Tensor] | None:
        """Computes W_m f_m + b / N for a linear head, or ``head.pieces(features)`` if defined, else None."""
        # Features computed under autocast may have lower precision than the weights of the head.
        features = output.features.to(next(head.parameters(), output.features).dtype)
        if hasattr(head, "pieces"):
            return dict(zip(self.names, head.pieces(features), strict=True))  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            return None
        count = len(self.names)
        bias = None if head.bias is None else head.bias / count
        pieces = zip(features.chunk(count, dim=-1), head.weight.chunk(count, dim=1), strict=True)
        return {
            name: nn.functional.linear(f, weight, bias) for name, (f, weight) in zip(self.names, pieces, strict=True)
        }


class Sum(Concat):
    """Sum of one linear head per modality, y = sum_m (W_m f_m + b_m).

    Arguments and shapes as for ``Concat``.

    Reference: late fusion by summation, as in OGM-GE (CVPR 2022).
    Differs from the released code in: any number of modalities.
    """

    def head(self, num_outputs: int) -> nn.Module:
        return SumHead(len(self.names), self.dim, num_outputs)


class SumHead(nn.Module):
    """Sum of one linear layer per modality, each applied to its part of the features."""

    def __init__(self, num_modalities: int, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(dim, num_outputs) for _ in range(num_modalities))

    def pieces(self, features: Float[Tensor, "batch feature"]) -> list[Float[Tensor, "batch output"]]:
        """Computes the part of each modality."""
        pieces = features.chunk(len(self.parts), dim=-1)
        return [part(piece) for part, piece in zip(self.parts, pieces, strict=True)]

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return torch.stack(self.pieces(features)).sum(dim=0)


class Unimodal(Fusion):
    """Single-modality baseline, y = W f_m + b; other modalities and their masks are ignored.

    Args:
        dim: width of the encoder's tokens.
        modality: the modality to use; the first by default.

    Reference: the unimodal baseline of RollingQ (ICML 2025).
    Differs from the released code in: it has the interface of a fusion, so that the same loop trains it.
    """

    def __init__(self, dim: int, *, modality: str | None = None) -> None:
        super().__init__(dim)
        self.modality = modality

    def _build(self) -> None:
        self.modality = self.modality or self.names[0]
        if self.modality not in self.names:
            raise unknown_name("Unimodal", "modality", self.modality, self.names)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.modality or self.names[0],)

    @property
    def out_dim(self) -> int:
        return self.dim

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        return Output(features=tokens[self.modality or self.names[0]].pooled(), tokens=tokens, names=self.names)

    def contributions(self, output: Output, head: nn.Module) -> dict[str, Tensor] | None:
        """Assigns all logits to the modality used."""
        logits = head(output.features)
        return {name: logits if name == self.modality else torch.zeros_like(logits) for name in self.names}


class _Modulated(Fusion):
    """Base class of fusions in which one source modality modulates the others.

    Args:
        dim: width of the encoders' tokens.
        source: the modulating modality; the first by default. The modulated vectors of the others are summed.
    """

    def __init__(self, dim: int, *, source: str | None = None) -> None:
        super().__init__(dim)
        self.source = source

    def _build(self) -> None:
        self.source = self.source or self.names[0]
        if self.source not in self.names:
            raise unknown_name(type(self).__name__, "modality", self.source, self.names)
        # A single modality modulates itself.
        self.targets = tuple(name for name in self.names if name != self.source) or (self.source,)
        self._build_targets()

    @abstractmethod
    def _build_targets(self) -> None:
        """Creates the parameters for ``self.targets``."""

    @property
    def out_dim(self) -> int:
        return self.dim

    @abstractmethod
    def _modulate(self, index: int, source: Tensor, target: Tensor) -> Tensor:
        """Modulates the target vector by the source vector; both (batch, dim)."""

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        source = tokens[self.source or self.names[0]].pooled()
        changed = [self._modulate(i, source, tokens[name].pooled()) for i, name in enumerate(self.targets)]
        return Output(features=torch.stack(changed).sum(dim=0), tokens=tokens, names=self.names)


class FiLM(_Modulated):
    """Feature-wise linear modulation (FiLM).

    (gamma, beta) = split(U f_src + u); y = W (gamma * f_dst + beta) + b. No "+1" on gamma, as in the reference code.
    With more than two modalities, the modulated vectors are summed. Shapes as for ``Concat`` with width ``dim``.

    Args:
        dim: width of the encoders' tokens.
        source: the modulating modality; the first by default.

    Reference: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer" (AAAI 2018).
    Differs from the released code in: any number of modalities, of which one modulates all others.
    """

    def _build_targets(self) -> None:
        self.modulation = nn.ModuleList(nn.Linear(self.dim, 2 * self.dim) for _ in self.targets)

    def _modulate(self, index: int, source: Tensor, target: Tensor) -> Tensor:
        gamma, beta = self.modulation[index](source).chunk(2, dim=-1)
        return gamma * target + beta


class Gated(_Modulated):
    """Gated fusion, y = W (sigmoid(A f_src + a) * (B f_dst + b')) + b.

    Arguments and the case of more than two modalities as for ``FiLM``.

    Reference: Kiela et al., "Efficient Large-Scale Multi-Modal Classification" (AAAI 2018).
    Differs from the released code in: any number of modalities, of which one gates all others.
    """

    def _build_targets(self) -> None:
        self.gate = nn.ModuleList(nn.Linear(self.dim, self.dim) for _ in self.targets)
        self.value = nn.ModuleList(nn.Linear(self.dim, self.dim) for _ in self.targets)

    def _modulate(self, index: int, source: Tensor, target: Tensor) -> Tensor:
        return torch.sigmoid(self.gate[index](source)) * self.value[index](target)
