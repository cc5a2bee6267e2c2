"""Encoded modalities of which some samples are masked: those that are not finite, or not usable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from ..tokens.token_batch import Tokens


def finite_tokens(
    tokens: Mapping[str, Tokens], names: Sequence[str]
) -> tuple[dict[str, Tokens], Bool[Tensor, "batch modality"]]:  # fmt: skip
    """Masks the modalities of samples whose tokens are not finite, and returns which modalities each sample has."""
    result, present = {}, []
    for name in names:
        part = tokens[name].zero_masked()
        # Masks are added only where the data may need them: they select other kernels. A finite sum, which takes less
        # time, has finite terms.
        if torch.compiler.is_compiling() or not bool(part.values.detach().sum().isfinite()):
            finite = part.values.isfinite().flatten(1).all(dim=1)
            if torch.compiler.is_compiling() or not bool(finite.all()):
                part = replace(part, mask=part.valid() & finite[:, None]).zero_masked()
        present.append(part.present())
        result[name] = part
    return result, torch.stack(present, dim=1)


def mask_unusable(
    tokens: Mapping[str, Tokens], usable: Bool[Tensor, "batch modality"], present: Bool[Tensor, "batch modality"]
) -> dict[str, Tokens]:  # fmt: skip
    """Masks the modalities of each sample that are not usable; a sample without a usable modality keeps all of them."""
    kept = usable | ~usable.any(dim=1, keepdim=True)
    if not torch.compiler.is_compiling() and bool((kept | ~present).all()):
        return dict(tokens)
    return {
        name: replace(part, mask=part.valid() & kept[:, index, None])
        for index, (name, part) in enumerate(tokens.items())
    }
