"""Some of the modalities alone: what a fusion answers when the others are taken away."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..tokens import Tokens


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
