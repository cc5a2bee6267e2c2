"""Subsets of modalities and exact Shapley values over them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..tokens.token_batch import Tokens


def keep_modalities(tokens: Mapping[str, Tokens], names: Collection[str]) -> dict[str, Tokens]:
    """Keeps the tokens of some modalities; the others get zero tokens, as if missing from the batch.

    If logits are a sum over modalities (``Concat``, ``Sum``), this removes the terms W_m f_m of the other
    modalities and keeps all biases.

    Example:
        >>> import torch
        >>> tokens = {"audio": Tokens(torch.ones(2, 3, 5)), "image": Tokens(torch.ones(2, 7, 5))}
        >>> {name: len(part) for name, part in keep_modalities(tokens, ["image"]).items()}
        {'audio': 0, 'image': 7}
    """
    return derived(
        tokens, {name: part if name in names else Tokens(part.values[:, :0]) for name, part in tokens.items()}
    )


def derived(tokens: Mapping[str, Tokens], changed: dict[str, Tokens]) -> dict[str, Tokens]:
    """Returns changed tokens with the extra data of ``tokens``, which ``eq.adapt`` needs for the rest of the model."""
    derive = getattr(tokens, "derive", None)
    return changed if derive is None else derive(changed)


def modality_subsets(names: Sequence[str]) -> list[list[str]]:
    """Lists all subsets; subset s contains modality m if bit m of s is set, so the first subset is empty.

    Example:
        >>> modality_subsets(["audio", "image"])
        [[], ['audio'], ['image'], ['audio', 'image']]
    """
    return [[name for m, name in enumerate(names) if number >> m & 1] for number in range(1 << len(names))]


def shapley_values(worth: Tensor) -> Tensor:
    """Computes exact Shapley values::

        phi_m = sum_{S without m} |S|! (N - |S| - 1)! / N! (v(S + m) - v(S))

    Args:
        worth: (subset, ...) value v of every subset, in the order of ``modality_subsets``.

    Returns:
        (modality, ...) Shapley values; their sum is v of all modalities minus v of the empty set.

    Example:
        >>> import torch
        >>> shapley_values(torch.tensor([1.0, 3.0, 4.0, 10.0]))
        tensor([4., 5.])
    """
    count = (len(worth) - 1).bit_length()
    weights = [[_weight(count, m, number) for number in range(len(worth))] for m in range(count)]
    return torch.tensordot(worth.new_tensor(weights), worth, dims=1)


def _weight(count: int, m: int, number: int) -> float:
    """Weight of v(subset) in phi_m."""
    size = (number & ~(1 << m)).bit_count()
    weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
    return weight if number >> m & 1 else -weight
