"""Logits of a fusion for a subset of the modalities."""

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
    model: Multimodal, tokens: Mapping[str, Tokens], subset: Collection[str]
) -> Float[Tensor, "batch output"]:
    """Returns the model's logits for a subset of modalities, in float32 at least, without rerunning the encoders."""
    return at_least_single(cast(Tensor, model.fuse(keep_modalities(tokens, subset)).logits))
