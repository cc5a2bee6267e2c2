"""Static fusions: pooled vectors, joined in the same way for every sample (spec 1.3)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import unknown_name
from ..tokens.token_batch import Output, Tokens
from .fusion_base import Fusion


class Concat(Fusion):
    """y = W [f_1; ...; f_N] + b over the pooled vectors; its logits are a sum of one part for each modality.

    Args:
        dim: width of the encoders' tokens.

    Reference: late fusion by concatenation, as in OGM-GE (CVPR 2022) and RollingQ (ICML 2025); spec 1.3.
    Differs from the released code in: any number of modalities, and samples that lack one add zeros.

    Example:
        >>> Concat(5)({"audio": Tokens(torch.ones(2, 3, 5)), "image": Tokens(torch.ones(2, 7, 5))}).features.shape
        torch.Size([2, 10])
    """

    def _build(self) -> None:
        """Nothing depends on the names but the width."""

    @property
    def out_dim(self) -> int:
        return self.dim * len(self.names)

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        features = torch.cat([part.pooled() for part in tokens.values()], dim=-1)
        return Output(features=features, tokens=tokens, names=self.names)

    def contributions(self, output: Output, head: nn.Module) -> dict[str, Tensor] | None:
        """W_m f_m + b / N of a linear head; of another one its ``pieces(features)``, where it has them."""
        # Features of autocast may be narrower than the head's weights, and autocast over.
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
    """y = sum_m (W_m f_m + b_m): one linear head for each modality, logits added.

    Args and shapes as ``Concat``.

    Reference: late fusion by summation, as in OGM-GE (CVPR 2022); spec 1.3.
    Differs from the released code in: any number of modalities.
    """

    def head(self, num_outputs: int) -> nn.Module:
        return SumHead(len(self.names), self.dim, num_outputs)


class SumHead(nn.Module):
    """One linear layer for each modality's part of the features; the logits are added."""

    def __init__(self, num_modalities: int, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(dim, num_outputs) for _ in range(num_modalities))

    def pieces(self, features: Float[Tensor, "batch feature"]) -> list[Float[Tensor, "batch output"]]:
        """Each modality's part of the logits."""
        pieces = features.chunk(len(self.parts), dim=-1)
        return [part(piece) for part, piece in zip(self.parts, pieces, strict=True)]

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return torch.stack(self.pieces(features)).sum(dim=0)


class Unimodal(Fusion):
    """y = W f_m + b: one modality alone, the others are not read, and neither are their masks.

    Args:
        dim: width of the encoder's tokens.
        modality: the one that is read; the first by default.

    Reference: the unimodal baseline of RollingQ (ICML 2025); spec 1.3.
    Differs from the released code in: it is a fusion like any other, so that one loop trains it.
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
        """All of the logits come from the one modality."""
        logits = head(output.features)
        return {name: logits if name == self.modality else torch.zeros_like(logits) for name in self.names}


class _Modulated(Fusion):
    """A source modality that changes the others: what FiLM and Gated have in common.

    Args:
        dim: width of the encoders' tokens.
        source: the modality that modulates; the first by default. The others are summed after their own modulation.
    """

    def __init__(self, dim: int, *, source: str | None = None) -> None:
        super().__init__(dim)
        self.source = source

    def _build(self) -> None:
        self.source = self.source or self.names[0]
        if self.source not in self.names:
            raise unknown_name(type(self).__name__, "modality", self.source, self.names)
        # With one modality alone, it modulates itself.
        self.targets = tuple(name for name in self.names if name != self.source) or (self.source,)
        self._build_targets()

    @abstractmethod
    def _build_targets(self) -> None:
        """Makes the parameters for ``self.targets``."""

    @property
    def out_dim(self) -> int:
        return self.dim

    @abstractmethod
    def _modulate(self, index: int, source: Tensor, target: Tensor) -> Tensor:
        """The target's vector as the source changes it; both (batch, dim)."""

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        source = tokens[self.source or self.names[0]].pooled()
        changed = [self._modulate(i, source, tokens[name].pooled()) for i, name in enumerate(self.targets)]
        return Output(features=torch.stack(changed).sum(dim=0), tokens=tokens, names=self.names)


class FiLM(_Modulated):
    """(gamma, beta) = split(U f_src + u); y = W (gamma * f_dst + beta) + b. No "+1" on gamma, as in the reference code.

    Args and N > 2 as the class above says; shapes as ``Concat`` with width ``dim``.

    Reference: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer" (AAAI 2018); spec 1.3.
    Differs from the released code in: any number of modalities, of which one modulates all others.
    """

    def _build_targets(self) -> None:
        self.modulation = nn.ModuleList(nn.Linear(self.dim, 2 * self.dim) for _ in self.targets)

    def _modulate(self, index: int, source: Tensor, target: Tensor) -> Tensor:
        gamma, beta = self.modulation[index](source).chunk(2, dim=-1)
        return gamma * target + beta


class Gated(_Modulated):
    """y = W (sigmoid(A f_src + a) * (B f_dst + b')) + b: the gate is made from the projected source.

    Args and N > 2 as FiLM.

    Reference: Kiela et al., "Efficient Large-Scale Multi-Modal Classification" (AAAI 2018); spec 1.3.
    Differs from the released code in: any number of modalities, of which one gates all others.
    """

    def _build_targets(self) -> None:
        self.gate = nn.ModuleList(nn.Linear(self.dim, self.dim) for _ in self.targets)
        self.value = nn.ModuleList(nn.Linear(self.dim, self.dim) for _ in self.targets)

    def _modulate(self, index: int, source: Tensor, target: Tensor) -> Tensor:
        return torch.sigmoid(self.gate[index](source)) * self.value[index](target)
