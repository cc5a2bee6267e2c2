"""What a fusion answers when some of the modalities are taken away."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from jaxtyping import Float
from torch import Tensor

from ...fusion.subset_tokens import keep_modalities
from ...tokens.token_batch import Tokens
from ..balancer import Multimodal
from .unimodal_terms import at_least_single


def subset_logits(
    model: Multimodal, tokens: Mapping[str, Tokens], kept: Collection[str]
) -> Float[Tensor, "batch output"]:
    """What the model answers from some modalities alone, in float32 at least. The encoders do not run again."""
    return at_least_single(cast(Tensor, model.fuse(keep_modalities(tokens, kept)).logits))
