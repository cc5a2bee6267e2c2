"""Some of the modalities alone, all the sets there are of them, and who deserves what of a whole."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..tokens.token_batch import Tokens


def keep_modalities(tokens: Mapping[str, Tokens], kept: Collection[str]) -> dict[str, Tokens]:
    """The tokens of some modalities; the others have none, as in a batch that lacks them.

    Where logits are a sum over modalities (``Concat``, ``Sum``), fusing these is the same as leaving out the other
    modalities' W_m f_m, with all biases kept.

    Example:
        >>> import torch
        >>> tokens = {"audio": Tokens(torch.ones(2, 3, 5)), "image": Tokens(torch.ones(2, 7, 5))}
        >>> {name: len(part) for name, part in keep_modalities(tokens, ["image"]).items()}
        {'audio': 0, 'image': 7}
    """
    return {name: part if name in kept else Tokens(part.values[:, :0]) for name, part in tokens.items()}


def modality_subsets(names: Sequence[str]) -> list[list[str]]:
    """All subsets: the one of number s has the modality of place m where bit m of s is set, so the first is empty.

    Example:
        >>> modality_subsets(["audio", "image"])
        [[], ['audio'], ['image'], ['audio', 'image']]
    """
    return [[name for m, name in enumerate(names) if number >> m & 1] for number in range(1 << len(names))]


def shapley_values(worth: Tensor) -> Tensor:
    """What each modality adds, over all orders in which modalities may come::

        phi_m = sum_{S without m} |S|! (N - |S| - 1)! / N! (v(S + m) - v(S))

    Args:
        worth: (subset, ...) v of every subset, in the order of ``subsets``.

    Returns:
        (modality, ...) the values; over modalities they add up to v of everything minus v of nothing.

    Example:
        >>> import torch
        >>> shapley_values(torch.tensor([1.0, 3.0, 4.0, 10.0]))
        tensor([4., 5.])
    """
    count = (len(worth) - 1).bit_length()
    weights = [[_weight(count, m, number) for number in range(len(worth))] for m in range(count)]
    return torch.tensordot(worth.new_tensor(weights), worth, dims=1)


def _weight(count: int, m: int, number: int) -> float:
    """What v of a subset counts in phi_m."""
    size = (number & ~(1 << m)).bit_count()
    weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
    return weight if number >> m & 1 else -weight
