"""Some of the modalities alone: what a fusion answers when the others are taken away."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from jaxtyping import Float
from torch import Tensor

from ..tokens import Tokens
from .base import Multimodal
from .modalities import at_least_single


def only(tokens: Mapping[str, Tokens], kept: Collection[str]) -> dict[str, Tokens]:
    """The tokens of some modalities; the others have none, as in a batch that lacks them.

    Where logits are a sum over modalities (``Concat``, ``Sum``), fusing these is the same as leaving out the other
    modalities' W_m f_m, with all biases kept.

    Example:
        >>> import torch
        >>> left = only({"audio": Tokens(torch.ones(2, 3, 5)), "image": Tokens(torch.ones(2, 7, 5))}, ["image"])
        >>> {name: len(part) for name, part in left.items()}
        {'audio': 0, 'image': 7}
    """
    return {name: part if name in kept else Tokens(part.values[:, :0]) for name, part in tokens.items()}


def subset_logits(
    model: Multimodal, tokens: Mapping[str, Tokens], kept: Collection[str]
) -> Float[Tensor, "batch output"]:
    """What the model answers from some modalities alone, in float32 at least. The encoders do not run again."""
    return at_least_single(cast(Tensor, model.fuse(only(tokens, kept)).logits))
